package mcpserver

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
)

// hostPaths are the directories of this host that a model may name: to copy
// files from, and to copy files to. A path is taken for what it really leads to,
// through every link.
type hostPaths struct {
	project        *project
	reads, exports []string // absolute, without links
}

func newHostPaths(p *project, reads, exports []string) (*hostPaths, error) {
	h := &hostPaths{project: p}
	for _, x := range []struct {
		flag  string
		given []string
		to    *[]string
	}{{"--allow-path", reads, &h.reads}, {"--allow-export", exports, &h.exports}} {
		for _, dir := range x.given {
			dir, err := realDirectory(dir)
			if err != nil {
				return nil, fmt.Errorf("looking at %s: %w", x.flag, err)
			}
			*x.to = append(*x.to, dir)
		}
	}
	return h, nil
}

// realDirectory returns where a directory really is.
func realDirectory(dir string) (string, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	resolved, err := filepath.EvalSymlinks(abs)
	if err != nil {
		return "", pathError(err, dir)
	}
	st, err := os.Stat(resolved)
	if err != nil {
		return "", pathError(err, dir)
	}
	if !st.IsDir() {
		return "", api.Errorf(api.ErrInvalid, "%s is not a directory", quote(dir))
	}
	return resolved, nil
}

// read returns the real path of a file or directory to copy from. A relative
// path is below the project.
func (h *hostPaths) read(path string) (string, error) {
	abs, err := h.absolute(path)
	if err != nil {
		return "", err
	}
	roots := h.reads
	if top := h.project.directory(); top != "" {
		roots = append([]string{top}, roots...)
	}
	// Whether a path outside exists is nobody's business: it is refused before
	// that is looked at, as far as can be told.
	resolved, err := filepath.EvalSymlinks(abs)
	if err != nil && within(roots, abs) {
		return "", pathError(err, path)
	}
	if err != nil || !within(roots, resolved) {
		return "", api.WithHint(api.Errorf(api.ErrDenied, "%s is outside of what this server may read on its host", quote(path)),
			"%s; whoever runs the server can add a directory with --allow-path", strings.TrimSuffix(h.readSentence(), "."))
	}
	return resolved, nil
}

// export returns the real path of something new in a directory that exists.
func (h *hostPaths) export(path string) (string, error) {
	if len(h.exports) == 0 {
		return "", api.WithHint(api.Errorf(api.ErrDenied, "this server may write nothing on its host"),
			"read the changes with workspace_diff or workspace_file_read; whoever runs the server can name a directory for exports with --allow-export")
	}
	abs := filepath.Clean(path)
	if !filepath.IsAbs(abs) {
		abs = filepath.Join(h.exports[0], abs)
	}
	if err := checkPath(path); err != nil {
		return "", err
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(abs))
	if err != nil && within(h.exports, filepath.Dir(abs)) {
		return "", pathError(err, filepath.Dir(abs))
	}
	output := filepath.Join(parent, filepath.Base(abs))
	if err != nil || !within(h.exports, parent) || filepath.Base(abs) == string(filepath.Separator) {
		return "", api.WithHint(api.Errorf(api.ErrDenied, "%s is outside of what this server may write on its host", quote(path)),
			"%s; whoever runs the server can add a directory with --allow-export", strings.TrimSuffix(h.exportSentence(), "."))
	}
	return output, nil
}

// maxHostPath is Linux's PATH_MAX.
const maxHostPath = 4096

func checkPath(path string) error {
	if path == "" || len(path) >= maxHostPath || strings.ContainsRune(path, 0) {
		return api.Errorf(api.ErrInvalid, "a path of this host has between 1 and %d bytes and no NUL", maxHostPath-1)
	}
	return nil
}

func (h *hostPaths) absolute(path string) (string, error) {
	if err := checkPath(path); err != nil {
		return "", err
	}
	if filepath.IsAbs(path) {
		return filepath.Clean(path), nil
	}
	top := h.project.directory()
	if top == "" {
		if len(h.reads) == 0 {
			return "", api.WithHint(api.Errorf(api.ErrDenied, "%s is relative, and this server has no project", quote(path)),
				"whoever runs the server names a project with --project-path, or a directory with --allow-path")
		}
		top = h.reads[0]
	}
	return filepath.Join(top, path), nil
}

// within reports whether path is one of the directories or below one.
func within(roots []string, path string) bool {
	for _, root := range roots {
		if rel, err := filepath.Rel(root, path); err == nil && filepath.IsLocal(rel) {
			return true
		}
	}
	return false
}

// pathError says what is wrong with a path without repeating the system's words
// for it.
func pathError(err error, path string) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return api.Errorf(api.ErrNotFound, "%s does not exist", quote(path))
	case errors.Is(err, fs.ErrPermission):
		return api.Errorf(api.ErrDenied, "%s cannot be read by the server", quote(path))
	}
	return api.Errorf(api.ErrInvalid, "%s cannot be resolved", quote(path))
}

func (h *hostPaths) readSentence() string {
	roots := h.reads
	if top := h.project.directory(); top != "" {
		roots = append([]string{top}, roots...)
	}
	if len(roots) == 0 {
		return "This server may read no files of its host."
	}
	return "Paths on the host must be below " + quoteAll(roots) + "."
}

func (h *hostPaths) exportSentence() string {
	if len(h.exports) == 0 {
		return "This server was started without a directory for exports, so this is refused: hand over workspace_diff instead."
	}
	return "output_path must be below " + quoteAll(h.exports) + "; a relative one is below the first."
}

func quoteAll(paths []string) string {
	quoted := make([]string, len(paths))
	for i, p := range paths {
		quoted[i] = quote(p)
	}
	return strings.Join(quoted, " or ")
}

// readRegular returns the beginning of a regular file, at most limit bytes.
func readRegular(path string, limit int64) ([]byte, error) {
	// Not to wait for a pipe to be written to.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, pathError(err, path)
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, api.Errorf(api.ErrInvalid, "%s is no regular file", quote(path))
	}
	return io.ReadAll(io.LimitReader(f, limit))
}
