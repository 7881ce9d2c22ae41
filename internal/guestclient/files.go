package guestclient

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"strings"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/manifest"
)

// filesProtocol is the version of the protocol that has the file tools.
const filesProtocol = 2

func fileRequest(action string) guestproto.Envelope {
	return guestproto.Envelope{Action: action, Stream: true, Version: filesProtocol}
}

// Flush writes back all file systems of the guest. When it returns, what the
// guest had written before is on its disks.
func (c *Client) Flush(ctx context.Context) error {
	req := struct {
		guestproto.Envelope
	}{fileRequest(guestproto.ActionFlush)}
	_, err := upload(ctx, c, "flushing the guest's disks", req, func(*link) error { return nil },
		resultOf(func(*guestproto.FlushReply) error { return nil }))
	return err
}

// Manifest calls fn for every entry below path, "" for /workspace, in the order
// of [manifest.ComparePaths]. Each entry's parent came before it as a
// directory, and none comes twice. The counts of the result are the guest's
// claims, but its EntryCount is how often fn was called. An error of fn ends it
// and is returned; what fn saw before an error is to be thrown away.
func (c *Client) Manifest(ctx context.Context, path string, fn func(guestproto.ManifestEntry) error) (guestproto.ManifestResult, error) {
	req := guestproto.ManifestRequest{Envelope: fileRequest(guestproto.ActionManifest), Path: guestproto.Path(path)}
	var last guestproto.ManifestEntry
	var r guestproto.ManifestResult
	lines := &lineSink{fn: func(line []byte) error {
		var e guestproto.ManifestEntry
		if err := guestproto.Decode(line, &e, "path", "type", "mode"); err != nil {
			return fmt.Errorf("reading an entry: %w", err)
		}
		if err := e.Check(); err != nil {
			return err
		}
		if manifest.ComparePaths(string(last.Path), string(e.Path)) >= 0 || !follows(&last, e.Path) {
			return api.Errorf(api.ErrDamaged, "the guest sends the entry %q out of order", clip(e.Path))
		}
		last = e
		return ownError(fn(e))
	}}
	err := c.download(ctx, "reading the manifest of the guest's files", req, func(l *link) error {
		// The guest may read one large file for long before it says more.
		if err := receiveData(newFrames(l), 0, lines.take, &r, "entry_count"); err != nil {
			return err
		}
		if err := lines.end(r.EntryCount); err != nil {
			return err
		}
		if r.ByteCount < 0 || r.SkippedCount < 0 || r.ErrorCount < 0 {
			return api.Errorf(api.ErrDamaged, "the guest reports the counts %+v", r)
		}
		return nil
	})
	if err != nil {
		return guestproto.ManifestResult{}, err
	}
	return r, nil
}

// follows reports whether p's parent is last, if that is a directory, or one of
// the directories that last lies in.
func follows(last *guestproto.ManifestEntry, p guestproto.Path) bool {
	i := strings.LastIndexByte(string(p), '/')
	if i < 0 {
		return true
	}
	parent := p[:i]
	if parent == last.Path {
		return last.Type == guestproto.TypeDirectory
	}
	return strings.HasPrefix(string(last.Path), string(parent)+"/")
}

// ListFiles calls fn for the entries of the directory path, or recursively
// below it, sorted by the bytes of their paths; for a file or symlink it is that
// one entry. None comes twice. An error of fn ends it and is returned.
func (c *Client) ListFiles(ctx context.Context, path string, recursive bool, fn func(guestproto.FileEntry) error) (guestproto.ListFilesResult, error) {
	const doing = "listing files of the guest"
	dir, err := guestproto.WorkspacePath(guestproto.Path(path))
	if err != nil {
		return guestproto.ListFilesResult{}, fmt.Errorf("%s: %w", doing, err)
	}
	req := guestproto.ListFilesRequest{Envelope: fileRequest(guestproto.ActionListFiles), Path: dir, Recursive: recursive}
	var last guestproto.Path
	var r guestproto.ListFilesResult
	lines := &lineSink{fn: func(line []byte) error {
		var e guestproto.FileEntry
		if err := guestproto.Decode(line, &e, "path", "artifact_type"); err != nil {
			return fmt.Errorf("reading an entry: %w", err)
		}
		if err := e.Check(dir, recursive); err != nil {
			return err
		}
		// What was asked for is the one entry or none.
		if last >= e.Path || last == dir {
			return api.Errorf(api.ErrDamaged, "the guest lists %q out of order", clip(e.Path))
		}
		last = e.Path
		return ownError(fn(e))
	}}
	err = c.download(ctx, doing, req, func(l *link) error {
		if err := receiveData(newFrames(l), l.patience, lines.take, &r, "entry_count"); err != nil {
			return err
		}
		if r.SkippedCount < 0 {
			return api.Errorf(api.ErrDamaged, "the guest reports the counts %+v", r)
		}
		return lines.end(r.EntryCount)
	})
	if err != nil {
		return guestproto.ListFilesResult{}, err
	}
	return r, nil
}

