// Package workspace is the core: what the faces ask for, put together out of
// environments, engines and supervisors. A [Manager] works the same in whatever
// process it lives; it keeps nothing in memory that another process would need.
package workspace
