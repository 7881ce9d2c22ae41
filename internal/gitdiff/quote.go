package gitdiff

import (
	"fmt"
	"strings"

	"github.com/pyro-mcp/pyro/internal/manifest"
)

// Quote writes a name as Git does with core.quotePath, its default: as it is
// where it is plain ASCII, else in double quotes with C's escapes.
func Quote(name string) string {
	if !needsQuotes(name) {
		return name
	}
	var b strings.Builder
	b.WriteByte('"')
	for i := range len(name) {
		c := name[i]
		if j := strings.IndexByte("\a\b\t\n\v\f\r\"\\", c); j >= 0 {
			b.WriteByte('\\')
			b.WriteByte("abtnvfr\"\\"[j])
			continue
		}
		if c < 0x20 || c >= 0x7f {
			fmt.Fprintf(&b, `\%03o`, c)
			continue
		}
		b.WriteByte(c)
	}
	b.WriteByte('"')
	return b.String()
}

func needsQuotes(name string) bool {
	for i := range len(name) {
		if c := name[i]; c < 0x20 || c >= 0x7f || c == '"' || c == '\\' {
			return true
		}
	}
	return false
}

// lineName is a name on a line of its own after "--- " or "+++ ": a space in it
// wants a tab behind, or tools would look for a time there.
func lineName(name string) string {
	q := Quote(name)
	if q == name && strings.IndexByte(name, ' ') >= 0 {
		return q + "\t"
	}
	return q
}

// gitOwn returns the path of the repository's .git that p is or lies in.
func gitOwn(p string) (string, bool) {
	end := 0
	for part := range strings.SplitSeq(p, "/") {
		end += len(part)
		if strings.EqualFold(part, ".git") {
			return p[:end], true
		}
		end++
	}
	return "", false
}

// refused reports whether git apply would not touch a path: what an NTFS or a
// symlink could make mean .git (verify_path in Git's read-cache.c, with
// core.protectNTFS, its default).
func refused(e *manifest.Entry) bool {
	if e == nil {
		return false
	}
	for part := range strings.FieldsFuncSeq(e.Path, func(r rune) bool { return r == '/' || r == '\\' }) {
		low := strings.ToLower(part)
		for _, own := range []string{".git", "git~1"} {
			rest, ok := strings.CutPrefix(low, own)
			if !ok {
				continue
			}
			rest, _, _ = strings.Cut(rest, ":")
			if strings.Trim(rest, " .") == "" {
				return true
			}
		}
	}
	base := e.Path[strings.LastIndexByte(e.Path, '/')+1:]
	return e.Type == manifest.Symlink && strings.HasPrefix(strings.ToLower(base), ".gitmodules")
}
