package workspacedisk

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"unicode/utf8"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/workspacedisk/ext4"
)

// MaxReadBytes bounds what Read returns at once, since it is held in memory.
const MaxReadBytes = 64 << 20

// copyChunk is how much of a file is read at a time.
const copyChunk = 1 << 20

// Read returns the first maxBytes bytes of the regular file at guestPath.
// maxBytes must lie between 1 and MaxReadBytes.
func (d *Disk) Read(ctx context.Context, guestPath string, maxBytes int64) (*api.DiskRead, error) {
	if maxBytes > MaxReadBytes {
		return nil, api.WithHint(api.Errorf(api.ErrInvalid, "max_bytes must be at most %d", MaxReadBytes),
			"--content-only has no such bound; or export the disk")
	}
	guestPath, f, err := d.openFile(ctx, guestPath, maxBytes, false)
	if err != nil {
		return nil, err
	}
	data, err := readStart(guestPath, f, maxBytes)
	if err != nil {
		return nil, err
	}
	out := &api.DiskRead{MaxBytes: maxBytes, Path: validText(guestPath), SizeBytes: f.Size(), Truncated: f.Size() > maxBytes}
	text := data
	if out.Truncated {
		text = wholeRunes(data)
	}
	if utf8.Valid(text) {
		out.Content = string(text)
	} else {
		out.ContentBase64 = base64.StdEncoding.EncodeToString(data)
	}
	return out, nil
}

// ReadLinked returns the first maxBytes bytes of the regular file that guestPath
// leads to, through symlinks like a program in the guest. maxBytes must lie
// between 1 and MaxReadBytes.
func (d *Disk) ReadLinked(ctx context.Context, guestPath string, maxBytes int64) ([]byte, error) {
	if maxBytes > MaxReadBytes {
		return nil, api.Errorf(api.ErrInvalid, "max_bytes must be at most %d", MaxReadBytes)
	}
	guestPath, f, err := d.openFile(ctx, guestPath, maxBytes, true)
	if err != nil {
		return nil, err
	}
	return readStart(guestPath, f, maxBytes)
}

// readStart returns up to maxBytes bytes from a file's beginning.
func readStart(guestPath string, f *ext4.File, maxBytes int64) ([]byte, error) {
	data := make([]byte, min(f.Size(), maxBytes))
	if len(data) > 0 {
		if _, err := f.ReadAt(data, 0); err != nil && err != io.EOF {
			return nil, fmt.Errorf("failed to dump workspace disk file %s: %w", guestPath, err)
		}
	}
	return data, nil
}

// CopyFile writes the first maxBytes bytes of the regular file at guestPath to
// w and returns how many that were and whether there are more. A maxBytes of
// at most 0 is ErrInvalid; there is no upper bound.
func (d *Disk) CopyFile(ctx context.Context, w io.Writer, guestPath string, maxBytes int64) (n int64, truncated bool, err error) {
	guestPath, f, err := d.openFile(ctx, guestPath, maxBytes, false)
	if err != nil {
		return 0, false, err
	}
	size := min(f.Size(), maxBytes)
	buf := make([]byte, min(size, copyChunk))
	for n < size {
		if err := ctx.Err(); err != nil {
			return n, false, err
		}
		part := buf[:min(int64(len(buf)), size-n)]
		if _, err := f.ReadAt(part, n); err != nil && err != io.EOF {
			return n, false, fmt.Errorf("failed to dump workspace disk file %s: %w", guestPath, err)
		}
		written, err := w.Write(part)
		n += int64(written)
		if err != nil {
			return n, false, fmt.Errorf("writing the content of %s: %w", guestPath, err)
		}
	}
	return n, f.Size() > maxBytes, nil
}

// openFile checks the request, finds the file, as resolve does, and makes sure it
// is a regular one. It also returns the clean path.
func (d *Disk) openFile(ctx context.Context, guestPath string, maxBytes int64, follow bool) (string, *ext4.File, error) {
	if maxBytes <= 0 {
		return "", nil, api.WithHint(api.Errorf(api.ErrInvalid, "max_bytes must be positive"), "give --max-bytes a number of bytes above 0")
	}
	guestPath, err := cleanPath(guestPath)
	if err != nil {
		return "", nil, err
	}
	found, err := d.resolve(ctx, guestPath, d.budget(), follow)
	if err != nil {
		return "", nil, err
	}
	if !found.IsRegular() {
		err := api.Errorf(api.ErrInvalid, "workspace disk read only supports regular files: %s", guestPath)
		if found.IsSymlink() {
			err = api.WithHint(err, "it is a symlink; pyro disk list and pyro workspace disk list show where it leads: read that")
		}
		return "", nil, err
	}
	f, err := found.fs.OpenFile(found.Inode)
	if err != nil {
		return "", nil, fmt.Errorf("failed to dump workspace disk file %s: %w", guestPath, err)
	}
	return guestPath, f, nil
}

// wholeRunes returns data without the first bytes of a rune at its end whose
// other bytes were cut off.
func wholeRunes(data []byte) []byte {
	for i := 1; i < utf8.UTFMax && i <= len(data); i++ {
		if c := data[len(data)-i]; utf8.RuneStart(c) {
			if !utf8.FullRune(data[len(data)-i:]) {
				return data[:len(data)-i]
			}
			break
		}
	}
	return data
}