// ReadFile writes at most maxBytes bytes of the regular file path to w, from
// offset on. The size in the reply is the guest's claim. What was written to w
// before an error is to be thrown away.
func (c *Client) ReadFile(ctx context.Context, path string, offset, maxBytes int64, w io.Writer) (guestproto.ReadFileReply, error) {
	const doing = "reading a file of the guest"
	if maxBytes <= 0 {
		return guestproto.ReadFileReply{}, api.Errorf(api.ErrInvalid, "%s: max_bytes must be positive", doing)
	}
	req := guestproto.ReadFileRequest{Envelope: fileRequest(guestproto.ActionReadFile), Path: guestproto.Path(path), Offset: offset, MaxBytes: maxBytes}
	var r guestproto.ReadFileReply
	err := c.download(ctx, doing, req, func(l *link) error {
		fr := newFrames(l)
		var head guestproto.FileHeader
		if err := receiveHeader(fr, l.patience, &head, "path", "size_bytes"); err != nil {
			return err
		}
		var total int64
		pace := newPace(l)
		err := receiveData(fr, l.patience, func(p []byte) error {
			if total += int64(len(p)); total > maxBytes {
				return api.Errorf(api.ErrDamaged, "the guest sends more than the %d bytes that were asked for", maxBytes)
			}
			return pace.write(w, p)
		}, &r, "size_bytes", "truncated")
		if err == nil && (r.SizeBytes < 0 || head.SizeBytes < 0) {
			return api.Errorf(api.ErrDamaged, "the guest reports a file of %d bytes", min(r.SizeBytes, head.SizeBytes))
		}
		return err
	})
	if err != nil {
		return guestproto.ReadFileReply{}, err
	}
	return r, nil
}

// WriteFile writes what r yields to the file req.Path of the guest, which
// appears whole or not at all.
func (c *Client) WriteFile(ctx context.Context, req guestproto.WriteFileRequest, r io.Reader) (guestproto.WriteFileReply, error) {
	req.Envelope = fileRequest(guestproto.ActionWriteFile)
	return upload(ctx, c, "writing a file of the guest", req, sendData(r),
		resultOf((*guestproto.WriteFileReply).Check, "path", "bytes_written", "created"))
}

// Sync unpacks the tar or tar.gz that archive yields over req.Destination and
// takes req.Remove away, all of it or nothing. What it reports survives a crash
// of the guest.
func (c *Client) Sync(ctx context.Context, req guestproto.SyncRequest, archive io.Reader) (guestproto.SyncReply, error) {
	req.Envelope = fileRequest(guestproto.ActionSync)
	return upload(ctx, c, "syncing files into the guest", req, sendData(archive),
		resultOf((*guestproto.SyncReply).Check, "destination", "entry_count", "bytes_written", "removed_count"))
}

// ExportFiles writes a tar of the entries that paths yields, which are relative
// to path, to w. Links are kept as links; a directory is one entry without its
// content. The archive's content and the counts are the guest's claims. What
// was written to w before an error is to be thrown away.
func (c *Client) ExportFiles(ctx context.Context, path string, paths iter.Seq[string], w io.Writer) (guestproto.ExportFilesReply, error) {
	const doing = "fetching files of the guest"
	req := guestproto.ExportFilesRequest{Envelope: fileRequest(guestproto.ActionExportFiles), Path: guestproto.Path(path)}
	var r guestproto.ExportFilesReply
	var asked int64
	err := c.download(ctx, doing, req, func(l *link) error {
		n, sendErr := sendPaths(l, paths)
		asked = n
		if sendErr != nil && !hungUp(sendErr) {
			return sendErr
		}
		// A guest that hung up in the middle has said why.
		var total int64
		pace := newPace(l)
		err := receiveData(newFrames(l), l.patience, func(p []byte) error {
			if total += int64(len(p)); total > c.opts.MaxArchive {
				return api.Errorf(api.ErrExhausted, "the guest's archive is longer than the limit of %d bytes", c.opts.MaxArchive)
			}
			return pace.write(w, p)
		}, &r, "archive_size", "entry_count", "bytes_written", "missing_count")
		if err != nil {
			return err
		}
		if err := r.Check(); err != nil {
			return err
		}
		if sendErr != nil || r.ArchiveSize != total || r.EntryCount > asked || r.MissingCount != asked-r.EntryCount {
			return api.Errorf(api.ErrDamaged, "the guest was asked for %d files, sent %d bytes, and reports %+v", asked, total, r)
		}
		return nil
	})
	if err != nil {
		return guestproto.ExportFilesReply{}, err
	}
	return r, nil
}

