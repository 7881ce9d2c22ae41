package workspace

import (
	"context"

	"github.com/pyro-mcp/pyro/api"
)

// ApplyPatch applies a patch to the files of a running workspace: all of it or
// nothing.
func (m *Manager) ApplyPatch(ctx context.Context, ref string, text []byte) (*api.PatchResult, error) {
	return nil, api.ErrUnsupported
}
