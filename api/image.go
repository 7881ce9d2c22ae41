package api

import (
	"maps"
	"strconv"
	"strings"
	"unicode"
)

// ImageConfig is what an OCI image says of how to run it. It is data of whoever
// made the image: bounded and checked for form when the image is pulled, and
// meant for the guest only.
type ImageConfig struct {
	// Env holds "NAME=value", each name once, in the image's order.
	Env []string `json:"env,omitempty"`
	// WorkingDir is an absolute path without "..", "" for none. It exists in
	// the environment, as a directory or a link.
	WorkingDir string `json:"working_dir,omitempty"`
	// User is a name or number with an optional group, as in "app:1000". Only
	// the guest can say what a name means.
	User       string   `json:"user,omitempty"`
	Entrypoint []string `json:"entrypoint,omitempty"`
	Cmd        []string `json:"cmd,omitempty"`
}

// Environ returns the image's variables with those of over in their place or
// beside them. Neither is changed.
func (c ImageConfig) Environ(over map[string]string) map[string]string {
	out := make(map[string]string, len(c.Env)+len(over))
	for _, v := range c.Env {
		if name, value, ok := strings.Cut(v, "="); ok {
			out[name] = value
		}
	}
	maps.Copy(out, over)
	return out
}

// IsRoot reports whether a guest's user, as CheckUser takes it, is its root; ""
// is, as in an image that names none.
func IsRoot(user string) bool {
	name, group, _ := strings.Cut(user, ":")
	isRoot := func(s string) bool { return s == "" || s == "0" || s == "root" }
	return isRoot(name) && isRoot(group)
}

// The bounds of a user's name: of it in bytes, and of a user id. One more means
// "no id" to Linux.
const (
	maxUser   = 256
	maxUserID = 1<<32 - 2
)

// CheckUser checks the form of a guest's user, NAME-OR-NUMBER[:GROUP-OR-NUMBER].
// What is none is ErrInvalid; whether there is such a user only the guest knows.
func CheckUser(user string) error {
	bad := func(why string) error {
		return WithHint(Errorf(ErrInvalid, "%.60q is no user: %s", user, why), "write a name or a number, and behind a colon optionally a group, as in app or 1000:1000")
	}
	if len(user) > maxUser {
		return bad("it is longer than " + strconv.Itoa(maxUser) + " bytes")
	}
	if strings.ContainsFunc(user, func(r rune) bool { return unicode.IsControl(r) || unicode.IsSpace(r) }) {
		return bad("it has blanks or control characters in it")
	}
	parts := strings.Split(user, ":")
	if len(parts) > 2 {
		return bad("it has more than one colon")
	}
	for _, part := range parts {
		if part == "" {
			return bad("a name is empty")
		}
		digits := strings.TrimLeft(part, "+-")
		if digits == "" || strings.Trim(digits, "0123456789") != "" {
			continue
		}
		// A number that does not fit must not become another one, such as 0.
		if id, err := strconv.ParseUint(part, 10, 64); err != nil || id > maxUserID {
			return bad("the largest id is " + strconv.Itoa(maxUserID))
		}
	}
	return nil
}
