package oci

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/pyro-mcp/pyro/api"
)

// An unpacker reads a layer's archive and checks both its packed and its
// unpacked bytes, when it has come to their end.
type unpacker struct {
	layer layer

	packed     io.Reader // what was not read of the packed bytes
	packedHash hash.Hash
	packedSize int64

	archive     io.Reader // unpacked
	archiveHash hash.Hash
	left        int64 // how much of the archive may still come

	close func()
}

// maxWindow bounds what zstd keeps in memory, at the largest that its own
// program accepts unasked.
const maxWindow = 128 << 20

// The first bytes of compressed data: RFC 1952 section 2.3.1, RFC 8878 section
// 3.1.1.
var (
	gzipMagic = []byte{0x1f, 0x8b}
	zstdMagic = []byte{0x28, 0xb5, 0x2f, 0xfd}
)

// newUnpacker begins with the layer's packed bytes in r. At most limit bytes of
// archive come out of it. The caller calls close.
func newUnpacker(r io.Reader, l layer, limit int64) (*unpacker, error) {
	u := &unpacker{layer: l, packedHash: sha256.New(), archiveHash: sha256.New(), left: limit, close: func() {}}
	// One byte more than it should have is enough to tell.
	packed := bufio.NewReaderSize(&counted{io.TeeReader(io.LimitReader(r, l.size+1), u.packedHash), &u.packedSize}, 256<<10)
	u.packed, u.archive = packed, packed
	magic, err := packed.Peek(4)
	if err != nil && err != io.EOF {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(magic, gzipMagic):
		z, err := gzip.NewReader(packed)
		if err != nil {
			return nil, unreadable(err)
		}
		u.archive = z
	case bytes.Equal(magic, zstdMagic):
		z, err := zstd.NewReader(packed, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, unreadable(err)
		}
		u.archive, u.close = z, z.Close
	}
	return u, nil
}

func unreadable(err error) error {
	return api.Errorf(api.ErrDamaged, "unpacking it: %w", err)
}

// Read gives the archive's bytes.
func (u *unpacker) Read(p []byte) (int, error) {
	n, err := u.archive.Read(p)
	u.archiveHash.Write(p[:n])
	if u.left -= int64(n); u.left < 0 {
		return 0, api.Errorf(api.ErrExhausted, "the image's layers, unpacked, are larger than allowed")
	}
	if err != nil && err != io.EOF {
		err = unreadable(err)
	}
	return n, err
}

// finish reads the rest and reports whether all was what it should be.
func (u *unpacker) finish() error {
	if _, err := io.Copy(io.Discard, u); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, u.packed); err != nil {
		return err
	}
	if u.packedSize != u.layer.size || u.layer.digest.Hex != "" && hex.EncodeToString(u.packedHash.Sum(nil)) != u.layer.digest.Hex {
		return api.Errorf(api.ErrDamaged, "it is not the layer %s of %d bytes that the manifest names", u.layer.digest, u.layer.size)
	}
	if got := hex.EncodeToString(u.archiveHash.Sum(nil)); got != u.layer.diffID.Hex {
		return api.Errorf(api.ErrDamaged, "its archive has the digest sha256:%s and not %s, as the image's configuration says", got, u.layer.diffID)
	}
	return nil
}

// counted counts what is read.
type counted struct {
	io.Reader
	n *int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	*c.n += int64(n)
	return n, err
}

// inLayer says in which layer something happened.
func inLayer(ctx context.Context, i, n int, err error) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return fmt.Errorf("layer %d of %d: %w", i+1, n, err)
}
