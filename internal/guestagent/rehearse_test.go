package guestagent_test

import (
	"testing"

	"github.com/pyro-mcp/pyro/internal/guestagent"
)

func TestRehearse(t *testing.T) {
	if err := guestagent.Rehearse(); err != nil {
		t.Error(err)
	}
}
