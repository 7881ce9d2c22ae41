package jbd2_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/workspacedisk/jbd2"
)

const (
	blockSize = 1024
	fsBlocks  = 4096
)

// A log builds a journal block by block, without checksums unless said.
type log struct {
	blocks [][]byte
}

// newLog returns a log of n blocks whose oldest transaction 7 is at start.
func newLog(n, start uint32, incompat uint32) *log {
	l := &log{blocks: make([][]byte, n)}
	for i := range l.blocks {
		l.blocks[i] = make([]byte, blockSize)
	}
	be := binary.BigEndian
	sb := l.blocks[0]
	header(sb, 4, 0)
	be.PutUint32(sb[12:], blockSize)
	be.PutUint32(sb[16:], n)
	be.PutUint32(sb[20:], 1)
	be.PutUint32(sb[24:], 7)
	be.PutUint32(sb[28:], start)
	be.PutUint32(sb[40:], incompat)
	return l
}

func header(b []byte, kind, sequence uint32) {
	binary.BigEndian.PutUint32(b, 0xC03B3998)
	binary.BigEndian.PutUint32(b[4:], kind)
	binary.BigEndian.PutUint32(b[8:], sequence)
}

// descriptor announces the blocks whose copies follow.
func (l *log) descriptor(at int, sequence uint32, escape bool, blocks ...uint32) {
	b := l.blocks[at]
	header(b, 1, sequence)
	be := binary.BigEndian
	pos := 12
	for i, n := range blocks {
		be.PutUint32(b[pos:], n)
		flags := uint16(2) // same UUID
		if escape {
			flags |= 1
		}
		if i == len(blocks)-1 {
			flags |= 8
		}
		be.PutUint16(b[pos+6:], flags)
		pos += 8
	}
}

func (l *log) commit(at int, sequence uint32) { header(l.blocks[at], 2, sequence) }

func (l *log) revoke(at int, sequence uint32, blocks ...uint32) {
	b := l.blocks[at]
	header(b, 5, sequence)
	binary.BigEndian.PutUint32(b[12:], uint32(16+4*len(blocks)))
	for i, n := range blocks {
		binary.BigEndian.PutUint32(b[16+4*i:], n)
	}
}

func (l *log) fill(at int, c byte) {
	for i := range l.blocks[at] {
		l.blocks[at][i] = c
	}
}

func (l *log) bytes() []byte { return bytes.Join(l.blocks, nil) }

func replay(l *log) (*jbd2.Overlay, error) {
	data := l.bytes()
	base := bytes.NewReader(make([]byte, fsBlocks*blockSize))
	return jbd2.Replay(context.Background(), base, bytes.NewReader(data), int64(len(data)), blockSize, fsBlocks)
}

// firstByte is the first byte of a block after the replay.
func firstByte(t *testing.T, o *jbd2.Overlay, block int64) byte {
	t.Helper()
	var b [1]byte
	if _, err := o.ReadAt(b[:], block*blockSize); err != nil {
		t.Fatal(err)
	}
	return b[0]
}

