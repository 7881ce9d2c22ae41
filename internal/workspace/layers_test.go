package workspace

import (
	"testing"

	"github.com/pyro-mcp/pyro/internal/store"
)

func TestMergeable(t *testing.T) {
	snap := func(layer string, chain ...string) *store.Snapshot {
		return &store.Snapshot{Layer: layer, Chain: chain}
	}
	for _, test := range []struct {
		name      string
		chain     []string
		snapshots []*store.Snapshot
		want      int
	}{
		{"OneLayer", []string{"a"}, nil, -1},
		{"SeedStays", []string{"seed:x", "a"}, nil, -1},
		{"NobodysLayer", []string{"a", "b"}, nil, 0},
		{"ASnapshotsOwn", []string{"a", "b"}, []*store.Snapshot{snap("a")}, -1},
		{"BetweenTwoSnapshots", []string{"a", "b", "c", "d"}, []*store.Snapshot{snap("a"), snap("c", "a", "b")}, 1},
		{"AnotherSnapshotBranchesOff", []string{"a", "b", "c"}, []*store.Snapshot{snap("a"), snap("x", "a", "b")}, -1},
		{"BaselineWithoutALayer", []string{"a", "b"}, []*store.Snapshot{snap("")}, 0},
		{"SnapshotEndsInTheChain", []string{"a", "b"}, []*store.Snapshot{snap("", "a")}, -1},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := mergeable(test.chain, test.snapshots); got != test.want {
				t.Errorf("mergeable = %d, want %d", got, test.want)
			}
		})
	}
}
