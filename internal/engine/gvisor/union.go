package gvisor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/workspacedisk/overlayfs"
)

// A union adds to the upper directory of a layer what the one of the layer below
// it holds and it hides nothing of, so that the two can be replaced by it. It
// reads and writes the layers themselves, with overlayfs's marks in them, and so
// costs what the two hold, however much of the environment shows through.
//
// Nothing is ever taken away or written to: a name that the upper layer has, be
// it a whiteout, is the upper layer's. What has to be looked at is where the
// content of its directories goes on. In the old chain that was in the layer
// below and those under it, in the new one it is only in the latter, which know
// the directory by another name where the layer below had moved it, or are to
// show nothing of it where the layer below had replaced it.
//
// The names in both are a guest's. See treeCopier for how they are met.
type union struct {
	marks  string // the prefix of the marks' attributes
	follow bool   // whether the kernel follows redirects in these layers
	below  *os.Root
	copier treeCopier
}

// uniteLayers makes the directory [UpperDir] in to the union of that one and the
// one in from, which lies below it. A layer without one is of a machine that never
// came up, and holds nothing.
func uniteLayers(ctx context.Context, from, to *os.Root, marks string, follow bool) error {
	u := &union{marks: marks, follow: follow, copier: treeCopier{to: to, linked: map[uint64]string{}}}
	if _, err := from.Lstat(UpperDir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if _, err := to.Lstat(UpperDir); errors.Is(err, fs.ErrNotExist) {
		return u.copier.entry(ctx, from, to, UpperDir, UpperDir, 0)
	}
	var err error
	if u.below, err = from.OpenRoot(UpperDir); err != nil {
		return err
	}
	defer u.below.Close()
	dir, err := to.OpenRoot(UpperDir)
	if err != nil {
		return err
	}
	defer dir.Close()
	return u.fill(ctx, dir, UpperDir, "/", place{dir: u.below, path: "/"}, 0)
}

// A place is where, seen from the upper layer, a directory's content goes on.
type place struct {
	dir  *os.Root // what the layer below holds of it; nil for nothing
	path string   // where it goes on in the layers under that; "" for nowhere
}

// leave closes the place, which is not to be used any more.
func (u *union) leave(p place) {
	if p.dir != nil && p.dir != u.below {
		p.dir.Close()
	}
}

// fill adds to dir what shows through it: the content at below. Its path is rel
// in the upper layer's image, and view is where its content went on in the old
// chain, "" for nowhere.
func (u *union) fill(ctx context.Context, dir *os.Root, rel, view string, below place, depth int) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if depth > maxLayerDepth {
		return api.Errorf(api.ErrExhausted, "a directory lies more than %d levels deep", maxLayerDepth)
	}
	own, err := names(dir)
	if err != nil {
		return err
	}
	if err := u.add(ctx, dir, rel, own, below, depth); err != nil {
		return err
	}
	for _, name := range own {
		st, err := dir.Lstat(name)
		if err != nil {
			return err
		}
		if !st.IsDir() {
			continue
		}
		if err := u.child(ctx, dir, name, path.Join(rel, name), view, below, depth); err != nil {
			return err
		}
	}
	return nil
}

// add copies what lies at below under names that are not among dir's own.
func (u *union) add(ctx context.Context, dir *os.Root, rel string, own []string, below place, depth int) error {
	if below.dir == nil {
		return nil
	}
	has := make(map[string]bool, len(own))
	for _, name := range own {
		has[name] = true
	}
	theirs, err := names(below.dir)
	if err != nil {
		return err
	}
	st, err := dir.Lstat(".")
	if err != nil {
		return err
	}
	added := false
	for _, name := range theirs {
		if has[name] {
			continue
		}
		if err := u.copier.entry(ctx, below.dir, dir, name, path.Join(rel, name), depth+1); err != nil {
			return err
		}
		added = true
	}
	if !added {
		return nil
	}
	// What was added may have come from further below.
	if impure, err := u.mark(below.dir, overlayfs.Impure); err != nil {
		return err
	} else if impure != nil {
		if err := u.setMark(dir, overlayfs.Impure, string(impure)); err != nil {
			return err
		}
	}
	return setTimes(dir, ".", st)
}

