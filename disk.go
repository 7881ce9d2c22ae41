package pyro

import (
	"context"
	"io"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/workspacedisk"
)

// The formats of a disk image. DiskAuto looks at the file's first bytes, which
// is right for files of one's own and wrong for a disk that a guest could write:
// a guest can write any header it likes.
const (
	DiskAuto  = string(workspacedisk.FormatAuto)
	DiskRaw   = string(workspacedisk.FormatRaw)
	DiskQcow2 = string(workspacedisk.FormatQcow2)
)

// A Disk is an open ext4 disk image, looked into without mounting or running
// it. The image may be hostile: nothing in it names a file that is opened or a
// command that is run, and every answer is bounded.
type Disk struct {
	d *workspacedisk.Disk
}

// OpenDisk opens the image at path, which is of that format. An image that a
// machine has in use is api.ErrBusy or api.ErrState. No other file is opened
// because the image names it. The caller closes the Disk.
func OpenDisk(ctx context.Context, path, format string) (*Disk, error) {
	d, err := workspacedisk.Open(ctx, workspacedisk.Source{Path: path, Format: workspacedisk.Format(format)}, workspacedisk.Options{})
	if err != nil {
		return nil, err
	}
	return &Disk{d}, nil
}

// List lists the directory at path in the guest, or the one file there, sorted
// by path. Special files are left out.
func (d *Disk) List(ctx context.Context, path string, recursive bool) (*api.DiskList, error) {
	return d.d.List(ctx, path, recursive)
}

// Read returns the beginning of a regular file, at most maxBytes of it.
func (d *Disk) Read(ctx context.Context, path string, maxBytes int64) (*api.DiskRead, error) {
	return d.d.Read(ctx, path, maxBytes)
}

// CopyFile writes the beginning of a regular file, at most maxBytes of it, to w
// as it is.
func (d *Disk) CopyFile(ctx context.Context, w io.Writer, path string, maxBytes int64) error {
	_, _, err := d.d.CopyFile(ctx, w, path, maxBytes)
	return err
}

// Export writes the file system to a new raw, sparse ext4 image at output,
// which must not exist. The journal of the copy is recovered and pyro's runtime
// paths are scrubbed from it.
func (d *Disk) Export(ctx context.Context, output string) (*api.DiskExport, error) {
	return d.d.Export(ctx, output)
}

// Close closes the image.
func (d *Disk) Close() error { return d.d.Close() }

// ScrubDisk removes pyro's runtime paths, with their data, from the image at
// path. The image is replaced in one step, or left as it was.
func ScrubDisk(ctx context.Context, path, format string) (*api.DiskScrub, error) {
	return workspacedisk.Scrub(ctx, workspacedisk.Source{Path: path, Format: workspacedisk.Format(format)}, workspacedisk.Limits{})
}
