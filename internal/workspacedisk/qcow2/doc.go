// Package qcow2 reads qcow2 images, versions 2 and 3, without converting them
// and without trusting them. It never opens a file: the backing file's name in
// the header is reported, and whoever opens the image decides what, if
// anything, lies beneath. It reads zlib and zstd compressed clusters; images
// that are encrypted, keep their data in another file, or use extended L2
// entries are refused.
//
// go-qcow2reader of the lima project was the library to take; it opens the
// backing file that the header names, which a hostile guest could write.
//
// The format is that of QEMU's docs/interop/qcow2.rst; its numbers are big
// endian.
package qcow2