func TestReplay(t *testing.T) {
	const incompatRevoke = 1
	tests := []struct {
		name  string
		build func() *log
		want  map[int64]byte
		all   int // blocks that the journal changes
	}{
		{"an empty journal", func() *log { return newLog(16, 0, 0) }, map[int64]byte{5: 0}, 0},
		{"one transaction", func() *log {
			l := newLog(16, 1, 0)
			l.descriptor(1, 7, false, 5, 9)
			l.fill(2, 'a')
			l.fill(3, 'b')
			l.commit(4, 7)
			return l
		}, map[int64]byte{5: 'a', 9: 'b', 4: 0, 6: 0}, 2},
		{"the newest copy wins", func() *log {
			l := newLog(16, 1, 0)
			l.descriptor(1, 7, false, 5)
			l.fill(2, 'a')
			l.commit(3, 7)
			l.descriptor(4, 8, false, 5)
			l.fill(5, 'b')
			l.commit(6, 8)
			return l
		}, map[int64]byte{5: 'b'}, 1},
		{"without a commit it never happened", func() *log {
			l := newLog(16, 1, 0)
			l.descriptor(1, 7, false, 5)
			l.fill(2, 'a')
			l.commit(3, 7)
			l.descriptor(4, 8, false, 5)
			l.fill(5, 'b')
			return l
		}, map[int64]byte{5: 'a'}, 1},
		{"an older life of the log is not replayed", func() *log {
			l := newLog(16, 1, 0)
			l.descriptor(1, 6, false, 5)
			l.fill(2, 'a')
			l.commit(3, 6)
			return l
		}, map[int64]byte{5: 0}, 0},
		{"around the end", func() *log {
			l := newLog(8, 6, 0)
			l.descriptor(6, 7, false, 5, 9, 11)
			l.fill(7, 'a')
			l.fill(1, 'b')
			l.fill(2, 'c')
			l.commit(3, 7)
			return l
		}, map[int64]byte{5: 'a', 9: 'b', 11: 'c'}, 3},
		{"revoked copies are not replayed, later ones are", func() *log {
			l := newLog(16, 1, incompatRevoke)
			l.descriptor(1, 7, false, 5, 9)
			l.fill(2, 'a')
			l.fill(3, 'b')
			l.commit(4, 7)
			l.revoke(5, 8, 5, 9)
			l.commit(6, 8)
			l.descriptor(7, 9, false, 9)
			l.fill(8, 'c')
			l.commit(9, 9)
			return l
		}, map[int64]byte{5: 0, 9: 'c'}, 1},
		{"an escaped copy gets its magic number back", func() *log {
			l := newLog(16, 1, 0)
			l.descriptor(1, 7, true, 5)
			l.fill(2, 0)
			l.commit(3, 7)
			return l
		}, map[int64]byte{5: 0xC0}, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			o, err := replay(tt.build())
			if err != nil {
				t.Fatal(err)
			}
			for block, want := range tt.want {
				if got := firstByte(t, o, block); got != want {
					t.Errorf("block %d begins with %q, want %q", block, got, want)
				}
			}
			if o.Blocks() != tt.all {
				t.Errorf("the journal changes %d blocks, want %d", o.Blocks(), tt.all)
			}
		})
	}
}

func TestRefused(t *testing.T) {
	change := func(off int, v uint32) func() *log {
		return func() *log {
			l := newLog(16, 1, 0)
			binary.BigEndian.PutUint32(l.blocks[0][off:], v)
			return l
		}
	}
	tests := []struct {
		name  string
		build func() *log
		class error
	}{
		{"no magic number", change(0, 1), api.ErrDamaged},
		{"another block size", change(12, 4096), api.ErrDamaged},
		{"longer than its file", change(16, 17), api.ErrDamaged},
		{"endless", change(16, ^uint32(0)), api.ErrDamaged},
		{"log at its superblock", change(20, 0), api.ErrDamaged},
		{"start past the end", change(28, 16), api.ErrDamaged},
		{"fast commits", change(40, 0x20), api.ErrUnsupported},
		{"asynchronous commits", change(40, 0x4), api.ErrUnsupported},
		{"old checksums", change(36, 0x1), api.ErrUnsupported},
		{"two kinds of checksums", change(40, 0x18), api.ErrDamaged},
		{"a block outside of the filesystem", func() *log {
			l := newLog(16, 1, 0)
			l.descriptor(1, 7, false, fsBlocks)
			l.commit(3, 7)
			return l
		}, api.ErrDamaged},
		{"a revocation block that lies about its size", func() *log {
			l := newLog(16, 1, 1)
			l.revoke(1, 7, 5)
			binary.BigEndian.PutUint32(l.blocks[1][12:], blockSize+4)
			l.commit(2, 7)
			return l
		}, api.ErrDamaged},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := replay(tt.build()); !errors.Is(err, tt.class) {
				t.Errorf("got %v, want class %q", err, api.Code(tt.class))
			}
		})
	}
}

// TestEndlessLog: blocks of one transaction all around the log and no commit.
func TestEndlessLog(t *testing.T) {
	l := newLog(64, 1, 1)
	for i := 1; i < 64; i++ {
		l.revoke(i, 7, 5)
	}
	o, err := replay(l)
	if err != nil || o.Blocks() != 0 {
		t.Errorf("got %v, %v", o, err)
	}
}

// TestDamagedCopy flips a bit in each block of a journal with checksums: the
// result is an error or an earlier state, never a changed copy.
func TestDamagedCopy(t *testing.T) {
	data := load(t, "dirty-csum")
	base := bytes.NewReader(make([]byte, fsBlocks*blockSize))
	open := func() (*jbd2.Overlay, error) {
		return jbd2.Replay(t.Context(), base, bytes.NewReader(data), int64(len(data)), blockSize, fsBlocks)
	}
	fixSize(data)
	good, err := open()
	if err != nil {
		t.Fatal(err)
	}
	if good.Blocks() < 5 {
		t.Fatalf("the journal changes %d blocks only", good.Blocks())
	}
	refused, shorter := 0, 0
	for block := 1; block < 19; block++ {
		data[block*blockSize+100] ^= 0x10
		o, err := open()
		switch {
		case errors.Is(err, api.ErrDamaged):
			refused++
		case err == nil && o.Blocks() < good.Blocks():
			shorter++
		default:
			t.Errorf("block %d is damaged: %v", block, err)
		}
		data[block*blockSize+100] ^= 0x10
	}
	if refused == 0 || shorter == 0 {
		t.Errorf("%d refused, %d shorter", refused, shorter)
	}
}

