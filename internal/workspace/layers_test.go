package workspace

import (
	"slices"
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
		{"TheHighestFirst", []string{"a", "b", "c", "d"}, nil, 2},
		{"NothingAboveYet", []string{"a", "b", "new"}, nil, 0},
		{"AForkHasItToo", []string{"shared", "b"}, nil, -1},
		{"BelowIsShared", []string{"shared", "b", "c"}, nil, 1},
		{"TooLongToShare", append(slices.Repeat([]string{"seed:x"}, compactAt-1), "shared", "b", "new"), nil, compactAt - 1},
		{"ASnapshotsOwn", []string{"a", "b"}, []*store.Snapshot{snap("a")}, -1},
		{"BetweenTwoSnapshots", []string{"a", "b", "c", "d"}, []*store.Snapshot{snap("a"), snap("c", "a", "b")}, 1},
		{"AnotherSnapshotBranchesOff", []string{"a", "b", "c"}, []*store.Snapshot{snap("a"), snap("x", "a", "b")}, -1},
		{"BaselineWithoutALayer", []string{"a", "b"}, []*store.Snapshot{snap("")}, 0},
		{"SnapshotEndsInTheChain", []string{"a", "b"}, []*store.Snapshot{snap("", "a")}, -1},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := mergeable(test.chain, test.snapshots, map[string]bool{"shared": true}, func(layer string) bool { return layer != "new" }); got != test.want {
				t.Errorf("mergeable = %d, want %d", got, test.want)
			}
		})
	}
}
