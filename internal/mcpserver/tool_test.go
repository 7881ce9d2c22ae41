package mcpserver_test

import (
	"strings"
	"testing"

	"github.com/pyro-mcp/pyro/internal/mcpserver"
)

// A model is told what is wrong with a parameter in words it can act on.
func TestWrongArguments(t *testing.T) {
	for _, c := range []struct{ arguments, want string }{
		{`{"ttl_seconds":-1}`, "parameter ttl_seconds: -1 is less than 0"},
		{`{"vcpu_count":4096}`, "parameter vcpu_count: 4096 is greater than 1024"},
		{`{"network_policy":"wild"}`, "parameter network_policy: enum: wild does not equal any of: [off egress egress+published-ports]"},
		{`{"bogus":1}`, `there is no parameter "bogus"`},
	} {
		_, err := mcpserver.Arguments("workspace_create", []byte(c.arguments))
		if err == nil || strings.TrimPrefix(err.Error(), "calling workspace_create: ") != c.want {
			t.Errorf("%s: got %v, want %s", c.arguments, err, c.want)
		}
	}
}
