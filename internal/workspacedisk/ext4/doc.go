// Package ext4 reads ext2, ext3 and ext4 filesystems that nobody vouches for.
// The guest that made the image is hostile: every number in it is checked
// before it is used, every loop has a bound that does not depend on the image,
// and nothing is ever written.
//
// It reads extents and block maps, 1 KiB to 64 KiB blocks, 64bit, meta_bg,
// flex_bg, bigalloc, inline data, linear and hash-indexed directories (both
// are scanned linearly: a lying index cannot hide an entry), and fast and slow
// symlinks, and verifies metadata checksums where the filesystem has them. An
// image whose journal needs recovery is replayed in memory, see [Open].
//
// It exists because the two ways at hand do not fit: debugfs executes hostile
// names and corrupts memory on hostile metadata, and the ext4 reader of
// go-diskfs allocates by unchecked header fields, ignores a dirty journal and
// lacks meta_bg and bigalloc.
//
// Offsets and flag values are those of the kernel's documentation,
// "ext4 Data Structures and Algorithms" (Documentation/filesystems/ext4).
package ext4
