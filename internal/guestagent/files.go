package guestagent

import (
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// listFiles sends the entries of a directory, or the one of a file or link.
func (q *request) listFiles(ctx context.Context, line []byte) error {
	var req guestproto.ListFilesRequest
	if err := decodeRequest(line, &req, "path"); err != nil {
		return err
	}
	if err := q.streamOnly(guestproto.ActionListFiles); err != nil {
		return err
	}
	p, err := q.server.openPlace(req.Path)
	if err != nil {
		return err
	}
	defer p.close()
	ctx, unheed := q.heedHangUp(ctx)
	l := &listing{ctx: ctx, w: &dataWriter{q: q, buf: make([]byte, 0, outputChunk)}, recursive: req.Recursive}
	err = l.place(p)
	hungUp := ctx.Err() != nil
	unheed()
	if hungUp {
		return q.sent(errGone)
	}
	if err != nil {
		return err
	}
	if err := q.endData(l.w); err != nil {
		return err
	}
	return q.reply(l.result)
}

// A listing goes through a tree in the order of the bytes of the paths: "a",
// "a-b", "a/c".
type listing struct {
	ctx       context.Context
	w         *dataWriter
	recursive bool
	result    guestproto.ListFilesResult
}

func (l *listing) place(p *place) error {
	at, err := p.workspace.beneath(p.rel, false)
	if err != nil {
		return fileError(p.abs, err)
	}
	defer at.release()
	st, err := at.dir.stat(at.base)
	if err != nil {
		return fileError(p.abs, err)
	}
	if kind := st.Mode & unix.S_IFMT; kind != unix.S_IFDIR {
		return l.entry(at.dir, dirent{at.base, kind}, p.abs)
	}
	d, err := at.dir.sub(at.base)
	if err != nil {
		return fileError(p.abs, err)
	}
	defer d.release()
	entries, err := d.entries()
	if err != nil {
		return fileError(p.abs, err)
	}
	return l.directory(d, entries, p.abs, 1)
}

// directory lists the content of d. A directory in it stands in the order twice:
// as an entry, and, behind its slash, for its content.
func (l *listing) directory(d *directory, entries []dirent, path guestproto.Path, depth int) error {
	if l.recursive {
		for _, e := range entries {
			if e.kind == unix.S_IFDIR {
				entries = append(entries, dirent{e.name + "/", e.kind})
			}
		}
	}
	slices.SortFunc(entries, func(a, b dirent) int { return strings.Compare(a.name, b.name) })
	for _, e := range entries {
		full := path + "/" + guestproto.Path(e.name)
		name, content := strings.CutSuffix(e.name, "/")
		switch {
		case path == defaultCwd && isStageName(name):
		case content:
			if err := l.sub(d, name, path+"/"+guestproto.Path(name), depth); err != nil {
				return err
			}
		default:
			if err := l.entry(d, e, full); err != nil {
				return err
			}
		}
	}
	return nil
}

// sub lists the content of a directory, as far as it can be looked into.
func (l *listing) sub(d *directory, name string, path guestproto.Path, depth int) error {
	if depth >= guestproto.MaxDepth {
		return nil
	}
	sub, err := d.sub(name)
	if err != nil {
		return nil // gone, or not ours to read
	}
	defer sub.release()
	entries, err := sub.entries()
	if errors.Is(err, api.ErrExhausted) {
		return err
	}
	return l.directory(sub, entries, path, depth+1)
}

func (l *listing) entry(d *directory, e dirent, path guestproto.Path) error {
	if err := l.ctx.Err(); err != nil {
		return err
	}
	out := guestproto.FileEntry{Path: path}
	switch e.kind {
	case unix.S_IFDIR:
		out.ArtifactType = guestproto.TypeDirectory
	case unix.S_IFLNK:
		target, err := d.readlink(e.name)
		if err != nil {
			return nil // gone
		}
		out.ArtifactType, out.LinkTarget, out.SizeBytes = guestproto.TypeSymlink, guestproto.Path(target), int64(len(target))
	case unix.S_IFREG:
		st, err := d.stat(e.name)
		if err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
			return nil // gone
		}
		out.ArtifactType, out.SizeBytes = guestproto.TypeFile, st.Size
	default:
		l.result.SkippedCount++
		return nil
	}
	if len(path) > guestproto.MaxPath {
		l.result.SkippedCount++
		return nil
	}
	if l.result.EntryCount++; l.result.EntryCount > guestproto.MaxFileEntries {
		return api.Errorf(api.ErrExhausted, "there are more than %d entries", guestproto.MaxFileEntries)
	}
	line, err := guestproto.Encode(out)
	if err != nil {
		return err
	}
	_, err = l.w.Write(line)
	return err
}