// sendPaths sends the list of export_files and returns how many paths it had.
func sendPaths(l *link, paths iter.Seq[string]) (int64, error) {
	var count, total int64
	buf := make([]byte, 0, 32<<10)
	send := func(t guestproto.FrameType) error {
		_ = l.conn.SetWriteDeadline(time.Now().Add(l.patience))
		err := guestproto.WriteFrame(l.conn, t, buf)
		buf = buf[:0]
		return err
	}
	for p := range paths {
		local, err := guestproto.Path(p).Local()
		if err != nil {
			return count, err
		}
		count++
		if total += int64(len(local)) + 1; count > guestproto.MaxFileEntries || total > guestproto.MaxExportList {
			return count, api.Errorf(api.ErrExhausted, "the list has more than %d paths or %d bytes", guestproto.MaxFileEntries, guestproto.MaxExportList)
		}
		if len(buf)+len(local)+1 > cap(buf) {
			if err := send(guestproto.FrameData); err != nil {
				return count, err
			}
		}
		buf = append(append(buf, local...), 0)
	}
	if len(buf) > 0 {
		if err := send(guestproto.FrameData); err != nil {
			return count, err
		}
	}
	return count, send(guestproto.FrameDataEnd)
}

// download sends a request and lets receive read the answer.
func (c *Client) download(ctx context.Context, doing string, req any, receive func(*link) error) error {
	l, err := c.open(ctx, req)
	if err != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	defer l.close()
	err = receive(l)
	var own *sourceError
	switch {
	case errors.As(err, &own):
		return fmt.Errorf("%s: %w", doing, l.caller(ctx, own.err))
	case err != nil:
		return fmt.Errorf("%s: %w", doing, l.cause(ctx, err))
	}
	return nil
}

// ownError marks an error of the caller's function, nil stays nil.
func ownError(err error) error {
	if err == nil {
		return nil
	}
	return &sourceError{err}
}

// receiveHeader reads FrameHeader into head.
func receiveHeader(fr *frames, patience time.Duration, head any, required ...string) error {
	typ, p, err := fr.next(patience)
	switch {
	case err != nil:
		return err
	case typ == guestproto.FrameError:
		return remoteError(p)
	case typ != guestproto.FrameHeader:
		return unexpectedFrame(typ)
	}
	if err := guestproto.Decode(p, head, required...); err != nil {
		return fmt.Errorf("reading the header: %w", err)
	}
	return nil
}

// receiveData passes the payloads of FrameData up to FrameDataEnd to take, and
// decodes the FrameResult behind it. The guest may be quiet for so long before
// each frame; 0 means without limit.
func receiveData(fr *frames, quiet time.Duration, take func([]byte) error, result any, required ...string) error {
	ended := false
	for {
		typ, p, err := fr.next(quiet)
		if err != nil {
			return err
		}
		switch {
		case typ == guestproto.FrameData && !ended && len(p) > 0:
			if err := take(p); err != nil {
				return err
			}
		case typ == guestproto.FrameDataEnd && !ended:
			ended = true
		case typ == guestproto.FrameError:
			return remoteError(p)
		case typ == guestproto.FrameResult && ended:
			if err := guestproto.Decode(p, result, required...); err != nil {
				return fmt.Errorf("reading the result: %w", err)
			}
			return nil
		default:
			return unexpectedFrame(typ)
		}
	}
}

// A lineSink cuts what arrives into lines, each at most MaxEntryLine long with
// its newline and at most MaxFileEntries of them.
type lineSink struct {
	fn    func(line []byte) error
	rest  []byte // of a line whose end has not come
	count int64
}

func (s *lineSink) take(p []byte) error {
	for len(p) > 0 {
		line, after, whole := bytes.Cut(p, []byte("\n"))
		if len(s.rest)+len(line) >= guestproto.MaxEntryLine {
			return api.Errorf(api.ErrDamaged, "the guest sends an entry of more than %d bytes", guestproto.MaxEntryLine)
		}
		if !whole {
			s.rest = append(s.rest, line...)
			return nil
		}
		if s.count++; s.count > guestproto.MaxFileEntries {
			return api.Errorf(api.ErrExhausted, "the guest sends more than %d entries", guestproto.MaxFileEntries)
		}
		if len(s.rest) > 0 {
			line = append(s.rest, line...)
			s.rest = line[:0]
		}
		if err := s.fn(line); err != nil {
			return err
		}
		p = after
	}
	return nil
}

// end checks that the last line was whole and that the guest counts as we do.
func (s *lineSink) end(count int64) error {
	if len(s.rest) > 0 {
		return api.Errorf(api.ErrDamaged, "the guest's last entry has no end")
	}
	if s.count != count {
		return api.Errorf(api.ErrDamaged, "the guest sent %d entries and reports %d", s.count, count)
	}
	return nil
}

func clip(p guestproto.Path) string {
	if len(p) > 200 {
		return string(p[:200]) + "…"
	}
	return string(p)
}
