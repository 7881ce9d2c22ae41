package boot

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

func TestReadResumeLine(t *testing.T) {
	const line = `{"action":"resume"}`
	for name, in := range map[string]io.Reader{
		"Whole":   strings.NewReader(line + "\n"),
		"InBytes": iotest.OneByteReader(strings.NewReader(line + "\n")),
	} {
		t.Run(name, func(t *testing.T) {
			got, err := readResumeLine(in)
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
			if got, err := readResumeLine(strings.NewReader(test.in)); !errors.Is(err, test.want) {
				t.Errorf("%q, %v; want %v", got, err, test.want)
			}
		})
	}
}

func TestAnswer(t *testing.T) {
	for name, err := range map[string]error{"Good": nil, "Bad": api.Errorf(api.ErrDamaged, "mounting the root disk: it is none")} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			if err := answer(&out, err); err != nil {
				t.Fatal(err)
			}
			var reply guestproto.ResumeReply
			got := guestproto.DecodeReply(bytes.TrimSuffix(out.Bytes(), []byte("\n")), &reply, "ok")
			if (got == nil) != (err == nil) || err != nil && !errors.Is(got, api.ErrDamaged) || err == nil && !reply.OK {
				t.Errorf("%q is read as %+v, %v", out.String(), reply, got)
			}
		})
	}
}