// notRegular is the error for what has no content to read or write.
func notRegular(p guestproto.Path, kind os.FileMode) error {
	what := "something special"
	switch kind.Type() {
	case os.ModeDir:
		what = "a directory"
	case os.ModeSymlink:
		what = "a symbolic link"
	case os.ModeNamedPipe:
		what = "a FIFO"
	case os.ModeSocket:
		what = "a socket"
	case os.ModeDevice, os.ModeDevice | os.ModeCharDevice:
		what = "a device"
	}
	return api.Errorf(api.ErrInvalid, "%q is %s: only regular files can be read and written", p, what)
}

// readFile sends a part of a regular file.
func (q *request) readFile(ctx context.Context, line []byte) error {
	var req guestproto.ReadFileRequest
	if err := decodeRequest(line, &req, "path", "max_bytes"); err != nil {
		return err
	}
	if err := q.streamOnly(guestproto.ActionReadFile); err != nil {
		return err
	}
	switch {
	case req.MaxBytes <= 0:
		return api.Errorf(api.ErrInvalid, "max_bytes must be positive")
	case req.Offset < 0:
		return api.Errorf(api.ErrInvalid, "offset must not be negative")
	}
	p, err := q.server.openPlace(req.Path)
	if err != nil {
		return err
	}
	defer p.close()
	f, size, err := p.openRegular()
	if err != nil {
		return err
	}
	defer f.Close()
	if err := q.sendHeader(guestproto.FileHeader{Path: p.abs, SizeBytes: size}); err != nil {
		return err
	}
	w := &dataWriter{q: q, buf: make([]byte, 0, outputChunk)}
	if _, err := f.Seek(req.Offset, io.SeekStart); err != nil {
		return fileError(p.abs, err)
	}
	n, err := io.Copy(struct{ io.Writer }{w}, struct{ io.Reader }{io.LimitReader(f, req.MaxBytes)})
	if w.failed {
		return q.sent(errGone)
	}
	if err != nil {
		return fileError(p.abs, err)
	}
	if err := q.endData(w); err != nil {
		return err
	}
	end := req.Offset + n
	if fi, err := f.Stat(); err == nil {
		size = fi.Size() // it may have grown meanwhile
	}
	return q.reply(guestproto.ReadFileReply{SizeBytes: max(size, 0), Truncated: n == req.MaxBytes && end < size})
}

// openRegular opens a regular file for reading. A link that stays in the
// workspace is followed.
func (p *place) openRegular() (*os.File, int64, error) {
	at, err := p.workspace.beneath(p.rel, true)
	if err != nil {
		return nil, 0, fileError(p.abs, err)
	}
	defer at.release()
	// A device may do something when it is opened: look first.
	st, err := at.dir.stat(at.base)
	if err != nil {
		return nil, 0, fileError(p.abs, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, 0, notRegular(p.abs, fileMode(st.Mode))
	}
	// A FIFO that has taken its place must not be waited for.
	fd, err := openAt(at.dir.fd, at.base, unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return nil, 0, fileError(p.abs, err)
	}
	f := os.NewFile(uintptr(fd), at.base)
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = notRegular(p.abs, fi.Mode())
	}
	if err != nil {
		_ = f.Close()
		return nil, 0, err
	}
	return f, fi.Size(), nil
}

