package oci_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/internal/testenv"
)

// must ends the test on an error.
func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func shell(t *testing.T, dir, script string) {
	t.Helper()
	cmd := exec.Command("sh", "-euc", script)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
}

// A netCapability is security.capability with CAP_NET_RAW, permitted and
// effective: struct vfs_cap_data of linux/capability.h, revision 2.
var netCapability = []byte{1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

// TestReferenceUnpack compares a mounted environment with what GNU tar and rm
// make of the same layers: owner, mode, time, link, content and attributes of
// every file. Where a later layer has a directory once more, its attributes are
// those of that layer, as in an overlay; tar would keep the old ones as well.
func TestReferenceUnpack(t *testing.T) {
	testenv.Require(t, "loopmount", os.Geteuid() == 0, "owners and mounting take root")
	testenv.RequireTools(t, "tar", "tar", "mount", "umount")
	lower, upper := t.TempDir(), t.TempDir()
	shell(t, lower, `
		umask 022
		mkdir -p usr/bin var/lib/app "var/empty dir" home/app opt/old/deep srv tmp-like "sch"ön
		printf 'program' >usr/bin/program; chmod 4755 usr/bin/program
		printf 'group' >usr/bin/group; chmod 2711 usr/bin/group
		printf 'net' >usr/bin/net; chmod 755 usr/bin/net
		ln usr/bin/program usr/bin/second; ln usr/bin/program var/lib/app/third
		ln -s program usr/bin/link; ln -s /nowhere/at/all dangling
		ln -s "$(printf 'x%.0s' $(seq 300))" long-link
		printf 'long' >"$(printf 'n%.0s' $(seq 250))"
		seq 200000 >var/lib/app/large; : >var/lib/app/nothing
		printf 'gone' >opt/old/file; printf 'x' >opt/old/deep/x; printf 'v1' >srv/changed; printf 'x' >srv/victim
		mkdir srv/was-directory; printf 'x' >srv/was-directory/x; printf 'f' >srv/was-file
		chmod 1777 tmp-like; chmod 0 var/lib/app/nothing
		chown -R 1234:567 home var/lib/app; chown -h 99:98 dangling; chown 4294967294:4294967294 srv/changed
		chmod 4755 usr/bin/program`)
	must(t,
		unix.Setxattr(filepath.Join(lower, "usr/bin/net"), "security.capability", netCapability, 0),
		unix.Setxattr(filepath.Join(lower, "var/lib/app/large"), "user.note", []byte("kept\x00and\xff"), 0),
		unix.Setxattr(filepath.Join(lower, "usr/bin"), "user.of-directory", []byte(strings.Repeat("v", 900)), 0))
	shell(t, upper, `
		mkdir -p srv/was-file opt/old home/app
		printf 'v2' >srv/changed; chmod 640 srv/changed; chown 1:2 srv/changed
		printf 'now a file' >srv/was-directory; printf 'x' >srv/was-file/x
		: >srv/.wh.victim; : >opt/old/.wh..wh..opq; printf 'new' >opt/old/new
		chmod 711 home/app; chown 1234:1234 home/app`)
	// Times from before 1970 to behind 2038, with fractions.
	stamp := time.Date(1965, 3, 4, 5, 6, 7, 123456789, time.UTC)
	for _, root := range []string{lower, upper} {
		must(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
			stamp = stamp.Add(1111*time.Hour*24 + 987654321)
			if stamp.Year() > 2100 {
				stamp = time.Date(1971, 3, 4, 5, 6, 7, 123456789, time.UTC)
			}
			ts, tsErr := unix.TimeToTimespec(stamp)
			return errors.Join(err, tsErr, unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW))
		}))
	}
	work := t.TempDir()
	var layers []v1.Layer
	for i, root := range []string{lower, upper} {
		file := filepath.Join(work, fmt.Sprint(i, ".tar"))
		shell(t, root, "tar --format=pax --xattrs --xattrs-include='*' --numeric-owner -cf "+file+" .")
		text, err := os.ReadFile(file)
		must(t, err)
		layers = append(layers, rawLayer(t, text))
	}
	want := filepath.Join(work, "want")
	shell(t, work, `
		mkdir want
		tar -xpf 0.tar -C want --same-owner --numeric-owner --xattrs --xattrs-include='*'
		rm want/srv/victim; rm -r want/opt/old/* want/srv/was-directory want/srv/was-file
		tar -xpf 1.tar -C want --same-owner --numeric-owner --xattrs --xattrs-include='*' --exclude='.wh.*'`)

	s, p := newServer(t), newPuller(t)
	image, _, err := build(t.Context(), t, p, s.push(t, "image", imageOf(t, v1.Config{}, layers...)))
	must(t, err)
	got := filepath.Join(work, "got")
	must(t, os.Mkdir(got, 0o700))
	if out, err := exec.Command("mount", "-t", "ext4", "-o", "loop,ro,noload", image, got).CombinedOutput(); err != nil {
		testenv.Require(t, "loopmount", false, fmt.Sprintf("mount: %v: %s", err, out))
	}
	defer func() {
		if out, err := exec.Command("umount", got).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	}()
	given := []string{"etc", "etc/hosts", "etc/hostname", "etc/resolv.conf", "etc/machine-id", "lost+found", "dev", "proc", "sys", "run", "tmp", "workspace"}
	if d := cmp.Diff(everything(t, want, nil), everything(t, got, given)); d != "" {
		t.Error(d)
	}
}

// everything describes each file below root but those given.
func everything(t *testing.T, root string, given []string) map[string]string {
	t.Helper()
	out, first := map[string]string{}, map[uint64]string{}
	must(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil || slices.Contains(given, rel) {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		text := fmt.Sprintf("%o %d:%d %d.%09d", st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			text += " -> " + target
		case unix.S_IFREG:
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			text += fmt.Sprintf(" %d links, %d bytes, %x", st.Nlink, st.Size, sha256.Sum256(content))
			if first[st.Ino] == "" {
				first[st.Ino] = rel
			}
			text += " as " + first[st.Ino]
		}
		attrs, err := attributes(path)
		out[rel] = text + attrs
		return err
	}))
	return out
}

// attributes lists a file's extended attributes.
func attributes(path string) (string, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		return "", err
	}
	names := strings.FieldsFunc(string(buf[:n]), func(r rune) bool { return r == 0 })
	slices.Sort(names)
	text := ""
	for _, name := range names {
		n, err := unix.Lgetxattr(path, name, buf)
		if err != nil {
			return "", err
		}
		text += fmt.Sprintf(" %s=%q", name, buf[:n])
	}
	return text, nil
}
