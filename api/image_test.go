package api_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
)

func TestImageEnviron(t *testing.T) {
	c := api.ImageConfig{Env: []string{"PATH=/opt/bin:/bin", "A=1", "B=x=y"}}
	over := map[string]string{"A": "2", "C": ""}
	want := map[string]string{"PATH": "/opt/bin:/bin", "A": "2", "B": "x=y", "C": ""}
	if d := cmp.Diff(want, c.Environ(over)); d != "" {
		t.Error(d)
	}
	if len(over) != 2 {
		t.Errorf("the argument was changed to %v", over)
	}
}