// child is fill for a directory in dir, whose marks it sets right.
func (u *union) child(ctx context.Context, dir *os.Root, name, rel, view string, below place, depth int) error {
	sub, err := dir.OpenRoot(name)
	if err != nil {
		return err
	}
	defer sub.Close()
	marks, err := u.decode(sub)
	if err != nil {
		return fmt.Errorf("%s: %w", rel, err)
	}
	subview, at := "", place{}
	switch {
	case marks.Opaque:
	case marks.Absolute:
		subview = marks.Redirect
		at, err = u.find(subview)
	case view == "":
	case marks.Redirect != "":
		subview = path.Join(view, marks.Redirect)
		at, err = u.find(subview)
	default:
		subview = path.Join(view, name)
		at, err = u.step(below, name)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", rel, err)
	}
	defer u.leave(at)
	if err := u.direct(sub, marks, below.join(name), at.path); err != nil {
		return fmt.Errorf("%s: %w", rel, err)
	}
	return u.fill(ctx, sub, rel, subview, at, depth+1)
}

// direct has a directory go on at the path to in the layers under the layer
// below, where without a mark it would at natural.
func (u *union) direct(dir *os.Root, marks overlayfs.Marks, natural, to string) error {
	if marks.Opaque {
		return nil
	}
	redirect := ""
	if to != natural {
		redirect = to
	}
	if marks.Redirect != "" && marks.Redirect != redirect {
		if err := u.unmark(dir, overlayfs.Redirect); err != nil {
			return err
		}
	}
	switch {
	case to == natural:
		return nil
	case to == "":
		return u.setMark(dir, overlayfs.Opaque, "y")
	case !u.follow: // then nothing moves
		return api.Errorf(api.ErrInternal, "it would have to be redirected to %q", to)
	case marks.Redirect == redirect:
		return nil
	}
	err := u.setMark(dir, overlayfs.Redirect, redirect)
	if errors.Is(err, unix.ENOSPC) && len(redirect) > layerBlock/2 {
		err = api.Errorf(api.ErrExhausted, "it was moved from a path of %d bytes", len(redirect))
	}
	return err
}

// find goes to a path of the old chain without the upper layer.
func (u *union) find(p string) (place, error) {
	at := place{dir: u.below, path: "/"}
	for name := range strings.SplitSeq(strings.TrimPrefix(p, "/"), "/") {
		next, err := u.step(at, name)
		u.leave(at)
		if err != nil {
			return place{}, err
		}
		at = next
	}
	return at, nil
}

// step goes from a directory to the one called name in it.
func (u *union) step(p place, name string) (place, error) {
	next := place{path: p.join(name)}
	if p.dir == nil {
		return next, nil
	}
	st, err := p.dir.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return next, nil
	}
	if err != nil {
		return place{}, err
	}
	if !st.IsDir() { // it hides what is under it, whatever it is
		return place{}, nil
	}
	if next.dir, err = p.dir.OpenRoot(name); err != nil {
		return place{}, err
	}
	marks, err := u.decode(next.dir)
	if err != nil {
		next.dir.Close()
		return place{}, err
	}
	switch {
	case marks.Opaque:
		next.path = ""
	case marks.Absolute: // also out of an opaque directory
		next.path = marks.Redirect
	case marks.Redirect != "":
		next.path = p.join(marks.Redirect)
	}
	return next, nil
}

// join returns where a name of a directory's content goes on by itself.
func (p place) join(name string) string {
	if p.path == "" {
		return ""
	}
	return path.Join(p.path, name)
}

func (u *union) decode(dir *os.Root) (overlayfs.Marks, error) {
	opaque, err := u.mark(dir, overlayfs.Opaque)
	if err != nil {
		return overlayfs.Marks{}, err
	}
	var redirect []byte
	if u.follow {
		if redirect, err = u.mark(dir, overlayfs.Redirect); err != nil {
			return overlayfs.Marks{}, err
		}
	}
	return overlayfs.DecodeMarks(opaque, redirect)
}

// mark returns the value of a directory's mark, nil without one.
func (u *union) mark(dir *os.Root, name string) (value []byte, err error) {
	err = onDirectory(dir, func(fd int) error {
		buf := make([]byte, layerBlock)
		n, err := unix.Fgetxattr(fd, u.marks+name, buf)
		if err == nil {
			value = buf[:n]
		}
		if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EOPNOTSUPP) {
			err = nil
		}
		return err
	})
	return value, err
}

func (u *union) setMark(dir *os.Root, name, value string) error {
	return onDirectory(dir, func(fd int) error { return unix.Fsetxattr(fd, u.marks+name, []byte(value), 0) })
}

func (u *union) unmark(dir *os.Root, name string) error {
	return onDirectory(dir, func(fd int) error { return unix.Fremovexattr(fd, u.marks+name) })
}
