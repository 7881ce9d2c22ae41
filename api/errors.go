package api

import (
	"context"
	"errors"
	"fmt"
)

// The error classes. Every failure that crosses a package or process boundary
// wraps exactly one of them, so a caller decides with [errors.Is] and a peer
// process can carry the decision as the short text of [Code].
var (
	// ErrInvalid means the request itself is wrong; repeating it cannot help.
	ErrInvalid = errors.New("invalid request")
	// ErrNotFound means the named thing does not exist.
	ErrNotFound = errors.New("not found")
	// ErrExists means the name or output is already taken.
	ErrExists = errors.New("already exists")
	// ErrState means the thing exists but is in a state that forbids the request.
	ErrState = errors.New("not possible in this state")
	// ErrBusy means somebody else holds what the request needs; retrying can help.
	ErrBusy = errors.New("busy")
	// ErrUnsupported means this host, engine or peer cannot do it.
	ErrUnsupported = errors.New("not supported")
	// ErrUnavailable means something that should answer does not: a guest that
	// died, a mirror that cannot be reached, a tool that is missing.
	ErrUnavailable = errors.New("unavailable")
	// ErrExhausted means a bound was reached: disk space, memory, a size limit.
	ErrExhausted = errors.New("limit reached")
	// ErrDenied means policy or permissions forbid it.
	ErrDenied = errors.New("denied")
	// ErrDamaged means stored or received data fails its checks.
	ErrDamaged = errors.New("damaged")
	// ErrCanceled means the caller gave up. It matches [context.Canceled].
	ErrCanceled error = contextError{"canceled", context.Canceled}
	// ErrDeadline means time ran out. It matches [context.DeadlineExceeded].
	ErrDeadline error = contextError{"deadline exceeded", context.DeadlineExceeded}
	// ErrInternal means a fault of pyro itself.
	ErrInternal = errors.New("internal error")
)

// contextError is a class that also matches the context package's error, so
// that code written against either keeps working across a process boundary.
type contextError struct {
	text string
	ctx  error
}

func (e contextError) Error() string        { return e.text }
func (e contextError) Is(target error) bool { return target == e.ctx }

// classes lists every class with its code, in the order in which [Code] looks
// for them. A code is part of the wire formats and of --json: never reuse one.
var classes = []struct {
	code string
	err  error
}{
	{"invalid", ErrInvalid},
	{"not_found", ErrNotFound},
	{"exists", ErrExists},
	{"state", ErrState},
	{"busy", ErrBusy},
	{"unsupported", ErrUnsupported},
	{"exhausted", ErrExhausted},
	{"denied", ErrDenied},
	{"damaged", ErrDamaged},
	{"unavailable", ErrUnavailable},
	{"canceled", ErrCanceled},
	{"deadline", ErrDeadline},
	{"internal", ErrInternal},
}

// Code returns the stable short name of err's class, "internal" where err
// carries none, and "" for nil.
func Code(err error) string {
	if err == nil {
		return ""
	}
	for _, c := range classes {
		if errors.Is(err, c.err) {
			return c.code
		}
	}
	switch {
	case errors.Is(err, context.Canceled):
		return "canceled"
	case errors.Is(err, context.DeadlineExceeded):
		return "deadline"
	}
	return "internal"
}

// ClassOf returns the class that code names, ErrInternal for an unknown code:
// codes arrive from other processes and, in the guest's case, from a liar.
func ClassOf(code string) error {
	for _, c := range classes {
		if c.code == code {
			return c.err
		}
	}
	return ErrInternal
}

// Codes returns every code, for documentation and for tests that walk them.
func Codes() []string {
	out := make([]string, len(classes))
	for i, c := range classes {
		out[i] = c.code
	}
	return out
}

// Errorf returns an error whose whole text is the formatted message and which
// belongs to class. Use it at the origin of a failure, where the class's own
// words would only repeat the message; use fmt.Errorf with %w everywhere above.
func Errorf(class error, format string, args ...any) error {
	return &classified{class: class, err: fmt.Errorf(format, args...)}
}

type classified struct {
	class error
	err   error
}

func (e *classified) Error() string   { return e.err.Error() }
func (e *classified) Unwrap() []error { return []error{e.class, e.err} }

// WithHint attaches the way out to err: one sentence that says what to do. The
// hint is not part of the error text; faces print it on its own line.
// A nil err stays nil.
func WithHint(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return &hinted{err: err, hint: fmt.Sprintf(format, args...)}
}

type hinted struct {
	err  error
	hint string
}

func (e *hinted) Error() string { return e.err.Error() }
func (e *hinted) Unwrap() error { return e.err }

// Hint returns the outermost hint attached to err, or "".
func Hint(err error) string {
	var h *hinted
	if errors.As(err, &h) {
		return h.hint
	}
	return ""
}

// WireError is an error as it crosses a process boundary or appears in --json.
type WireError struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Hint    string `json:"hint,omitempty"`
}

// ToWire converts err; a nil err gives nil.
func ToWire(err error) *WireError {
	if err == nil {
		return nil
	}
	return &WireError{Code: Code(err), Message: err.Error(), Hint: Hint(err)}
}

// Err converts back to an error of the same class, text and hint. A nil
// receiver gives nil.
func (w *WireError) Err() error {
	if w == nil {
		return nil
	}
	err := Errorf(ClassOf(w.Code), "%s", w.Message)
	if w.Hint != "" {
		err = WithHint(err, "%s", w.Hint)
	}
	return err
}
