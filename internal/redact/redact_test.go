package redact_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/redact"
)

// naive is the plainest way to say what a Set does to text: every byte of every
// occurrence goes, and what overlaps has one mark.
func naive(text string, values []string) string {
	type span struct{ start, end int }
	var found []span
	for _, v := range values {
		if len(v) < redact.MinLength {
			continue
		}
		for i := range len(text) {
			if strings.HasPrefix(text[i:], v) {
				found = append(found, span{i, i + len(v)})
			}
		}
	}
	slices.SortFunc(found, func(a, b span) int { return a.start - b.start })
	var out strings.Builder
	at := 0
	for i := 0; i < len(found); {
		start, end := found[i].start, found[i].end
		for i++; i < len(found) && found[i].start < end; i++ {
			end = max(end, found[i].end)
		}
		out.WriteString(text[at:start] + redact.Mark)
		at = end
	}
	return out.String() + text[at:]
}

var tests = []struct {
	name   string
	values []string
	text   string
	want   string
}{
	{"nothing in text", []string{"hunter2hunter2"}, "hunter2 hunter2", "hunter2 hunter2"},
	{"one", []string{"hunter2hunter2"}, "token=hunter2hunter2\n", "token=[REDACTED]\n"},
	{"whole text", []string{"hunter2hunter2"}, "hunter2hunter2", "[REDACTED]"},
	{"adjacent", []string{"abcdefgh", "12345678"}, "abcdefgh12345678abcdefgh", "[REDACTED][REDACTED][REDACTED]"},
	{"nested", []string{"cdefghij", "abcdefghijkl"}, "abcdefghijkl cdefghij", "[REDACTED] [REDACTED]"},
	{"longer one broken off", []string{"cdefghij", "abcdefghijkl"}, "abcdefghijk", "ab[REDACTED]k"},
	{"beginning of longer", []string{"abcdefgh", "abcdefghijkl"}, "abcdefghijk", "[REDACTED]ijk"},
	{"overlapping", []string{"abcdefgh", "efghijkl"}, "xabcdefghijklx", "x[REDACTED]x"},
	{"overlapping itself", []string{"abababab"}, "xabababababx", "x[REDACTED]x"},
	{"repeated beginning", []string{"aaaaaaab"}, "aaaaaaaaaaaab", "aaaaa[REDACTED]"},
	{"binary", []string{"\x00\xff\x80\x00\xc3\x28\x00\x01"}, "a\x00\x00\xff\x80\x00\xc3\x28\x00\x01\xff", "a\x00[REDACTED]\xff"},
	{"short values", []string{"", "1234567"}, "1234567", "1234567"},
	{"lines", []string{"--begin--\nabc\n--end--\n"}, "--begin--\nabc\n--end--\n.", "[REDACTED]."},
	{"lines on a terminal", []string{"--begin--\nabc\n--end--\n"}, "--begin--\r\nabc\r\n--end--\r\n.", "[REDACTED]."},
	{"lines without the last end", []string{"--begin--\nabc\n--end--\n"}, "--begin--\nabc\n--end--.", "[REDACTED]."},
	{"lines without the last end on a terminal", []string{"--begin--\nabc\n--end--\n"}, "--begin--\r\nabc\r\n--end--.", "[REDACTED]."},
	{"lines with carriage returns", []string{"--begin--\r\nabc\r\n"}, "--begin--\nabc\n. --begin--\r\nabc\r\n. --begin--\r\r\nabc\r\r\n.", "[REDACTED]. [REDACTED]. [REDACTED]."},
	{"lines with carriage returns, without the last end", []string{"--begin--\r\nabc\r\n"}, "--begin--\nabc.", "[REDACTED]."},
	{"text of the mark", []string{"REDACTED"}, "[REDACTED] REDACTED", "[[REDACTED]] [REDACTED]"},
}

func TestString(t *testing.T) {
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := redact.New(tt.values...).String(tt.text); got != tt.want {
				t.Errorf("String(%q) = %q, want %q", tt.text, got, tt.want)
			}
		})
	}
	if got := (*redact.Set)(nil).String("text"); got != "text" {
		t.Errorf("a nil set makes %q of text", got)
	}
}

