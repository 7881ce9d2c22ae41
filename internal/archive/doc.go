// Package archive moves file trees in and out as tar, confined to a directory.
//
// Both ends of the product use it and neither trusts the tar: a name cannot
// leave the root, a link is never followed while unpacking, devices, FIFOs and
// sockets are never made, and entries, bytes and names are bounded before any
// of them is acted on. Set-id bits, owners and extended attributes are dropped.
package archive
