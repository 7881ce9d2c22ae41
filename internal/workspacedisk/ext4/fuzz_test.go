package ext4_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/workspacedisk/ext4"
)

// baseImages are the images of testdata, which make.sh makes.
var baseImages = []string{"extents", "csum", "blockmap", "inline", "metabg", "dirty", "dirty-csum"}

func loadImage(t testing.TB, name string) []byte {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", name+".gz"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// patch is one overwritten place of an image.
type patch struct {
	off  int64
	data []byte
}

// patched is an image with patches, which costs no copy.
type patched struct {
	image   []byte
	patches []patch
}

func (p *patched) ReadAt(b []byte, off int64) (int, error) {
	n, err := bytes.NewReader(p.image).ReadAt(b, off)
	for _, c := range p.patches {
		if at := c.off - off; at < int64(n) && at+int64(len(c.data)) > 0 {
			if at < 0 {
				copy(b[:n], c.data[-at:])
			} else {
				copy(b[at:n], c.data)
			}
		}
	}
	return n, err
}

// decodePatches reads a fuzz input: four bytes of offset, one of length, and
// the bytes, again and again.
func decodePatches(in []byte, size int) []patch {
	var out []patch
	for len(in) > 5 && len(out) < 64 {
		off, n := binary.LittleEndian.Uint32(in), int(in[4])
		in = in[5:]
		n = min(n, len(in))
		out = append(out, patch{int64(off % uint32(size)), in[:n]})
		in = in[n:]
	}
	return out
}

func encodePatch(off uint32, data ...byte) []byte {
	out := binary.LittleEndian.AppendUint32(nil, off)
	return append(append(out, byte(len(data))), data...)
}

// seen counts what a walk came by.
type seen struct{ dirs, files, links, others, bytes int }

// walkAll uses all of the package on a filesystem, within bounds of its own.
func walkAll(ctx context.Context, fs *ext4.FS) (seen, error) {
	var s seen
	var errs []error
	note := func(err error) {
		if err != nil && len(errs) < 100 {
			errs = append(errs, err)
		}
	}
	budget := &ext4.Budget{DirBytes: 8 << 20}
	visited := map[uint32]bool{}
	pending := []uint32{ext4.RootInode}
	buf := make([]byte, 64<<10)
	for len(pending) > 0 && len(visited) < 500 {
		n := pending[0]
		pending = pending[1:]
		if visited[n] {
			continue
		}
		visited[n] = true
		ino, err := fs.Inode(n)
		if err != nil {
			note(err)
			continue
		}
		_, _, err = fs.InodePlace(n)
		note(err)
		_, err = fs.Xattrs(ino)
		note(err)
		places := 0
		err = fs.DataPlaces(ino, 0, func(off, length int64) error {
			if off < 0 || length <= 0 || off+length > fs.Size() {
				panic("a place outside of the filesystem")
			}
			if places++; places > 1000 {
				return errEnough
			}
			return nil
		})
		if !errors.Is(err, errEnough) {
			note(err)
		}
		switch {
		case ino.IsDir():
			s.dirs++
			note(fs.ReadDir(ctx, ino, budget, func(e ext4.Dirent) error {
				if e.Name == "" || len(e.Name) > 255 || e.Name == "." || e.Name == ".." || bytes.ContainsAny([]byte(e.Name), "/\x00") {
					panic("an impossible name")
				}
				pending = append(pending, e.Inode)
				return nil
			}))
			_, _, err = fs.Lookup(ctx, ino, budget, "no such name")
			note(err)
		case ino.IsSymlink():
			s.links++
			target, err := fs.ReadLink(ino)
			note(err)
			if err == nil && int64(len(target)) != ino.Size {
				panic("a target of another length than its inode says")
			}
		case ino.IsRegular():
			s.files++
			f, err := fs.OpenFile(ino)
			if err != nil {
				note(err)
				continue
			}
			pos := int64(0)
			for range 1000 {
				start, end, ok, err := f.NextData(ctx, pos)
				note(err)
				if !ok {
					break
				}
				if start < pos || end <= start || end > f.Size() {
					panic("a stretch outside of the file")
				}
				pos = end
			}
			for _, off := range []int64{0, f.Size() / 2, f.Size() - 100} {
				n, err := f.ReadAt(buf, max(0, off))
				s.bytes += n
				if err != io.EOF {
					note(err)
				}
			}
		default:
			s.others++
		}
	}
	_, err := fs.JournalInode()
	note(err)
	return s, errors.Join(errs...)
}

var errEnough = errors.New("enough")

// typed reports whether err, or each error joined in it, has one of the classes
// that this package promises.
func typed(err error) bool {
	if joined, ok := err.(interface{ Unwrap() []error }); ok && api.Code(err) == "internal" {
		for _, e := range joined.Unwrap() {
			if !typed(e) {
				return false
			}
		}
		return true
	}
	return errors.Is(err, api.ErrDamaged) || errors.Is(err, api.ErrUnsupported) || errors.Is(err, api.ErrExhausted)
}

// FuzzImage reads images with patches anywhere in them.
func FuzzImage(f *testing.F) {
	images := map[int][]byte{}
	for i, name := range baseImages {
		images[i] = loadImage(f, name)
		f.Add(uint8(i), []byte{})
		f.Add(uint8(i), encodePatch(1024+0x18, 6))                      // block size
		f.Add(uint8(i), encodePatch(1024+0x28, 0xff, 0xff, 0xff, 0xff)) // inodes per group
		f.Add(uint8(i), encodePatch(8<<10, bytes.Repeat([]byte{0xff}, 100)...))
		for block := uint32(2); block < 120; block += 5 {
			f.Add(uint8(i), encodePatch(block<<10+40, 0x0a, 0xf3, 1, 0, 4, 0, 1, 0, 0, 0, 0, 0, 30))
			f.Add(uint8(i), encodePatch(block<<10+4, 0, 0, 255))
		}
	}
	f.Fuzz(func(t *testing.T, base uint8, in []byte) {
		image := images[int(base)%len(baseImages)]
		dev := &patched{image, decodePatches(in, len(image))}
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		start := time.Now()
		fs, err := ext4.Open(ctx, dev, int64(len(image)))
		if err == nil {
			_, err = walkAll(ctx, fs)
		}
		if err != nil && !typed(err) {
			t.Errorf("an error without a class: %v", err)
		}
		if took := time.Since(start); took > 15*time.Second {
			t.Errorf("took %v", took)
		}
	})
}

// TestBaseImages keeps the fuzz target honest: unpatched, each image is read
// to its end without an error, and holds what make.sh put there.
func TestBaseImages(t *testing.T) {
	for _, name := range baseImages {
		t.Run(name, func(t *testing.T) {
			image := loadImage(t, name)
			fs, err := ext4.Open(t.Context(), bytes.NewReader(image), int64(len(image)))
			if err != nil {
				t.Fatal(err)
			}
			s, err := walkAll(t.Context(), fs)
			if err != nil {
				t.Error(err)
			}
			if s.files < 60 || s.links != 2 || s.others != 1 || s.dirs < 7 || s.bytes < 40_000 {
				t.Errorf("the walk saw only %+v", s)
			}
			if want := name == "dirty" || name == "dirty-csum"; fs.Replayed() != want {
				t.Errorf("replayed is %v, want %v", fs.Replayed(), want)
			}
		})
	}
}

// TestTruncated: an image that ends early is refused wherever it ends.
func TestTruncated(t *testing.T) {
	for _, name := range baseImages {
		image := loadImage(t, name)
		for size := 0; size < len(image); size += 1024 {
			if _, err := ext4.Open(t.Context(), bytes.NewReader(image), int64(size)); !typed(err) {
				t.Fatalf("%s of %d bytes: %v", name, size, err)
			}
			// The file is shorter than what it was when its size was taken.
			fs, err := ext4.Open(t.Context(), bytes.NewReader(image[:size]), int64(len(image)))
			if err == nil {
				_, err = walkAll(t.Context(), fs)
			}
			if err != nil && !typed(err) {
				t.Fatalf("%s cut to %d bytes: %v", name, size, err)
			}
		}
	}
}
