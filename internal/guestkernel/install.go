package guestkernel

import (
	"context"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/artifact"
)

func (s *Store) install(ctx context.Context, progress func(api.Progress)) (*artifact.Held, error) {
	return nil, api.Errorf(api.ErrUnsupported, "being written")
}