// values returns up to five values of few different bytes, so that they share
// beginnings, lie in each other and overlap, and a text with some of them.
func random(r *rand.Rand) (values []string, text string) {
	letters := "ab\x00\xffcd"[:2+r.IntN(5)]
	word := func(n int) string {
		b := make([]byte, n)
		for i := range b {
			b[i] = letters[r.IntN(len(letters))]
		}
		return string(b)
	}
	for range 1 + r.IntN(5) {
		v := word(redact.MinLength + r.IntN(6))
		if len(values) > 0 && r.IntN(3) == 0 { // one that overlaps or holds another
			other := values[r.IntN(len(values))]
			v = word(r.IntN(4)) + other[r.IntN(len(other)):] + word(redact.MinLength)
		}
		values = append(values, v)
	}
	for range r.IntN(12) {
		v := values[r.IntN(len(values))]
		switch r.IntN(4) {
		case 0:
			text += word(r.IntN(5))
		case 1:
			text += v[r.IntN(len(v)):]
		case 2:
			text += v[:r.IntN(len(v))]
		case 3:
			text += v
		}
	}
	return values, text
}

func TestStringEqualsNaive(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	marks := 0
	for range 20000 {
		values, text := random(r)
		want := naive(text, values)
		marks += strings.Count(want, redact.Mark)
		if got := redact.New(values...).String(text); got != want {
			t.Fatalf("values %q: String(%q) = %q, want %q", values, text, got, want)
		}
	}
	if marks < 20000 {
		t.Errorf("only %d values in all the texts", marks)
	}
}

func TestEmpty(t *testing.T) {
	for _, tt := range []struct {
		name  string
		set   *redact.Set
		empty bool
	}{
		{"nil", nil, true},
		{"no value", redact.New(), true},
		{"short value", redact.New("1234567"), true},
		{"value", redact.New("12345678"), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := tt.set.Empty(); got != tt.empty {
				t.Errorf("Empty() = %v, want %v", got, tt.empty)
			}
		})
	}
}

func TestSetDoesNotPrintValues(t *testing.T) {
	set := redact.New("hunter2hunter2")
	for _, format := range []string{"%v", "%+v", "%#v", "%s", "%q", "%d", "%x"} {
		if got := fmt.Sprintf(format, set); got != "redact.Set" {
			t.Errorf("%s prints %s", format, got)
		}
	}
}

// A set is used by all streams of a workspace; -race is the judge.
func TestConcurrentUse(t *testing.T) {
	set := redact.New("hunter2hunter2", "abcdefgh")
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 100 {
				if got := set.String("abcdefgh hunter2hunter2"); got != "[REDACTED] [REDACTED]" {
					t.Errorf("String gives %q", got)
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestError(t *testing.T) {
	set := redact.New("hunter2hunter2")
	if err := set.Error(nil); err != nil {
		t.Errorf("nil becomes %v", err)
	}
	clean := fmt.Errorf("reading: %w", fs.ErrNotExist)
	if got := set.Error(clean); got != clean {
		t.Errorf("an error without a value becomes %v", got)
	}
	for _, code := range api.Codes() {
		t.Run(code, func(t *testing.T) {
			cause := errors.New("login with hunter2hunter2")
			err := api.WithHint(fmt.Errorf("pushing: %w", api.Errorf(api.ClassOf(code), "%w", cause)), "rotate hunter2hunter2")
			got := set.Error(err)
			if got.Error() != "pushing: login with [REDACTED]" || api.Hint(got) != "rotate [REDACTED]" {
				t.Errorf("text %q, hint %q", got, api.Hint(got))
			}
			if api.Code(got) != code || !errors.Is(got, api.ClassOf(code)) {
				t.Errorf("class is %q", api.Code(got))
			}
			if errors.Is(got, cause) || strings.Contains(fmt.Sprintf("%+v %#v", got, errors.Unwrap(got)), "hunter2") {
				t.Error("the value is still in the chain")
			}
		})
	}
	hinted := api.WithHint(api.Errorf(api.ErrDenied, "refused"), "rotate hunter2hunter2")
	if got := set.Error(hinted); api.Hint(got) != "rotate [REDACTED]" || !errors.Is(got, api.ErrDenied) {
		t.Errorf("hint %q of %v", api.Hint(got), got)
	}
	late := fmt.Errorf("hunter2hunter2: %w", context.DeadlineExceeded)
	if got := set.Error(late); !errors.Is(got, context.DeadlineExceeded) {
		t.Errorf("%v is no exceeded deadline", got)
	}
}
