package guestproto

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/pyro-mcp/pyro/api"
)

const (
	// maxDepth bounds how deep arrays and objects may nest.
	maxDepth = 16
	// maxTokens bounds the names and values of one message.
	maxTokens = 100_000
	// MaxErrorText bounds the text of an error that a peer sends; more is cut.
	MaxErrorText = 4 << 10
)

// decodeOptions are strict where two readers could differ: a name that comes
// twice is an error, also when it differs in case or underscores only. Names we
// do not know are let through, because a newer peer may send some.
var decodeOptions = json.JoinOptions(
	json.MatchCaseInsensitiveNames(true),
	jsontext.AllowDuplicateNames(false),
	jsontext.AllowInvalidUTF8(false),
)

// Encode returns v as one line of JSON, newline included. Bytes that are no
// UTF-8 become U+FFFD.
func Encode(v any) ([]byte, error) {
	b, err := json.Marshal(v, jsontext.AllowInvalidUTF8(true), json.Deterministic(true))
	if err != nil {
		return nil, api.Errorf(api.ErrInternal, "encoding a %T: %w", v, err)
	}
	return append(b, '\n'), nil
}

// Decode reads data, which must be exactly one JSON object, into v. Any fault is
// ErrDamaged: an empty or cut message, anything but an object, bytes after it,
// too deep or too many values, a name that comes twice, or a lack of one of the
// required names. The caller has bounded len(data).
func Decode(data []byte, v any, required ...string) error {
	names, err := scan(data)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, v, decodeOptions); err != nil {
		return api.Errorf(api.ErrDamaged, "the message does not decode: %s", plain(err))
	}
	for _, name := range required {
		if !slices.Contains(names, name) {
			return api.Errorf(api.ErrDamaged, "the message lacks %q", name)
		}
	}
	return nil
}

// DecodeReply is [Decode] for the guest's answer in the plain form. An answer
// with an "error" is returned as that error, its text bounded.
func DecodeReply(data []byte, v any, required ...string) error {
	names, err := scan(data)
	if err != nil {
		return fmt.Errorf("reading the guest's reply: %w", err)
	}
	if slices.Contains(names, "error") {
		var e ErrorReply
		if err := Decode(data, &e); err != nil {
			return fmt.Errorf("reading the guest's error: %w", err)
		}
		return e.Err()
	}
	if err := Decode(data, v, required...); err != nil {
		return fmt.Errorf("reading the guest's reply: %w", err)
	}
	return nil
}

// scan checks the shape of data before anything is built from it and returns
// the names of the object.
func scan(data []byte) ([]string, error) {
	trimmed := bytes.TrimLeft(data, " \t\r\n")
	if len(trimmed) == 0 {
		return nil, api.Errorf(api.ErrDamaged, "the message is empty, not a JSON object")
	}
	if trimmed[0] != '{' {
		return nil, api.Errorf(api.ErrDamaged, "the message is not a JSON object")
	}
	var names []string
	// Duplicates are found in the second pass, which knows the fields.
	dec := jsontext.NewDecoder(bytes.NewBuffer(trimmed), jsontext.AllowDuplicateNames(true))
	for tokens := 0; ; tokens++ {
		if tokens > maxTokens {
			return nil, api.Errorf(api.ErrDamaged, "the message holds more than %d values", maxTokens)
		}
		tok, err := dec.ReadToken()
		switch {
		case err == io.EOF && tokens > 0 && dec.StackDepth() == 0:
			return names, nil
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return nil, api.Errorf(api.ErrDamaged, "the message ends in the middle of a JSON object")
		case err != nil:
			return nil, api.Errorf(api.ErrDamaged, "the message is not a JSON object: %s", plain(err))
		case tokens > 0 && dec.StackDepth() == 0 && tok.Kind() != '}':
			return nil, api.Errorf(api.ErrDamaged, "bytes follow the JSON object")
		case dec.StackDepth() > maxDepth:
			return nil, api.Errorf(api.ErrDamaged, "the message nests deeper than %d levels", maxDepth)
		}
		if dec.StackDepth() == 1 && tok.Kind() == '"' {
			if _, n := dec.StackIndex(1); n%2 == 1 { // a name, not its value
				names = append(names, tok.String())
			}
		}
		if tokens > 0 && dec.StackDepth() == 0 {
			rest := bytes.TrimLeft(trimmed[dec.InputOffset():], " \t\r\n")
			if len(rest) > 0 {
				return nil, api.Errorf(api.ErrDamaged, "bytes follow the JSON object")
			}
			return names, nil
		}
	}
}

// plain shortens a library's error and drops the name of its package.
func plain(err error) string {
	text := err.Error()
	for _, prefix := range []string{"jsontext: ", "json: "} {
		text = strings.TrimPrefix(text, prefix)
	}
	return cut(text, 300)
}

// cut bounds s, which a peer may have chosen, and makes it valid UTF-8.
func cut(s string, limit int) string {
	if len(s) > limit {
		s = s[:limit] + "…"
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

// ReadLine reads from r up to a newline, which the result lacks. A line longer
// than limit bytes, newline included, is ErrDamaged, found before more than
// limit and r's buffer were read; an end without a newline is
// io.ErrUnexpectedEOF, an end at once io.EOF.
func ReadLine(r *bufio.Reader, limit int) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		if len(line)+len(part) > limit {
			return nil, api.Errorf(api.ErrDamaged, "a line is longer than %d bytes", limit)
		}
		line = append(line, part...)
		switch {
		case err == nil:
			return line[:len(line)-1], nil
		case errors.Is(err, bufio.ErrBufferFull):
		case errors.Is(err, io.EOF) && len(line) > 0:
			return nil, io.ErrUnexpectedEOF
		default:
			return nil, err
		}
	}
}

// Check bounds what the guest claims about a command. A negative exit code down
// to -64 is read as "ended by that signal", as other agents report it.
func (r *ExecReply) Check() error {
	if r.ExitCode < 0 && r.ExitCode >= -64 {
		r.ExitCode = 128 - r.ExitCode
	}
	if r.ExitCode < 0 || r.ExitCode > 255 {
		return api.Errorf(api.ErrDamaged, "the guest reports the exit code %d", r.ExitCode)
	}
	if r.DurationMS < 0 || r.DurationMS > math.MaxInt64/int64(1e6) {
		return api.Errorf(api.ErrDamaged, "the guest reports a duration of %d ms", r.DurationMS)
	}
	return nil
}

// Check bounds what the guest claims about an unpacked archive.
func (r *ExtractReply) Check() error {
	if r.EntryCount < 0 || r.BytesWritten < 0 {
		return api.Errorf(api.ErrDamaged, "the guest reports %d entries and %d bytes", r.EntryCount, r.BytesWritten)
	}
	return nil
}

// Check bounds what the guest claims about an archive that it is about to send
// or has sent: maxBytes is the caller's cap on the archive.
func (h *ExportHeader) Check(maxBytes int64) error {
	switch {
	case h.ArchiveSize < 0 || h.EntryCount < 0 || h.BytesWritten < 0:
		return api.Errorf(api.ErrDamaged, "the guest reports an archive of %d bytes with %d entries and %d bytes of content",
			h.ArchiveSize, h.EntryCount, h.BytesWritten)
	case h.ArchiveSize > maxBytes:
		return api.Errorf(api.ErrExhausted, "the guest's archive has %d bytes, the limit is %d", h.ArchiveSize, maxBytes)
	}
	switch h.ArtifactType {
	case "file", "directory", "symlink":
		return nil
	}
	return api.Errorf(api.ErrDamaged, "the guest reports the artifact type %q", cut(h.ArtifactType, 40))
}
