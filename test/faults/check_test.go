package faults_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine/host"
	"github.com/pyro-mcp/pyro/internal/statedir"
	"github.com/pyro-mcp/pyro/internal/store"
)

// check holds what must be true after any fault, as soon as one command has
// run:
//
//   - listing answers at once;
//   - every workspace is in a state that lasts, and that is what it is in;
//   - after a prune nothing is without an owner: no process, directory, layer,
//     seed, loop device or file;
//   - the bystander has noticed nothing.
func (l *lab) check() {
	l.Helper()
	began := time.Now()
	all := l.list()
	if took := time.Since(began); took > within(5*time.Second) {
		l.Errorf("listing took %v", took)
	}
	d, err := statedir.Open(l.state)
	if err != nil {
		l.Fatal(err)
	}
	ids := map[string]bool{}
	for _, ws := range all {
		ids[ws.WorkspaceID] = true
		switch ws.State {
		case api.StateStarted:
			if res := l.run("workspace", "exec", ws.WorkspaceID, "--quiet", "--", "true"); res.code != 0 {
				// It may just have been ending, and then it has ended now.
				if now := l.status(ws.WorkspaceID); now == nil || now.State != api.StateStopped {
					l.Errorf("workspace %s is said to be started: %s", ws.WorkspaceID, res)
				}
			}
		case api.StateStopped, api.StateFailed, api.StatePaused:
			if ws.State == api.StatePaused && !ws.PausedToDisk {
				l.Errorf("workspace %s is paused after a fault", ws.WorkspaceID)
			}
			if left := l.processesOfMachine(ws.WorkspaceID); len(left) > 0 {
				l.Errorf("workspace %s is said to be %s, but there is: %s", ws.WorkspaceID, ws.State, strings.Join(left, "; "))
			}
		default:
			l.Errorf("workspace %s is %s after a fault", ws.WorkspaceID, ws.State)
		}
	}
	l.ok("workspace", "prune")
	l.checkOwners(d)
	if l.bystander.PID != 0 {
		if now := l.supervisorOf("bystander"); now != l.bystander {
			l.Errorf("the bystander was process %v and is %v", l.bystander, now)
		}
		if got := l.exec("bystander", "cat mark"); got != "untouched\n" {
			l.Errorf("the bystander's file holds %q", got)
		}
	}
}

// checkOwners looks for what no record names.
func (l *lab) checkOwners(d *statedir.Dir) {
	l.Helper()
	ctx := context.Background()
	st, err := store.Open(ctx, d.Database(), store.Options{WorkspacesDir: d.WorkspacesDir()})
	if err != nil {
		l.Fatal(err)
	}
	defer st.Close()
	rows, err := st.List(ctx)
	if err != nil {
		l.Fatal(err)
	}
	refs, err := st.References(ctx)
	if err != nil {
		l.Fatal(err)
	}
	ids := map[string]bool{}
	for _, ws := range rows {
		ids[ws.WorkspaceID] = true
		if ws.Intent != "" || ws.PendingLayer != "" {
			l.Errorf("workspace %s still has intent %q, pending layer %q", ws.WorkspaceID, ws.Intent, ws.PendingLayer)
		}
		if ws.State == api.StateFailed {
			l.Errorf("failed workspace %s outlived a prune", ws.WorkspaceID)
		}
		for _, layer := range ws.Layers {
			l.mustExist(d, layer)
		}
		snapshots, err := st.Snapshots(ctx, ws.WorkspaceID)
		if err != nil {
			l.Fatal(err)
		}
		for _, s := range snapshots {
			if s.Temporary {
				l.Errorf("workspace %s has the snapshot %s of a fork that is over", ws.WorkspaceID, s.SnapshotName)
			}
			for _, layer := range append(s.Chain, s.Layer) {
				l.mustExist(d, layer)
			}
		}
	}
	stem := func(name string) string { s, _, _ := strings.Cut(name, "."); return s }
	layers := map[string]bool{}
	for name := range refs.Layers {
		layers[stem(name)] = true
	}
	seeds := map[string]bool{}
	for digest := range refs.Seeds {
		seeds[strings.TrimPrefix(digest, "sha256:")] = true
	}
	none := map[string]bool{}
	for _, c := range []struct {
		dir   string
		owned map[string]bool
	}{
		{d.WorkspacesDir(), ids}, {d.MachinesDir(), ids}, {d.LayersDir(), layers},
		{filepath.Join(d.SeedsDir(), "objects"), seeds}, {filepath.Join(d.SeedsDir(), "locks"), seeds}, {filepath.Join(d.SeedsDir(), "build"), none},
	} {
		entries, err := os.ReadDir(c.dir)
		if err != nil && !os.IsNotExist(err) {
			l.Fatal(err)
		}
		for _, e := range entries {
			if !c.owned[stem(e.Name())] {
				l.Errorf("%s has no owner", filepath.Join(c.dir, e.Name()))
			}
			if strings.HasSuffix(e.Name(), ".new") {
				l.Errorf("%s is half made", filepath.Join(c.dir, e.Name()))
			}
		}
	}
	entries, err := os.ReadDir(d.Path())
	if err != nil {
		l.Fatal(err)
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), "state.db") && !strings.Contains(" workspaces machines layers seeds accelerator.json mcp-token ballast secrets.key proofs ", " "+e.Name()+" ") {
			l.Errorf("nobody knows of %s in the state directory", e.Name())
		}
	}
}

func (l *lab) mustExist(d *statedir.Dir, layer string) {
	l.Helper()
	if layer == "" || strings.HasPrefix(layer, "seed:") {
		return
	}
	if _, err := os.Lstat(d.Layer(layer)); err != nil {
		l.Errorf("a record names a layer that is not there: %v", err)
	}
}

// processesOfMachine lists the processes that belong to a workspace's machine.
func (l *lab) processesOfMachine(id string) []string {
	return processesOf(filepath.Join(l.state, "machines", id), host.Marker(id))
}

// processesOf lists the processes that have one of the words in their arguments
// or environment, or a file of such a name open, the callers of the test apart.
func processesOf(words ...string) []string {
	has := func(s string) bool {
		for _, w := range words {
			if strings.Contains(s, w) {
				return true
			}
		}
		return false
	}
	var left []string
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range procs {
		cmdline, err := os.ReadFile(p + "/cmdline")
		if err != nil || p == fmt.Sprintf("/proc/%d", os.Getpid()) {
			continue
		}
		environ, _ := os.ReadFile(p + "/environ")
		found := has(string(cmdline)) || has(string(environ))
		fds, _ := filepath.Glob(p + "/fd/*")
		for _, fd := range append(fds, p+"/cwd", p+"/root") {
			target, _ := os.Readlink(fd)
			found = found || has(target)
		}
		if found {
			left = append(left, filepath.Base(p)+" "+strings.ReplaceAll(string(cmdline), "\x00", " "))
		}
	}
	return left
}

// loopsOf lists the loop devices on files below dir.
func loopsOf(dir string) []string {
	var left []string
	backing, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, path := range backing {
		if b, err := os.ReadFile(path); err == nil && strings.HasPrefix(string(b), dir) {
			left = append(left, path+": "+strings.TrimSpace(string(b)))
		}
	}
	return left
}
