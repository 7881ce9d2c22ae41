package seed

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"os"
	"slices"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/ext4image"
	"github.com/pyro-mcp/pyro/internal/manifest"
	"github.com/pyro-mcp/pyro/internal/workspacedisk"
)

// topPath is where in an image the files lie: /workspace of a guest, in the
// directory that a gVisor machine's layer is.
const topPath = workspacedisk.LayerDir + api.WorkspacePath

// A size is what an image has to hold.
type size struct {
	entries, blocks, bytes int64
}

const blockSize = 4096 // of package ext4image

func (s *size) add(it item) {
	s.entries++
	// A directory entry has 8 bytes, the name, and up to 3 for alignment. The
	// whole path is more than the name.
	s.bytes += 11 + int64(len(it.path))
	switch it.typ {
	case manifest.Directory:
		s.blocks++
	case manifest.Symlink:
		if it.size >= 60 { // kept in the inode below that
			s.blocks++
		}
	default:
		s.blocks += (it.size + blockSize - 1) / blockSize
	}
}

// diskBytes returns how large the file system must be, with some room for files
// that have grown when they are read, and how much of it is for content.
func (s *size) diskBytes() (disk, content int64, err error) {
	const slack = 4096 // blocks
	// The names, no block of which is less than nine tenths full; and extent
	// trees, one block for each 340 pieces of at most 128 MiB.
	blocks := s.blocks + s.bytes/(blockSize*9/10) + s.blocks/10_000 + slack + s.blocks/100
	disk, err = ext4image.SizeFor(s.entries+s.entries/100+100, blocks)
	return disk, (blocks + 2*s.entries/16) * blockSize, err
}

// An imageSink writes the image and the manifest.
type imageSink struct {
	image    *ext4image.Writer
	uid, gid uint32
	manifest *manifest.Writer
	times    hash.Hash
	file     *os.File
	// unflushed is how much was written since the last flush.
	unflushed int64
	// later keeps what does not come in the manifest's order.
	later  []described
	sorted bool
	links  map[string]described // files that a hard link can mean
}

const flushEvery = 64 << 20

type described struct {
	manifest.Entry
	mtime int64
}

func newImageSink(imageFile, manifestFile *os.File, disk, topTime int64, sorted bool, uid, gid uint32) (*imageSink, error) {
	opts := ext4image.Options{SizeBytes: disk, Label: "pyro-seed", Time: time.Unix(0, topTime)}
	if _, err := rand.Read(opts.UUID[:]); err != nil {
		return nil, err
	}
	// RFC 9562, 5.4: version 4, variant 1.
	opts.UUID[6] = opts.UUID[6]&0x0f | 0x40
	opts.UUID[8] = opts.UUID[8]&0x3f | 0x80
	image, err := ext4image.New(imageFile, opts)
	if err != nil {
		return nil, err
	}
	s := &imageSink{image: image, uid: uid, gid: gid, manifest: manifest.NewWriter(manifestFile), times: sha256.New(), sorted: sorted, file: imageFile, links: map[string]described{}}
	s.time(topTime)
	// The first stands for the guest's root directory, which is root's.
	layer := ext4image.Entry{Path: workspacedisk.LayerDir, Mode: ext4image.ModeDir | 0o755, ModTime: time.Unix(0, topTime)}
	top := layer
	top.Path, top.UID, top.GID = topPath, uid, gid
	if err := errors.Join(image.Add(layer, nil), image.Add(top, nil)); err != nil {
		return nil, err
	}
	return s, nil
}

func (s *imageSink) time(ns int64) {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], uint64(ns))
	s.times.Write(b[:])
}

func (s *imageSink) put(it item, c *content) error {
	e := ext4image.Entry{Path: topPath + "/" + it.path, Mode: uint16(it.mode), UID: s.uid, GID: s.gid, ModTime: time.Unix(0, it.mtime)}
	d := described{manifest.Entry{Path: it.path, Type: it.typ, Mode: it.mode, Size: it.size}, it.mtime}
	switch it.typ {
	case manifest.Directory:
		e.Mode |= ext4image.ModeDir
		d.Size = 0
	case manifest.Symlink:
		e.Mode |= ext4image.ModeSymlink
		e.Target, d.Target = it.target, it.target
	default:
		e.Mode |= ext4image.ModeFile
		e.Size = it.size
	}
	var err error
	if c == nil {
		err = s.image.Add(e, nil)
	} else {
		err = s.image.Add(e, c)
		d.SHA256 = c.hash()
	}
	if s.unflushed += d.Size; s.unflushed >= flushEvery {
		s.unflushed = 0
		flush(s.file)
	}
	if err == nil && c != nil && c.failed != nil {
		return s.image.Remove(e.Path)
	}
	if errors.Is(err, api.ErrExhausted) {
		// The size was measured, with some room.
		return api.WithHint(api.Errorf(api.ErrBusy, "the files have grown too much while they were read"), "try again when nothing writes to them")
	}
	if err != nil {
		return err
	}
	return s.describe(d)
}

// link makes path another name of the file at target, which put has added.
func (s *imageSink) link(path, target string, _ item) error {
	of, ok := s.links[target]
	if !ok {
		return api.Errorf(api.ErrInternal, "%.200q is linked before it is there", target)
	}
	if err := s.image.Link(topPath+"/"+path, topPath+"/"+target); err != nil {
		return err
	}
	of.Path = path
	return s.describe(of)
}

func (s *imageSink) describe(d described) error {
	if !s.sorted && d.Type == manifest.File {
		s.links[d.Path] = d
	}
	if !s.sorted {
		s.later = append(s.later, d)
		return nil
	}
	s.time(d.mtime)
	return s.manifest.Add(d.Entry)
}

// close finishes both files and returns the seed's digest.
func (s *imageSink) close() (digest string, err error) {
	slices.SortFunc(s.later, func(a, b described) int { return manifest.ComparePaths(a.Path, b.Path) })
	for _, d := range s.later {
		s.time(d.mtime)
		if err := s.manifest.Add(d.Entry); err != nil {
			return "", err
		}
	}
	if err := s.image.Close(); err != nil {
		return "", err
	}
	sum, err := s.manifest.Close()
	if err != nil {
		return "", err
	}
	h := sha256.New()
	h.Write([]byte("pyro seed 1\n"))
	if s.uid != 0 || s.gid != 0 {
		fmt.Fprintf(h, "owner %d:%d\n", s.uid, s.gid)
	}
	h.Write(sum[:])
	h.Write(s.times.Sum(nil))
	return "sha256:" + hex.EncodeToString(h.Sum(nil)), nil
}
