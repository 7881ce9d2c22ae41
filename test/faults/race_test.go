package faults_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
)

// raceRounds is how often each pair is raced.
func raceRounds() int {
	switch {
	case engineName() == "qemu":
		return 4
	case thorough():
		return 20
	}
	return 2
}

// acceptable are the classes that the loser of a race may report: the others
// mean that two commands met where they must not.
var acceptable = []string{"busy", "state", "not_found", "exists", "canceled", "unavailable"}

// race runs commands at once and checks how they end.
func (l *lab) race(commands ...[]string) []result {
	l.Helper()
	results := make([]result, len(commands))
	var wg sync.WaitGroup
	for i, args := range commands {
		wg.Go(func() {
			cmd := l.command(slices.Insert(slices.Clone(args), 2, "--json")...)
			results[i] = finish(l, cmd)
		})
	}
	wg.Wait()
	for _, r := range results {
		if r.code == 0 {
			continue
		}
		if code := errorCode(r); !slices.Contains(acceptable, code) {
			l.Errorf("a loser reported %q: %s", code, r)
		} else if code == "busy" && r.took > within(10*time.Second) {
			l.Errorf("a loser was told after %v: %s", r.took, r)
		}
	}
	return results
}

// winners counts the commands that succeeded.
func winners(results []result) int {
	n := 0
	for _, r := range results {
		if r.code == 0 {
			n++
		}
	}
	return n
}

// oneMachine checks that the workspace has one supervisor at most.
func (l *lab) oneMachine(name string) {
	l.Helper()
	ws := l.status(name)
	if ws == nil {
		return
	}
	supervisors := 0
	for _, p := range l.processesOfMachine(ws.WorkspaceID) {
		if strings.Contains(p, "pyro supervise") {
			supervisors++
		}
	}
	if supervisors > 1 {
		l.Errorf("workspace %s has %d supervisors", name, supervisors)
	}
}

// TestRacePairs lets two processes change one workspace at the same time.
func TestRacePairs(t *testing.T) {
	out := func(l *lab) string { return filepath.Join(l.dir, fmt.Sprintf("out-%d", rand.Int64())) }
	pairs := map[string]func(l *lab) [][]string{
		"start start": func(*lab) [][]string {
			return [][]string{{"workspace", "start", "w"}, {"workspace", "start", "w"}}
		},
		"stop start": func(*lab) [][]string {
			return [][]string{{"workspace", "stop", "w"}, {"workspace", "start", "w"}}
		},
		"exec stop": func(*lab) [][]string {
			return [][]string{{"workspace", "exec", "w", "--", "true"}, {"workspace", "stop", "w"}}
		},
		"export reset": func(l *lab) [][]string {
			return [][]string{{"workspace", "export", "w", "/workspace", "--output", out(l)}, {"workspace", "reset", "w"}}
		},
		"reset reset": func(*lab) [][]string {
			return [][]string{{"workspace", "reset", "w"}, {"workspace", "reset", "w"}}
		},
		"snapshot reset": func(*lab) [][]string {
			return [][]string{{"workspace", "snapshot", "create", "w", fmt.Sprintf("s%d", rand.Int64())}, {"workspace", "reset", "w"}}
		},
		"snapshot snapshot": func(*lab) [][]string {
			return [][]string{{"workspace", "snapshot", "create", "w", "same"}, {"workspace", "snapshot", "create", "w", "same"}}
		},
		"rename rename": func(*lab) [][]string {
			return [][]string{{"workspace", "update", "w", "--label", "a=1"}, {"workspace", "update", "w", "--label", "b=2"}}
		},
		"create create": func(l *lab) [][]string { return [][]string{l.createArgs("x"), l.createArgs("x")} },
		"delete delete": func(l *lab) [][]string {
			l.create("x")
			return [][]string{{"workspace", "delete", "x"}, {"workspace", "delete", "x"}}
		},
		"delete exec": func(l *lab) [][]string {
			l.create("x")
			return [][]string{{"workspace", "delete", "x"}, {"workspace", "exec", "x", "--", "true"}}
		},
		"delete prune": func(l *lab) [][]string {
			l.create("x")
			return [][]string{{"workspace", "delete", "x"}, {"workspace", "prune"}}
		},
		"create prune": func(l *lab) [][]string { return [][]string{l.createArgs("x"), {"workspace", "prune"}} },
	}
	for name, commands := range pairs {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			l.create("w")
			for range raceRounds() {
				// Winners differ from round to round: whatever the one before left.
				if !strings.Contains(name, "start") {
					mustStart(l)
				}
				results := l.race(commands(l)...)
				switch n := winners(results); {
				case n == 0:
					l.Fatalf("nobody won: %v", results)
				case n > 1 && (name == "create create" || name == "delete delete" || name == "snapshot snapshot"):
					l.Fatalf("both won: %v", results)
				}
				l.oneMachine("w")
				if name == "snapshot snapshot" {
					l.ok("workspace", "snapshot", "delete", "w", "same")
				}
				l.run("workspace", "delete", "x")
				if l.Failed() {
					break
				}
			}
			if name == "rename rename" {
				if ws := l.status("w"); ws.Labels["a"] != "1" || ws.Labels["b"] != "2" {
					l.Errorf("labels %v: an update was lost", ws.Labels)
				}
			}
			for _, o := range mustGlob(l, "out-*") {
				os.RemoveAll(o)
			}
			l.check()
		})
	}
}

