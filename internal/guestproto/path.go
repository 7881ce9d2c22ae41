package guestproto

import (
	"encoding/base64"
	"path"
	"strings"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/pyro-mcp/pyro/api"
)

// A Path is a path of the guest: any bytes but NUL, at most MaxPath of them. As
// JSON it is a string where that is valid UTF-8, and else an object
// {"base64": "..."} with its bytes; each path has one form only. The zero Path
// is "".
type Path string

// MarshalJSONTo implements the interface of package json.
func (p Path) MarshalJSONTo(enc *jsontext.Encoder) error {
	if utf8.ValidString(string(p)) {
		return enc.WriteToken(jsontext.String(string(p)))
	}
	for _, tok := range []jsontext.Token{
		jsontext.BeginObject, jsontext.String("base64"),
		jsontext.String(base64.StdEncoding.EncodeToString([]byte(p))), jsontext.EndObject,
	} {
		if err := enc.WriteToken(tok); err != nil {
			return err
		}
	}
	return nil
}

// UnmarshalJSONFrom implements the interface of package json.
func (p *Path) UnmarshalJSONFrom(dec *jsontext.Decoder) error {
	tok, err := dec.ReadToken()
	if err != nil {
		return err
	}
	var text string
	switch tok.Kind() {
	case '"':
		text = tok.String()
	case '{':
		if text, err = readBase64(dec); err != nil {
			return err
		}
	default:
		return api.Errorf(api.ErrDamaged, "a path is neither a string nor an object")
	}
	if len(text) > MaxPath {
		return api.Errorf(api.ErrDamaged, "a path has %d bytes, the limit is %d", len(text), MaxPath)
	}
	if strings.ContainsRune(text, 0) {
		return api.Errorf(api.ErrDamaged, "a path has a NUL in it")
	}
	*p = Path(text)
	return nil
}

// readBase64 reads the rest of {"base64":"..."}. Bytes that are valid UTF-8
// have another form and are refused.
func readBase64(dec *jsontext.Decoder) (string, error) {
	// A token is valid until the next one is read.
	name, err := dec.ReadToken()
	if err != nil {
		return "", err
	}
	if name.Kind() != '"' || name.String() != "base64" {
		return "", api.Errorf(api.ErrDamaged, `a path's object does not hold "base64"`)
	}
	value, err := dec.ReadToken()
	if err != nil {
		return "", err
	}
	if value.Kind() != '"' {
		return "", api.Errorf(api.ErrDamaged, `a path's "base64" is no string`)
	}
	raw, err := base64.StdEncoding.Strict().DecodeString(value.String())
	if err != nil || strings.ContainsAny(value.String(), "\r\n") || utf8.Valid(raw) {
		return "", api.Errorf(api.ErrDamaged, `a path's "base64" is not the one form of bytes that are no UTF-8`)
	}
	end, err := dec.ReadToken()
	if err != nil {
		return "", err
	}
	if end.Kind() != '}' {
		return "", api.Errorf(api.ErrDamaged, `a path's object holds more than "base64"`)
	}
	return string(raw), nil
}

// checkRelative refuses what is not the shortest form of a path below a
// directory.
func (p Path) checkRelative() error {
	switch {
	case p == "" || len(p) > MaxPath || strings.ContainsRune(string(p), 0):
		return api.Errorf(api.ErrDamaged, "a path is empty, longer than %d bytes, or has a NUL in it", MaxPath)
	case strings.Count(string(p), "/") >= MaxDepth:
		return api.Errorf(api.ErrDamaged, "the path %q has more than %d parts", cut(string(p), 200), MaxDepth)
	}
	for part := range strings.SplitSeq(string(p), "/") {
		if len(part) > MaxName {
			return api.Errorf(api.ErrDamaged, "the path %q has a name of more than %d bytes", cut(string(p), 200), MaxName)
		}
		if part == "" || part == "." || part == ".." {
			return api.Errorf(api.ErrDamaged, "the path %q is not that of a file below a directory", cut(string(p), 200))
		}
	}
	return nil
}

// Local returns the shortest form of p as a path below a directory. One that
// leaves it, or is the directory itself, is ErrDenied.
func (p Path) Local() (Path, error) {
	clean := Path(path.Clean(string(p)))
	if p == "" || clean == "." || path.IsAbs(string(p)) || clean.checkRelative() != nil {
		return "", api.Errorf(api.ErrDenied, "the path %q does not lie below the directory that it is relative to", cut(string(p), 200))
	}
	return clean, nil
}

// WorkspacePath returns p in its shortest absolute form, a relative one taken
// from the workspace. A path that does not lie in the workspace is ErrDenied;
// one that leaves it through links is found by the guest agent only.
func WorkspacePath(p Path) (Path, error) {
	switch {
	case p == "":
		return "", api.Errorf(api.ErrInvalid, "the path is empty")
	case len(p) > MaxPath:
		return "", api.Errorf(api.ErrInvalid, "the path has %d bytes, the limit is %d", len(p), MaxPath)
	case strings.ContainsRune(string(p), 0):
		return "", api.Errorf(api.ErrInvalid, "the path has a NUL in it")
	}
	full := string(p)
	if !path.IsAbs(full) {
		full = api.WorkspacePath + "/" + full
	}
	full = path.Clean(full)
	if full != api.WorkspacePath && !strings.HasPrefix(full, api.WorkspacePath+"/") {
		return "", api.WithHint(api.Errorf(api.ErrDenied, "the path %q leaves %s", cut(string(p), 200), api.WorkspacePath),
			"file tools work below "+api.WorkspacePath+" only")
	}
	if rel := strings.TrimPrefix(full[len(api.WorkspacePath):], "/"); rel != "" {
		if err := Path(rel).checkRelative(); err != nil {
			return "", api.Errorf(api.ErrInvalid, "%w", err)
		}
	}
	return Path(full), nil
}
