package api_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"testing"

	"github.com/pyro-mcp/pyro/api"
)

// Every class survives the way through another process: code, text and hint.
func TestEveryClassCrossesTheWire(t *testing.T) {
	seen := map[string]bool{}
	for _, code := range api.Codes() {
		t.Run(code, func(t *testing.T) {
			if seen[code] {
				t.Fatalf("code %q stands for two classes", code)
			}
			seen[code] = true
			class := api.ClassOf(code)
			err := api.WithHint(fmt.Errorf("asking: %w", api.Errorf(class, "the reason is %d", 7)), "do %s", "this")
			b, jsonErr := json.Marshal(api.ToWire(err))
			if jsonErr != nil {
				t.Fatal(jsonErr)
			}
			var w api.WireError
			if err := json.Unmarshal(b, &w); err != nil {
				t.Fatal(err)
			}
			back := w.Err()
			if !errors.Is(back, class) || api.Code(back) != code {
				t.Errorf("came back as %q", api.Code(back))
			}
			if back.Error() != "asking: the reason is 7" || api.Hint(back) != "do this" {
				t.Errorf("came back as %q, hint %q", back, api.Hint(back))
			}
			for _, other := range api.Codes() {
				if other != code && errors.Is(back, api.ClassOf(other)) {
					t.Errorf("is also of class %q", other)
				}
			}
		})
	}
}

func TestContextErrorsAreClasses(t *testing.T) {
	for _, test := range []struct {
		name string
		err  error
		code string
		is   error
	}{
		{"Canceled", fmt.Errorf("x: %w", context.Canceled), "canceled", context.Canceled},
		{"DeadlineExceeded", fmt.Errorf("x: %w", context.DeadlineExceeded), "deadline", context.DeadlineExceeded},
		{"ErrCanceled", api.ErrCanceled, "canceled", context.Canceled},
		{"ErrDeadline", api.Errorf(api.ErrDeadline, "late"), "deadline", context.DeadlineExceeded},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := api.Code(test.err); got != test.code {
				t.Errorf("Code = %q, want %q", got, test.code)
			}
			if !errors.Is(test.err, test.is) {
				t.Errorf("does not match %v", test.is)
			}
		})
	}
}

func TestErrorfKeepsTheCause(t *testing.T) {
	err := api.Errorf(api.ErrNotFound, "opening image: %w", fs.ErrNotExist)
	if !errors.Is(err, api.ErrNotFound) || !errors.Is(err, fs.ErrNotExist) {
		t.Error("class or cause is lost")
	}
	if api.Code(errors.New("plain")) != "internal" || api.Code(nil) != "" || api.ClassOf("no-such-code") != api.ErrInternal {
		t.Error("errors without a class are not internal")
	}
	if api.WithHint(nil, "x") != nil || api.ToWire(nil) != nil || (*api.WireError)(nil).Err() != nil {
		t.Error("nil does not stay nil")
	}
}
