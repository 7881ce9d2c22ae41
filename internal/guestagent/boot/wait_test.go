package boot

import (
	"bytes"
	"errors"
	"testing"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

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
