// Package project fetches the open-source projects that tests work on as a
// person would: a C program, Python libraries with their test suites, a package
// with an install script. None of them is kept in this repository. Each comes
// through its registry's own client, must have the SHA-256 written down here,
// and is kept in the user's cache directory for the next time. Nothing of a
// project is run in order to fetch it.
package project

import (
	"archive/zip"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/pyro-mcp/pyro/internal/archive"
)

// patience is how long a registry may take, index included.
const patience = 3 * time.Minute

// A source is one file of a registry.
type source struct {
	file, sha256 string
	fetch        func(ctx context.Context, dir string) error
}

var sources = map[string]source{
	// The crash of 3.0.0 on "print += 1", and its fix with a test.
	"pyflakes-3.0.0": {"pyflakes-3.0.0-py2.py3-none-any.whl", "e38cbaa285564388a9622d7e440445d40c508d8fbf96e0c0f3ef28e47d8ba8a2", wheel("pyflakes==3.0.0")},
	"pyflakes-3.0.1": {"pyflakes-3.0.1-py2.py3-none-any.whl", "ec55bf7fe21fff7f1ad2f7da62363d749e2a470500eab1b555334b67aa1ef8cf", wheel("pyflakes==3.0.1")},
	// Pure Python with its unittest suite inside.
	"simplejson-3.19.2": {"simplejson-3.19.2-py3-none-any.whl", "bcedf4cae0d47839fee7de344f96b5694ca53c786f28b5f773d4f0b265a159eb", wheel("simplejson==3.19.2")},
	// C, a plain Makefile, and tests in shell.
	"figlet-2.2.5": {"figlet_2.2.5.orig.tar.gz", "bf88c40fd0f077dab2712f54f8d39ac952e4e9f2e1882f1195be9e5e4257417d", debianSource("figlet=2.2.5-3")},
	// Its install script behaves by the time zone.
	"es5-ext-0.10.63": {"es5-ext-0.10.63.tgz", "c6e70ed2e86fe50cee584cf766992c2eec0f2657f7f91842b18687ce69401c9b", nodePackage("es5-ext@0.10.63")},
}

// fetching keeps two tests of one process from fetching the same, and from
// waiting twice for a registry that does not answer.
var fetching struct {
	sync.Mutex
	failed map[string]error
}

// Fetch returns the path of a project's archive on this host, which the caller
// must not change. An error says what did not answer.
func Fetch(ctx context.Context, name string) (path string, err error) {
	s, ok := sources[name]
	if !ok {
		return "", fmt.Errorf("there is no project %q", name)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	cache = filepath.Join(cache, "pyro-test-projects")
	path = filepath.Join(cache, s.file)
	fetching.Lock()
	defer fetching.Unlock()
	if check(path, s.sha256) == nil {
		return path, nil
	}
	if err := fetching.failed[name]; err != nil {
		return "", err
	}
	if err := s.into(ctx, cache); err != nil {
		err = fmt.Errorf("fetching %s: %w", name, err)
		if fetching.failed == nil {
			fetching.failed = map[string]error{}
		}
		fetching.failed[name] = err
		return "", err
	}
	return path, nil
}

// into fetches the file into a directory, where it appears whole.
func (s source) into(ctx context.Context, cache string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := os.MkdirAll(cache, 0o700); err != nil {
		return err
	}
	dir, err := os.MkdirTemp(cache, "fetch-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := s.fetch(ctx, dir); err != nil {
		return err
	}
	if err := check(filepath.Join(dir, s.file), s.sha256); err != nil {
		return err
	}
	return os.Rename(filepath.Join(dir, s.file), filepath.Join(cache, s.file))
}

func check(path, want string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return err
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != want {
		return fmt.Errorf("%s has SHA-256 %s, want %s", filepath.Base(path), got, want)
	}
	return nil
}

// wheel fetches a wheel: unlike a source distribution, pip runs nothing of it.
func wheel(requirement string) func(context.Context, string) error {
	return func(ctx context.Context, dir string) error {
		return run(ctx, dir, "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "0", "--no-deps",
			"--only-binary=:all:", "--platform", "any", "--implementation", "py", "--abi", "none", "--python-version", "3.11", requirement)
	}
}

func nodePackage(spec string) func(context.Context, string) error {
	return func(ctx context.Context, dir string) error {
		return run(ctx, dir, "npm", "pack", "--silent", "--fetch-retries=0", spec)
	}
}

// debianSource fetches a source package from the mirrors that this host's apt
// uses, with lists of its own: the host's may know no sources, and are not ours
// to change. Trusted without a signature, because what comes is checked.
func debianSource(spec string) func(context.Context, string) error {
	return func(ctx context.Context, dir string) error {
		out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "deb-src [trusted=yes] $(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages", "Component: main").Output()
		if err != nil {
			return fmt.Errorf("asking apt for its mirrors: %w", err)
		}
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		slices.Sort(lines)
		lines = slices.DeleteFunc(slices.Compact(lines), func(l string) bool { return !strings.HasSuffix(l, " bookworm main") })
		if len(lines) == 0 {
			return errors.New("this host's apt does not know Debian 12")
		}
		for _, d := range []string{"lists/partial", "cache/archives/partial"} {
			if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
				return err
			}
		}
		list := filepath.Join(dir, "sources.list")
		if err := os.WriteFile(list, []byte(lines[0]+"\n"), 0o644); err != nil {
			return err
		}
		apt := []string{"apt-get", "-q", "-o", "Dir::Etc::sourcelist=" + list, "-o", "Dir::Etc::sourceparts=-",
			"-o", "Dir::State::lists=" + dir + "/lists", "-o", "Dir::Cache=" + dir + "/cache",
			"-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=20", "-o", "Acquire::Languages=none"}
		if os.Getuid() == 0 {
			// The user that apt would rather download as may not enter dir.
			apt = append(apt, "-o", "APT::Sandbox::User=root")
		}
		if err := run(ctx, dir, append(slices.Clone(apt), "update")...); err != nil {
			return err
		}
		return run(ctx, dir, append(apt, "source", "--download-only", spec)...)
	}
}

func run(ctx context.Context, dir string, argv ...string) error {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = dir
	cmd.WaitDelay = time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		out = bytes.TrimSpace(out)
		return fmt.Errorf("%s: %w: %s", argv[0], err, out[max(0, len(out)-500):])
	}
	return nil
}

// Unpack fetches a project and unpacks it into a new directory. The directory
// that a source archive holds everything in is left away.
func Unpack(ctx context.Context, name, dir string) error {
	path, err := Fetch(ctx, name)
	if err != nil {
		return err
	}
	if strings.HasSuffix(path, ".whl") {
		wheel, err := zip.OpenReader(path)
		if err != nil {
			return err
		}
		defer func() { _ = wheel.Close() }()
		return os.CopyFS(dir, wheel)
	}
	tarball, err := os.Open(path)
	if err != nil {
		return err
	}
	defer tarball.Close()
	whole := dir + ".whole"
	if err := os.Mkdir(whole, 0o755); err != nil {
		return err
	}
	defer os.RemoveAll(whole)
	root, err := os.OpenRoot(whole)
	if err != nil {
		return err
	}
	defer root.Close()
	if _, err := archive.Extract(ctx, root, tarball, archive.ExtractOptions{}); err != nil {
		return err
	}
	tops, err := os.ReadDir(whole)
	if err != nil {
		return err
	}
	if len(tops) != 1 {
		return fmt.Errorf("%s holds %d entries, not one directory", filepath.Base(path), len(tops))
	}
	return os.Rename(filepath.Join(whole, tops[0].Name()), dir)
}
