// Package workspacedisk looks into the disk of a workspace that does not run,
// or into any raw or qcow2 image with an ext4 filesystem: it lists, reads,
// exports and scrubs.
//
// A guest made the image and may have made it to attack whoever opens it. So
// nothing on the host parses it but the memory-safe readers below this package
// (ext4, jbd2, qcow2), no file that the image names is opened, no path or name
// of the image is ever used on the host or put into a command, and lists and
// sizes are bounded by [Limits]. The host never mounts an image.
//
// The disk of a gVisor machine is an image and layers over it, which the host's
// kernel joined with overlayfs while the machine ran. Here they are joined
// again, entry by entry ([Source].Layers); redirects lead into the layers below
// only and to each directory once, so no layer makes a walk longer than the
// images are large. Its export is written anew, by package ext4image.
//
// A disk of a machine that was killed has a journal to recover. It is
// recovered in memory, so what is listed and read is what the guest's next
// boot would see; the image itself is not touched.
//
// Only what writes uses e2fsprogs: exporting a single image that needs recovery or
// has runtime paths, and scrubbing. These run confined, on a private copy, get
// inode numbers and fixed paths only, and are believed only as far as the
// result, read again, proves them right, since debugfs exits 0 on most
// failures.
package workspacedisk
