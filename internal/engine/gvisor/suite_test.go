package gvisor_test

import (
	"testing"

	"github.com/pyro-mcp/pyro/internal/engine/enginetest"
)

func TestSuite(t *testing.T) {
	e := newEngine(t)
	enginetest.Run(t, enginetest.Subject{Engine: e, Spec: newSpec(t)})
}