// defaultFileMode is the mode of a written file that was not there before.
const defaultFileMode = 0o644

// writeFile writes a file beside everything else and puts it in place.
func (q *request) writeFile(ctx context.Context, line []byte) error {
	var req guestproto.WriteFileRequest
	if err := decodeRequest(line, &req, "path"); err != nil {
		return err
	}
	if err := q.streamOnly(guestproto.ActionWriteFile); err != nil {
		return err
	}
	if req.Mode > 0o777 {
		return api.Errorf(api.ErrInvalid, "the mode %o is not between 0 and 777", req.Mode)
	}
	p, err := q.server.openPlace(req.Path)
	if err != nil {
		return err
	}
	defer p.close()
	if p.rel == "." {
		return notRegular(p.abs, os.ModeDir)
	}
	reply, err := q.server.writeFile(ctx, p, os.FileMode(req.Mode), &dataReader{fr: guestproto.NewFrameReader(q.r)})
	if err != nil {
		return err
	}
	return q.reply(reply)
}

func (s *Server) writeFile(ctx context.Context, p *place, mode os.FileMode, content io.Reader) (guestproto.WriteFileReply, error) {
	reply := guestproto.WriteFileReply{Path: p.abs}
	dir, base := dirOf(p.rel)
	if isStageName(base) && dir == "." {
		return reply, api.Errorf(api.ErrDenied, "%q is the guest agent's own name", p.abs)
	}
	owner, err := s.owner(p.workspace)
	if err != nil {
		return reply, err
	}
	parent, err := p.makeDirectory(dir, owner)
	if err != nil {
		return reply, err
	}
	defer parent.release()
	st, err := newStage(s.Root, parent)
	if err != nil {
		return reply, err
	}
	defer st.remove(s.Logger)
	f, err := st.root.OpenFile("content", os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return reply, fileError(p.abs, err)
	}
	defer f.Close()
	if reply.BytesWritten, err = io.Copy(f, content); err != nil {
		if api.Code(err) != api.Code(api.ErrInternal) {
			return reply, err // of the caller, or of the connection
		}
		return reply, fileError(p.abs, err)
	}
	old, err := parent.stat(base)
	switch {
	case errors.Is(err, unix.ENOENT):
		reply.Created = true
		if mode == 0 {
			mode = defaultFileMode
		}
		if owner != nil {
			if err := f.Chown(owner.UID, owner.GID); err != nil {
				return reply, fileError(p.abs, err)
			}
		}
	case err != nil:
		return reply, fileError(p.abs, err)
	case old.Mode&unix.S_IFMT != unix.S_IFREG:
		return reply, notRegular(p.abs, fileMode(old.Mode))
	default:
		mode = os.FileMode(old.Mode & 0o777)
		// Its owner stays, as far as we may give files away.
		_ = f.Chown(int(old.Uid), int(old.Gid))
	}
	if err := f.Chmod(mode); err != nil {
		return reply, fileError(p.abs, err)
	}
	if err := ctx.Err(); err != nil {
		return reply, err
	}
	if err := st.moveTo("content", parent, base); err != nil {
		return reply, fileError(p.abs, err)
	}
	return reply, nil
}

// fileMode is the type of a Stat_t's mode.
func fileMode(mode uint32) os.FileMode {
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return os.ModeDir
	case unix.S_IFLNK:
		return os.ModeSymlink
	case unix.S_IFIFO:
		return os.ModeNamedPipe
	case unix.S_IFSOCK:
		return os.ModeSocket
	case unix.S_IFBLK, unix.S_IFCHR:
		return os.ModeDevice
	}
	return 0
}
