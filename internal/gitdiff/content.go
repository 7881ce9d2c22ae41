package gitdiff

import (
	"bytes"
	"context"
	"crypto/sha1" //nolint:gosec // Git names blobs so
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"strings"
	"unicode/utf8"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/manifest"
)

// A blob is one side of a change, as Git sees it.
type blob struct {
	mode string // "" for nothing
	id   string // Git's name for the content, in full
	size int64
	// text is the content, if it is text and short enough.
	text   []byte
	binary bool
}

// noID is the id of nothing.
var noID = strings.Repeat("0", 40)

func modeOf(e *manifest.Entry) string {
	switch {
	case e == nil || e.Type == manifest.Directory:
		return ""
	case e.Type == manifest.Symlink:
		return "120000"
	case e.Executable():
		return "100755"
	}
	return "100644"
}

// reader opens what e holds.
func reader(ctx context.Context, open Content, e *manifest.Entry) (io.ReadCloser, error) {
	if e.Type == manifest.Symlink {
		return io.NopCloser(strings.NewReader(e.Target)), nil
	}
	if e.Size == 0 {
		return io.NopCloser(strings.NewReader("")), nil
	}
	r, err := open(ctx, e.Path)
	if err != nil {
		return nil, err
	}
	return &checked{ctx: ctx, ReadCloser: r, e: e, left: e.Size}, nil
}

// A checked reader yields what its manifest entry says, or ErrBusy.
type checked struct {
	io.ReadCloser
	ctx  context.Context
	e    *manifest.Entry
	left int64
	hash hash.Hash
}

func (c *checked) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	if c.hash == nil {
		c.hash = sha256.New()
	}
	n, err := c.ReadCloser.Read(p)
	c.hash.Write(p[:n])
	c.left -= int64(n)
	if c.left < 0 || errors.Is(err, io.EOF) && (c.left != 0 || !bytes.Equal(c.hash.Sum(nil), c.e.SHA256[:])) {
		return 0, api.WithHint(api.Errorf(api.ErrBusy, "it changed while it was read"), "try again when nothing writes to it")
	}
	return n, err
}

// load reads one side: to the end for its id, into memory where it may be text.
func load(ctx context.Context, open Content, e *manifest.Entry, maxText int64) (b blob, err error) {
	b = blob{mode: modeOf(e), id: noID}
	if b.mode == "" {
		return b, nil
	}
	b.size = e.Size
	r, err := reader(ctx, open, e)
	if err != nil {
		return b, err
	}
	defer r.Close()
	h := sha1.New()
	fmt.Fprintf(h, "blob %d\x00", e.Size)
	src := io.TeeReader(r, h)
	b.binary = true
	if e.Size <= maxText {
		b.text = make([]byte, 0, e.Size+bytes.MinRead) // so that it need not grow
		buf := bytes.NewBuffer(b.text)
		if _, err := buf.ReadFrom(io.LimitReader(src, e.Size+1)); err != nil {
			return b, err
		}
		if b.text = buf.Bytes(); isText(b.text) {
			b.binary = false
		} else {
			b.text = nil
		}
	}
	if _, err := io.Copy(io.Discard, src); err != nil {
		return b, err
	}
	b.id = hex.EncodeToString(h.Sum(nil))
	return b, nil
}

// maxLines bounds the memory of a line diff, about 100 bytes for each.
const maxLines = 500_000

func isText(b []byte) bool {
	return bytes.IndexByte(b, 0) < 0 && utf8.Valid(b) && bytes.Count(b, []byte("\n")) <= maxLines
}
