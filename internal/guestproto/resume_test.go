package guestproto_test

import (
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

func TestResumeCheck(t *testing.T) {
	entropy := func(n int) []byte { return make([]byte, n) }
	for name, test := range map[string]struct {
		resume guestproto.Resume
		ok     bool
	}{
		"Least":         {guestproto.Resume{TimeNS: 1, Entropy: entropy(32)}, true},
		"Most":          {guestproto.Resume{TimeNS: 1, Entropy: entropy(512), Hostname: strings.Repeat("h", 63), NewIdentity: true}, true},
		"NoTime":        {guestproto.Resume{Entropy: entropy(32)}, false},
		"NegativeTime":  {guestproto.Resume{TimeNS: -1, Entropy: entropy(32)}, false},
		"NoEntropy":     {guestproto.Resume{TimeNS: 1}, false},
		"LittleEntropy": {guestproto.Resume{TimeNS: 1, Entropy: entropy(31)}, false},
		"MuchEntropy":   {guestproto.Resume{TimeNS: 1, Entropy: entropy(513)}, false},
		"LongName":      {guestproto.Resume{TimeNS: 1, Entropy: entropy(32), Hostname: strings.Repeat("h", 64)}, false},
		"TwoNames":      {guestproto.Resume{TimeNS: 1, Entropy: entropy(32), Hostname: "a b"}, false},
		"TwoLines":      {guestproto.Resume{TimeNS: 1, Entropy: entropy(32), Hostname: "a\nb"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			err := test.resume.Check()
			if test.ok && err != nil || !test.ok && !errors.Is(err, api.ErrInvalid) {
				t.Errorf("Check: %v", err)
			}
		})
	}
}

func TestReadResumeLine(t *testing.T) {
	const line = `{"action":"resume"}`
	for name, in := range map[string]io.Reader{
		"Whole":   strings.NewReader(line + "\n"),
		"InBytes": iotest.OneByteReader(strings.NewReader(line + "\n")),
	} {
		t.Run(name, func(t *testing.T) {
			got, err := guestproto.ReadResumeLine(in, api.ErrInvalid)
			if err != nil || string(got) != line {
				t.Errorf("%q, %v; want %q", got, err, line)
			}
		})
	}
	for name, test := range map[string]struct {
		in   string
		want error
	}{
		"More":    {line + "\nx", api.ErrInvalid},
		"TooLong": {strings.Repeat("x", guestproto.MaxResumeLine+1) + "\n", api.ErrInvalid},
		"Ends":    {line, io.EOF},
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := guestproto.ReadResumeLine(strings.NewReader(test.in), api.ErrInvalid); !errors.Is(err, test.want) {
				t.Errorf("%q, %v; want %v", got, err, test.want)
			}
		})
	}
}

func TestReadResumeLineAsAnswer(t *testing.T) {
	for name, test := range map[string]struct {
		in   string
		want string
		ok   bool
	}{
		"Line":  {"{}\n", "{}", true},
		"Empty": {"", "", false},
		"More":  {"{}\n{}\n", "", false},
		"Long":  {strings.Repeat("x", guestproto.MaxResumeLine) + "\n", "", false},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := guestproto.ReadResumeLine(strings.NewReader(test.in), api.ErrDamaged)
			if (err == nil) != test.ok || string(got) != test.want {
				t.Errorf("%q, %v", got, err)
			}
			if name != "Empty" && err != nil && !errors.Is(err, api.ErrDamaged) {
				t.Errorf("%v, want ErrDamaged", err)
			}
		})
	}
}