func mustGlob(l *lab, pattern string) []string {
	l.Helper()
	found, err := filepath.Glob(filepath.Join(l.dir, pattern))
	if err != nil {
		l.Fatal(err)
	}
	return found
}

// TestRaceAll sends fifty commands at one workspace at once.
func TestRaceAll(t *testing.T) {
	thoroughOnly(t)
	l := newLab(t)
	l.create("w")
	var commands [][]string
	for i := range 50 {
		verb := []string{"start", "stop", "reset", "start", "stop"}[i%5]
		commands = append(commands, []string{"workspace", verb, "w"})
	}
	if n := winners(l.race(commands...)); n == 0 {
		t.Error("nobody won")
	}
	l.oneMachine("w")
	l.check()
	deletes := slices.Repeat([][]string{{"workspace", "delete", "w"}}, 20)
	results := l.race(deletes...)
	// Those who came too late to find it are told so, one deletes.
	if n := winners(results); n != 1 {
		t.Errorf("%d of 20 deletions say that they deleted the workspace", n)
	}
	l.check()
}

// TestRaceKilled kills commands at random moments while others go on.
func TestRaceKilled(t *testing.T) {
	// Half of what the verbs take, so that they are killed in the middle.
	rounds, latest := 60, 80*time.Millisecond
	if engineName() == "qemu" {
		rounds, latest = 20, time.Second
	}
	l := newLab(t)
	l.create("w")
	l.ok("workspace", "snapshot", "create", "w", "first")
	verbs := [][]string{
		{"workspace", "start", "w"}, {"workspace", "stop", "w"}, {"workspace", "reset", "w", "--snapshot", "first"},
		{"workspace", "snapshot", "create", "w", "more"}, {"workspace", "snapshot", "delete", "w", "more"}, {"workspace", "list"},
	}
	for range rounds {
		var wg sync.WaitGroup
		for range 3 {
			args := verbs[rand.IntN(len(verbs))]
			after := rand.N(latest)
			wg.Go(func() {
				cmd := l.command(args...)
				if err := cmd.Start(); err != nil {
					l.Error(err)
					return
				}
				timer := time.AfterFunc(after, func() { _ = cmd.Process.Signal(syscall.SIGKILL) })
				_ = cmd.Wait() // killed or refused, most of them
				timer.Stop()
			})
		}
		wg.Wait()
	}
	l.check()
	var list struct{ Snapshots []api.Snapshot }
	l.json(&list, "workspace", "snapshot", "list", "w", "--json")
	if !slices.ContainsFunc(list.Snapshots, func(s api.Snapshot) bool { return s.SnapshotName == "first" }) {
		l.Errorf("the first snapshot is gone: %+v", list.Snapshots)
	}
	l.ok("workspace", "reset", "w", "--snapshot", "first")
	if got := l.exec("w", "cat seeded"); got != "from the seed\n" {
		l.Errorf("after all, the first snapshot holds %q", got)
	}
	l.check()
}