func load(t testing.TB, name string) []byte {
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

// fixSize makes the superblock of a journal say its cut length, and sets its
// checksum again if it has one.
func fixSize(data []byte) {
	be := binary.BigEndian
	be.PutUint32(data[16:], uint32(len(data)/blockSize))
	if be.Uint32(data[40:])&0x18 != 0 {
		be.PutUint32(data[0xFC:], 0)
		be.PutUint32(data[0xFC:], ^crc32.Checksum(data[:1024], crc32.MakeTable(crc32.Castagnoli)))
	}
}

// patch overwrites places of data: the input is four bytes of offset, one of
// length, and the bytes, again and again. Small inputs keep the fuzzer quick.
func patch(data, in []byte) []byte {
	out := bytes.Clone(data)
	for len(in) > 5 {
		off, n := int(binary.LittleEndian.Uint32(in)%uint32(len(out))), int(in[4])
		in = in[5:]
		n = min(n, len(in))
		copy(out[off:], in[:n])
		in = in[n:]
	}
	return out
}

func encodePatch(off uint32, data ...byte) []byte {
	out := binary.LittleEndian.AppendUint32(nil, off)
	return append(append(out, byte(len(data))), data...)
}

// FuzzReplay replays journals with patches anywhere in them. The checksum of a
// patched superblock is set anew, so that the rest is looked at, too.
func FuzzReplay(f *testing.F) {
	var bases [][]byte
	for _, name := range []string{"dirty", "dirty-csum"} {
		data := load(f, name)[:40*blockSize]
		fixSize(data)
		bases = append(bases, data)
	}
	l := newLog(8, 6, 1)
	l.descriptor(6, 7, true, 5, 9)
	l.revoke(2, 7, 9)
	l.commit(3, 7)
	bases = append(bases, l.bytes())
	for i, data := range bases {
		f.Add(uint8(i), []byte{})
		for at := uint32(12); at < 84; at += 4 { // fields of the superblock
			f.Add(uint8(i), encodePatch(at, 0, 0, 0, 3))
		}
		for at := uint32(blockSize); at < uint32(len(data)); at += blockSize { // headers and tags
			f.Add(uint8(i), encodePatch(at, 0xC0, 0x3B, 0x39, 0x98, 0, 0, 0, 5, 0, 0, 0, 2, 0, 0, 0, 200))
			f.Add(uint8(i), encodePatch(at+12, 0, 0, 0, 1, 0, 0, 0, 2))
		}
	}
	base := bytes.NewReader(make([]byte, fsBlocks*blockSize))
	buf := make([]byte, 8*blockSize)
	f.Fuzz(func(t *testing.T, which uint8, in []byte) {
		data := patch(bases[int(which)%len(bases)], in)
		if be := binary.BigEndian; be.Uint32(data[40:])&0x18 != 0 {
			be.PutUint32(data[0xFC:], 0)
			be.PutUint32(data[0xFC:], ^crc32.Checksum(data[:1024], crc32.MakeTable(crc32.Castagnoli)))
		}
		start := time.Now()
		o, err := jbd2.Replay(context.Background(), base, bytes.NewReader(data), int64(len(data)), blockSize, fsBlocks)
		if err != nil {
			if !errors.Is(err, api.ErrDamaged) && !errors.Is(err, api.ErrUnsupported) {
				t.Errorf("an error without a class: %v", err)
			}
			return
		}
		if o.Blocks() > len(data)/blockSize {
			t.Errorf("%d blocks from a journal of %d", o.Blocks(), len(data)/blockSize)
		}
		for off := int64(0); off < fsBlocks*blockSize; off += 97 * blockSize {
			if _, err := o.ReadAt(buf, off+3); err != nil && err != io.EOF {
				t.Errorf("reading the overlay: %v", err)
			}
		}
		if took := time.Since(start); took > 30*time.Second {
			t.Errorf("took %v", took)
		}
	})
}
