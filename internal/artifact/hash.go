package artifact

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
)

// hashBlock is the unit in which HashFile tells data from nothing.
const hashBlock = 64 << 10

// HashFile returns a hash of the file's content that costs only what the file
// really holds: an image of 8 GiB with 500 MB in it is read for 500 MB. It is
// the SHA-256, in hexadecimal, of every 64 KiB block that is not all zero, each
// behind its offset, and of the size at the end (both 8 bytes, little-endian).
// Whether zeros are stored or are holes makes no difference.
func HashFile(ctx context.Context, f *os.File) (string, error) {
	fi, err := f.Stat()
	if err != nil {
		return "", err
	}
	size := fi.Size()
	h := sha256.New()
	buf := make([]byte, 16*hashBlock)
	var word [8]byte
	for pos := int64(0); pos < size; {
		if err := ctx.Err(); err != nil {
			return "", err
		}
		data, err := unix.Seek(int(f.Fd()), pos, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // nothing but a hole up to the end
		}
		if err != nil {
			return "", fmt.Errorf("looking for data in %s: %w", f.Name(), err)
		}
		pos = data - data%hashBlock
		n, err := f.ReadAt(buf[:min(int64(len(buf)), size-pos)], pos)
		if err != nil && !errors.Is(err, io.EOF) {
			return "", err
		}
		if n == 0 {
			return "", fmt.Errorf("%s became shorter while it was read", f.Name())
		}
		for b := buf[:n]; len(b) > 0; {
			block := b[:min(hashBlock, len(b))]
			if !isZero(block) {
				binary.LittleEndian.PutUint64(word[:], uint64(pos))
				h.Write(word[:])
				h.Write(block)
			}
			pos += int64(len(block))
			b = b[len(block):]
		}
	}
	binary.LittleEndian.PutUint64(word[:], uint64(size))
	h.Write(word[:])
	return hex.EncodeToString(h.Sum(nil)), nil
}

// HashTree returns a digest of what lies at path: a regular file, or a directory
// with the regular files in it and below, by their names. It is made of
// HashFile's hashes. Anything else there is ErrDamaged.
func HashTree(ctx context.Context, path string) (string, error) {
	var files []File
	err := filepath.WalkDir(path, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if !d.Type().IsRegular() {
			return api.Errorf(api.ErrDamaged, "%s is no regular file", name)
		}
		f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		st, err := f.Stat()
		if err != nil {
			return err
		}
		sum, err := HashFile(ctx, f)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(path, name)
		files = append(files, File{Path: filepath.ToSlash(rel), Size: st.Size(), SHA256: sum})
		return err
	})
	if err != nil {
		return "", err
	}
	return digestOf(files), nil
}

var zeros [hashBlock]byte

func isZero(b []byte) bool { return bytes.Equal(b, zeros[:len(b)]) }

// digestOf returns the digest of a manifest with these files.
func digestOf(files []File) string {
	h := sha256.New()
	for _, f := range files {
		fmt.Fprintf(h, "%s %d %q\n", f.SHA256, f.Size, f.Path)
	}
	return "sha256:" + hex.EncodeToString(h.Sum(nil))
}

// stampOf reads the stamp and size of an open file.
func stampOf(f *os.File) (Stamp, int64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return Stamp{}, 0, fmt.Errorf("reading the state of %s: %w", f.Name(), err)
	}
	return Stamp{
		ModTimeNS:    st.Mtim.Nano(),
		ChangeTimeNS: st.Ctim.Nano(),
		Inode:        st.Ino,
	}, st.Size, nil
}
