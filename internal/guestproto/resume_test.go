package guestproto_test

import (
	"errors"
	"strings"
	"testing"

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
