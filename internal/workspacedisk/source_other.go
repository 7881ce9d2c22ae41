//go:build !linux

package workspacedisk

import (
	"os"

	"github.com/pyro-mcp/pyro/api"
)

// NextData counts everything as data.
func (l *rawLayer) NextData(int64) (end int64, zero bool, err error) { return l.size, false, nil }

func lockShared(f *os.File) error { return noLocks(f) }

func lockLayer(f *os.File) error { return noLocks(f) }

func probeExclusive(f *os.File) error { return noLocks(f) }

func noLocks(f *os.File) error {
	return api.Errorf(api.ErrUnsupported, "whether a machine uses %s cannot be told on this system", f.Name())
}

func punchHole(f *os.File, _, _ int64) error {
	return api.Errorf(api.ErrUnsupported, "holes cannot be made in %s on this system", f.Name())
}
