package guestagent

import (
	"errors"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// The file tools find what is in the workspace by the functions of this file,
// and not through os.Root: that opens the directories on a path with
// O_NOFOLLOW|O_DIRECTORY, and gVisor (runsc of September 2026,
// ResolvingPath.ShouldFollowSymlink) follows a link all the same where a
// directory is asked for. Linux refuses with ENOTDIR. With O_PATH, and for a
// last name without O_DIRECTORY, both refuse.

// errEscapes says that a path leads out of the directory it is looked up in.
var errEscapes = errors.New("the path escapes from the directory")

const (
	// maxLinks is MAXSYMLINKS, include/linux/namei.h.
	maxLinks = 40
	// maxLookups bounds how many directories one path may lead through. A path
	// of PATH_MAX bytes names 2048 at most; the rest is for links that go up,
	// for which the way is gone again from its beginning.
	maxLookups = 8192
)

// A spot is where a path leads: the name base in a directory. There need not be
// anything of that name.
type spot struct {
	dir  *directory // for looking things up in, not for reading it
	base string     // "." where the path ends at dir itself
	// path is dir's path below the directory that the lookup began in, without
	// links; "" for that directory itself.
	path string
}

func (s *spot) release() { s.dir.release() }

// real returns the spot's path without links, "" for the beginning.
func (s *spot) real() string {
	if s.base == "." {
		return s.path
	}
	return joinPath(s.path, s.base)
}

// beneath finds the spot that rel leads to below d, for the caller to release.
// Links on the way are followed, and with follow the one at the end too, as long
// as they are relative and stay below d; else it returns errEscapes. What it has
// found can be replaced afterwards, but only where it is, never by something
// elsewhere: the spot's directory is open, and base is a name without links for
// whoever uses it with O_NOFOLLOW.
func (d *directory) beneath(rel string, follow bool) (*spot, error) {
	l := &lookup{top: d, at: d.hold(), todo: strings.Split(rel, "/"), follow: follow}
	base, err := l.run()
	if err != nil {
		l.at.release()
		return nil, err
	}
	return &spot{dir: l.at, base: base, path: strings.Join(l.done, "/")}, nil
}

// A lookup is on its way down a path.
type lookup struct {
	top, at *directory
	done    []string // the names from top to at
	todo    []string
	follow  bool
	links   int
	opened  int
}

// run goes to the directory that the path's last name lies in, and returns that
// name.
func (l *lookup) run() (base string, err error) {
	for len(l.todo) > 0 {
		name := l.todo[0]
		last := len(l.todo) == 1
		switch {
		case name == "" || name == ".":
			l.todo = l.todo[1:]
			continue
		case name == "..":
			err = l.up()
		case last && !l.follow:
			return name, nil
		case last:
			var target string
			target, err = l.at.readlink(name)
			if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
				return name, nil // no link
			}
			if err == nil {
				err = l.splice(target)
			}
		default:
			err = l.down(name)
		}
		if err != nil {
			return "", err
		}
	}
	return ".", nil
}

// down goes into the directory name, or on to where the link name points.
func (l *lookup) down(name string) error {
	err := l.enter(name)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		if target, linkErr := l.at.readlink(name); linkErr == nil {
			return l.splice(target)
		}
	}
	if err != nil {
		return err
	}
	l.done, l.todo = append(l.done, name), l.todo[1:]
	return nil
}

// up goes back by as many directories as the path says next. It begins at the
// top again: the directory above an open one may be another by now.
func (l *lookup) up() error {
	for len(l.todo) > 0 && l.todo[0] == ".." {
		if len(l.done) == 0 {
			return errEscapes
		}
		l.done, l.todo = l.done[:len(l.done)-1], l.todo[1:]
	}
	l.at.release()
	l.at = l.top.hold()
	for _, name := range l.done {
		if err := l.enter(name); err != nil {
			return err
		}
	}
	return nil
}

// enter moves on to the directory name, which must be no link.
func (l *lookup) enter(name string) error {
	if l.opened++; l.opened > maxLookups {
		return unix.ENAMETOOLONG
	}
	fd, err := openAt(l.at.fd, name, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	l.at.release()
	l.at = newDirectory(fd)
	return nil
}

// splice puts a link's target into the place of the link's name.
func (l *lookup) splice(target string) error {
	if l.links++; l.links > maxLinks {
		return unix.ELOOP
	}
	if path.IsAbs(target) {
		return errEscapes
	}
	names := strings.Split(target, "/")
	if names[len(names)-1] == "" {
		names[len(names)-1] = "." // what is named with a slash must be a directory
	}
	l.todo = slices.Concat(names, l.todo[1:])
	return nil
}

// openDirectory opens the directory that rel leads to below d.
func (d *directory) openDirectory(rel string) (*directory, error) {
	s, err := d.beneath(rel, true)
	if err != nil {
		return nil, err
	}
	defer s.release()
	return s.dir.sub(s.base)
}

// openRoot opens the directory that rel leads to below d for those who need an
// os.Root. In it they may rely on names without a slash only.
func (d *directory) openRoot(rel string) (*os.Root, error) {
	sub, err := d.openDirectory(rel)
	if err != nil {
		return nil, err
	}
	defer sub.release()
	return os.OpenRoot("/proc/self/fd/" + strconv.Itoa(sub.fd))
}
