// Package api holds the plain types and error classes that the SDK, the core
// and the two faces share. It imports the standard library only, so that any
// package may import it without a cycle, and so that its types show their
// fields in the documentation. The JSON of its types is the product's JSON.
package api
