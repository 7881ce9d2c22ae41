package workspace

import (
	"context"
	"fmt"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/artifact"
)

// The memory of a machine that was saved lies beside the layers of disks, as a
// file or a directory of files, whatever its engine makes.

// newMemory draws the name of a memory.
func newMemory() string { return newID() + ".memory" }

// memoryPath is the path of the memory of that name, "" for none.
func (m *Manager) memoryPath(name string) string {
	if name == "" {
		return ""
	}
	return m.state.Layer(name)
}

// checkMemorySaved refuses to write the memory of a workspace with secrets. The
// hint says what can be done instead.
func (h *held) checkMemorySaved(hint string) error {
	if len(h.Secrets) == 0 {
		return nil
	}
	return api.WithHint(api.Errorf(api.ErrDenied, "the workspace has secrets, and they would lie in the file of its memory"), "%s", hint)
}

// memoryDigest identifies the content of a memory.
func (m *Manager) memoryDigest(ctx context.Context, name string) (string, error) {
	digest, err := artifact.HashTree(ctx, m.memoryPath(name))
	if err != nil {
		return "", fmt.Errorf("reading the saved memory: %w", err)
	}
	return digest, nil
}

// checkMemory refuses a memory that is not what was saved: whatever is in it
// would run. No memory is right.
func (m *Manager) checkMemory(ctx context.Context, name, digest string) error {
	if name == "" {
		return nil
	}
	now, err := m.memoryDigest(ctx, name)
	if err != nil {
		return err
	}
	if now != digest {
		return api.Errorf(api.ErrDamaged, "the memory in %s is not what was saved there: its digest is %s and was %s", m.memoryPath(name), now, digest)
	}
	return nil
}
