package workspacedisk

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/pyro-mcp/pyro/api"
)

// Export writes the disk as one raw ext4 image to a new file, which appears
// only when it is complete and on stable storage. Holes stay holes. The copy's
// journal is recovered and its runtime paths are scrubbed; the boot area (the
// first 1024 bytes), which ext4 does not use and a guest could fill with
// another format's header, is zero. An outputPath that exists is ErrExists.
// Recovery and scrubbing need e2fsprogs, a disk without need of them does not.
//
// Of a disk with layers the image is made anew from its files, with owners,
// permissions, modification times and the extended attributes of users and
// security; it is as large as Options.DiskBytes says, or what the files take.
func (d *Disk) Export(ctx context.Context, outputPath string) (*api.DiskExport, error) {
	if _, err := os.Lstat(outputPath); err == nil {
		return nil, outputExists(outputPath)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("looking at the output path: %w", err)
	}
	out, err := newPartial(outputPath)
	if err != nil {
		return nil, err
	}
	defer out.discard()
	size, err := d.fill(ctx, out.file)
	if err != nil {
		return nil, fmt.Errorf("exporting the disk: %w", err)
	}
	if err := out.publish(); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return nil, outputExists(outputPath)
		}
		return nil, fmt.Errorf("exporting the disk: %w", err)
	}
	return &api.DiskExport{BytesWritten: size, DiskFormat: "ext4", OutputPath: outputPath}, nil
}

// fill writes the disk into f, which is empty, and returns the size of f.
func (d *Disk) fill(ctx context.Context, f *os.File) (size int64, err error) {
	if len(d.src.Layers) > 0 {
		return d.exportMerged(ctx, f)
	}
	// What lies around the filesystem is not handed out.
	if err := d.copyImage(ctx, f, bootArea, d.fs.Size()); err != nil {
		return 0, err
	}
	if _, err := cleanImage(ctx, f, d.opts.Limits); err != nil {
		return 0, err
	}
	return d.chain.top.Size(), nil
}

func outputExists(p string) error {
	return api.Errorf(api.ErrExists, "output_path already exists: %s", p)
}

// bootArea is what precedes the superblock.
const bootArea = 1024

// copyImage writes the bytes of the disk from from to end, as they are there,
// to the same place of f, which is empty, and makes f as large as the disk.
func (d *Disk) copyImage(ctx context.Context, f *os.File, from, end int64) error {
	if err := f.Truncate(d.chain.top.Size()); err != nil {
		return fmt.Errorf("sizing the copy: %w", err)
	}
	buf := make([]byte, copyChunk)
	var written int64
	for pos := from; pos < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		next, zero, err := d.chain.top.NextData(pos)
		if err != nil {
			return err
		}
		if zero {
			pos = next
			continue
		}
		for next = min(next, end); pos < next; {
			if err := ctx.Err(); err != nil {
				return err
			}
			part := buf[:min(int64(len(buf)), next-pos)]
			if _, err := io.ReadFull(io.NewSectionReader(d.chain.top, pos, int64(len(part))), part); err != nil {
				return fmt.Errorf("reading the disk at byte %d: %w", pos, err)
			}
			n, err := writeSparse(f, part, pos)
			if err != nil {
				return fmt.Errorf("writing the copy: %w", diskFull(err))
			}
			if written += n; written > d.opts.Limits.MaxExportBytes {
				return api.Errorf(api.ErrExhausted, "the disk holds more than the limit of %d bytes", d.opts.Limits.MaxExportBytes)
			}
			pos += int64(len(part))
		}
	}
	return nil
}

// sparseUnit is the granularity at which zeros become holes.
const sparseUnit = 4096

var zeroUnit [sparseUnit]byte

// writeSparse writes p at off but for its aligned units of zeros, and returns
// how much it wrote. The file must be a hole there.
func writeSparse(f *os.File, p []byte, off int64) (written int64, err error) {
	for start := 0; start < len(p); {
		end := unitEnd(p, start, off)
		if isZero(p[start:end]) {
			start = end
			continue
		}
		for end < len(p) {
			next := unitEnd(p, end, off)
			if isZero(p[end:next]) {
				break
			}
			end = next
		}
		n, err := f.WriteAt(p[start:end], off+int64(start))
		written += int64(n)
		if err != nil {
			return written, err
		}
		start = end
	}
	return written, nil
}

// unitEnd is the end of the unit in which p[start] lies.
func unitEnd(p []byte, start int, off int64) int {
	in := (off + int64(start)) % sparseUnit
	return min(len(p), start+int(sparseUnit-in))
}

func isZero(p []byte) bool { return string(p) == string(zeroUnit[:len(p)]) }

// A partial is a file on its way to its final name. It is made and published
// relative to its open directory, which nobody can swap meanwhile.
type partial struct {
	root *os.Root
	file *os.File
	temp string // name of the unfinished file, "" once it is gone
	name string // final name
}

func newPartial(outputPath string) (*partial, error) {
	dir, name := filepath.Split(filepath.Clean(outputPath))
	if name == "" || name == "." || name == ".." {
		return nil, api.Errorf(api.ErrInvalid, "output_path names no file: %s", outputPath)
	}
	if dir == "" {
		dir = "."
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, api.Errorf(classOf(err), "opening the directory of output_path: %w", err)
	}
	p := &partial{root: root, temp: "." + rand.Text() + ".partial", name: name}
	if p.file, err = root.OpenFile(p.temp, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
		_ = root.Close()
		return nil, api.Errorf(classOf(err), "making a file beside output_path: %w", err)
	}
	return p, nil
}

func classOf(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return api.ErrNotFound
	case errors.Is(err, fs.ErrPermission):
		return api.ErrDenied
	}
	return api.ErrInvalid
}

// sync puts the file's content on stable storage.
func (p *partial) sync() error {
	if err := p.file.Sync(); err != nil {
		return fmt.Errorf("syncing the copy: %w", diskFull(err))
	}
	return nil
}

// publish gives the file its final name, which must be free: the error then
// matches fs.ErrExist. A link never replaces, unlike a rename.
func (p *partial) publish() error {
	if err := p.sync(); err != nil {
		return err
	}
	if err := p.root.Link(p.temp, p.name); err != nil {
		return fmt.Errorf("naming the copy: %w", err)
	}
	return p.removeTemp()
}

// replace gives the file the final name in place of what has it now.
func (p *partial) replace() error {
	if err := p.sync(); err != nil {
		return err
	}
	if err := p.root.Rename(p.temp, p.name); err != nil {
		return fmt.Errorf("naming the copy: %w", err)
	}
	p.temp = ""
	return p.syncDir()
}

func (p *partial) removeTemp() error {
	if err := p.root.Remove(p.temp); err != nil {
		return fmt.Errorf("removing the copy's first name: %w", err)
	}
	p.temp = ""
	return p.syncDir()
}

func (p *partial) syncDir() error {
	dir, err := p.root.Open(".")
	if err != nil {
		return fmt.Errorf("syncing the directory: %w", err)
	}
	defer dir.Close()
	if err := dir.Sync(); err != nil {
		return fmt.Errorf("syncing the directory: %w", err)
	}
	return nil
}

// discard closes the file and removes what was not published.
func (p *partial) discard() {
	_ = p.file.Close()
	if p.temp != "" {
		_ = p.root.Remove(p.temp)
	}
	_ = p.root.Close()
}
