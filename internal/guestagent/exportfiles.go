package guestagent

import (
	"bytes"
	"context"
	"fmt"
	"io"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/archive"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// exportFiles packs the entries that the caller lists.
func (q *request) exportFiles(ctx context.Context, line []byte) error {
	var req guestproto.ExportFilesRequest
	if err := decodeRequest(line, &req, "path"); err != nil {
		return err
	}
	if err := q.streamOnly(guestproto.ActionExportFiles); err != nil {
		return err
	}
	p, err := q.server.openPlace(req.Path)
	if err != nil {
		return err
	}
	defer p.close()
	top, err := p.openDirectory()
	if err != nil {
		return fmt.Errorf("packing files: %w", err)
	}
	defer top.release()
	list, err := readList(&dataReader{fr: guestproto.NewFrameReader(q.r)})
	if err != nil {
		return fmt.Errorf("packing files: reading their list: %w", err)
	}
	ctx, unheed := q.heedHangUp(ctx)
	w := &dataWriter{q: q, buf: make([]byte, 0, outputChunk)}
	names := func(yield func(string) bool) {
		for name := range bytes.SplitSeq(list, []byte{0}) {
			if len(name) > 0 && !yield(string(name)) {
				return
			}
		}
	}
	res, err := archive.WriteList(ctx, top.openRoot, names, w, archive.Limits{Entries: guestproto.MaxFileEntries})
	hungUp := ctx.Err() != nil
	unheed()
	if hungUp || w.failed {
		return q.sent(errGone)
	}
	if err != nil {
		return fmt.Errorf("packing files: %w", err)
	}
	if err := q.endData(w); err != nil {
		return err
	}
	return q.reply(guestproto.ExportFilesReply{
		ArchiveSize: w.total, EntryCount: res.Entries, BytesWritten: res.Bytes, MissingCount: res.SkippedCount,
	})
}

// readList reads paths, each with a NUL behind it, and checks them all before
// anything is sent.
func readList(r io.Reader) ([]byte, error) {
	list, err := io.ReadAll(io.LimitReader(r, guestproto.MaxExportList+1))
	if err != nil {
		return nil, err
	}
	if len(list) > guestproto.MaxExportList {
		return nil, api.Errorf(api.ErrExhausted, "it has more than %d bytes", guestproto.MaxExportList)
	}
	if len(list) > 0 && list[len(list)-1] != 0 {
		return nil, api.Errorf(api.ErrInvalid, "its last path has no end")
	}
	if n := bytes.Count(list, []byte{0}); n > guestproto.MaxFileEntries {
		return nil, api.Errorf(api.ErrExhausted, "it has %d paths, the limit is %d", n, guestproto.MaxFileEntries)
	}
	for rest := list; len(rest) > 0; {
		name, after, _ := bytes.Cut(rest, []byte{0})
		p := guestproto.Path(name)
		if local, err := p.Local(); err != nil {
			return nil, err
		} else if local != p {
			return nil, api.Errorf(api.ErrInvalid, "the path %q is not in its shortest form", p)
		}
		rest = after
	}
	return list, nil
}
