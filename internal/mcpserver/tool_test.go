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
		{`{"vcpu_count":4096}`, "parameter vcpu_count: 4096 is greater than 64"},
		{`{"network_policy":"wild"}`, "parameter network_policy: enum: wild does not equal any of: [off egress egress+published-ports]"},
		{`{"bogus":1}`, `there is no parameter "bogus"`},
	} {
		_, err := mcpserver.Arguments("workspace_create", []byte(c.arguments))
		if err == nil || strings.TrimPrefix(err.Error(), "calling workspace_create: ") != c.want {
			t.Errorf("%s: got %v, want %s", c.arguments, err, c.want)
		}
	}
}

// A hint names commands and flags; a model has tools and parameters.
func TestHintForModel(t *testing.T) {
	for _, c := range []struct{ hint, want string }{
		{"pyro workspace start web; its files are kept", "call workspace_start web; its files are kept"},
		{"delete some: pyro workspace snapshot list web", "delete some: call snapshot_list web"},
		{"run pyro workspace file read web", "call workspace_file_read web"},
		{"raise --timeout-seconds", "raise timeout_seconds"},
		// What no tool does is somebody else's to do.
		{"use pyro workspace prune", "use pyro workspace prune"},
		{"run pyro doctor", "run pyro doctor"},
		{"leave --memory out", "leave --memory out"},
		{"ask for less with --timeout-seconds; whoever runs the server can raise --timeout-seconds", "ask for less with timeout_seconds; whoever runs the server can raise --timeout-seconds"},
	} {
		got := mcpserver.ForModel(c.hint, "workspace_start", "snapshot_list", "workspace_file_read", "workspace_exec")
		if got != c.want {
			t.Errorf("%q becomes %q, want %q", c.hint, got, c.want)
		}
	}
}
