// Package oci makes environment images from OCI images: of a registry, of a
// directory in the OCI image layout, or of an archive that docker save wrote.
//
// An image is data of somebody who is not trusted. Nothing of it is unpacked on
// the host: its layers stay the compressed files that they are, named by their
// digests, and are applied one on the other inside an ext4 file system that
// only this process sees. So a path, a link or a whiteout in a layer can lead
// nowhere but into the image itself. What could cost time, room or memory is
// bounded by Limits, and every byte is checked against the digest that the
// manifest, and in the end the reference, gives it. Decompression is done in
// this process; no program is started.
package oci

// Limits bounds an image. More is api.ErrExhausted.
type Limits struct {
	// Layers is how many layers there may be; docker itself stops at 127.
	Layers int
	// CompressedBytes is for all layers as they are fetched, and TreeBytes for
	// all as they are unpacked, what later layers replace included.
	CompressedBytes, TreeBytes int64
	// Entries is for all layers, directories that are made on the way
	// included. Each takes some 800 bytes of memory (measured: 990,000 files,
	// 780 MB).
	Entries int64
	// NameBytes is for all names, link targets and extended attributes.
	NameBytes int64
	// DocumentBytes is for a manifest, an index and a configuration, each.
	DocumentBytes int64
}

// DefaultLimits are above what the largest images in use have (some 20 GiB and
// 300,000 files).
var DefaultLimits = Limits{
	Layers:          512,
	CompressedBytes: 32 << 30,
	TreeBytes:       64 << 30,
	Entries:         1_000_000,
	NameBytes:       256 << 20,
	DocumentBytes:   4 << 20,
}
