package patch

import (
	"strings"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/manifest"
)

// Unquote reads a name in double quotes as Git writes it (quote.c) and returns
// what follows it.
func Unquote(s string) (name, rest string, err error) {
	bad := func() (string, string, error) {
		return "", "", api.Errorf(api.ErrInvalid, "the name %.200q is quoted wrongly", s)
	}
	if s == "" || s[0] != '"' {
		return bad()
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch c := s[i]; c {
		case '"':
			return b.String(), s[i+1:], nil
		case '\\':
			if i++; i == len(s) {
				return bad()
			}
			if j := strings.IndexByte("abtnvfr\"\\", s[i]); j >= 0 {
				b.WriteByte("\a\b\t\n\v\f\r\"\\"[j])
				continue
			}
			if i+3 > len(s) || s[i] > '3' {
				return bad()
			}
			v := 0
			for _, d := range []byte(s[i : i+3]) {
				if d < '0' || d > '7' {
					return bad()
				}
				v = v<<3 | int(d-'0')
			}
			b.WriteByte(byte(v))
			i += 2
		default:
			b.WriteByte(c)
		}
	}
	return bad()
}

const devNull = "/dev/null"

// lineName reads the name of a line that begins with "--- " or "+++ ", up to a
// tab, behind which there is a time.
func lineName(s string) (string, error) {
	if strings.HasPrefix(s, `"`) {
		name, _, err := Unquote(s)
		return name, err
	}
	name, _, _ := strings.Cut(s, "\t")
	if name == "" {
		return "", api.Errorf(api.ErrInvalid, "it has no name")
	}
	return name, nil
}

// restName reads the name that is the rest of a line.
func restName(s string) (string, error) {
	if strings.HasPrefix(s, `"`) {
		name, _, err := Unquote(s)
		return name, err
	}
	return s, nil
}

// headerNames reads the two names of a line that begins with "diff --git ".
// Unquoted names with spaces can only be told apart where they are equal
// behind their prefixes; else both are "", and other lines have to name them.
func headerNames(s string) (old, cur string) {
	if strings.HasPrefix(s, `"`) {
		name, rest, err := Unquote(s)
		if err != nil || !strings.HasPrefix(rest, " ") {
			return "", ""
		}
		other, err := restName(rest[1:])
		if err != nil {
			return "", ""
		}
		return name, other
	}
	if i := strings.Index(s, ` "`); i >= 0 && strings.HasSuffix(s, `"`) {
		if name, rest, err := Unquote(s[i+1:]); err == nil && rest == "" {
			return s[:i], name
		}
	}
	for i := range len(s) {
		if s[i] != ' ' {
			continue
		}
		if _, _, ok := stripBoth(s[:i], s[i+1:]); ok {
			return s[:i], s[i+1:]
		}
	}
	if strings.Count(s, " ") == 1 {
		old, cur, _ = strings.Cut(s, " ")
		return old, cur
	}
	return "", ""
}

// prefixes are what Git puts before names: its default, those of
// diff.mnemonicPrefix (git-config(1)), and those of git diff --no-index.
const prefixes = "abciow12"

// stripped returns name without its prefix.
func stripped(name string) (string, bool) {
	if len(name) > 2 && name[1] == '/' && strings.IndexByte(prefixes, name[0]) >= 0 {
		return name[2:], true
	}
	return name, false
}

// stripBoth returns the two names of one file without their prefixes. It
// reports whether they then mean the same.
func stripBoth(old, cur string) (o, c string, same bool) {
	if old == cur { // without prefixes, or "a/x" and "a/x" of a directory a
		return old, cur, true
	}
	o, hadOld := stripped(old)
	c, hadNew := stripped(cur)
	switch {
	case old == devNull && hadNew:
		return old, c, false
	case cur == devNull && hadOld:
		return o, cur, false
	case hadOld && hadNew && old[0] != cur[0]:
		return o, c, o == c
	}
	// diff -ru old new
	_, o, okOld := strings.Cut(old, "/")
	_, c, okNew := strings.Cut(cur, "/")
	if okOld && okNew && o == c && o != "" && old[0] != '/' && cur[0] != '/' {
		return o, c, true
	}
	return old, cur, false
}

// checkName returns what is wrong with a path that a patch names: ErrDenied.
func checkName(path string) error {
	if strings.HasPrefix(path, "/") {
		return api.Errorf(api.ErrDenied, "the path %.200q is absolute", path)
	}
	for part := range strings.SplitSeq(path, "/") {
		switch {
		case part == "..":
			return api.Errorf(api.ErrDenied, "the path %.200q leaves the workspace", path)
		case strings.EqualFold(part, ".git"):
			return api.Errorf(api.ErrDenied, "the path %.200q is Git's own", path)
		}
	}
	if err := manifest.CheckPath(path); err != nil {
		return api.Errorf(api.ErrDenied, "%w", err)
	}
	return nil
}
