package gvisor_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

// save saves m with its memory, and returns what a machine starts from.
func save(t testing.TB, m engine.Machine) (layer, memory string) {
	t.Helper()
	dir := t.TempDir()
	layer, memory = filepath.Join(dir, "layer"), filepath.Join(dir, "memory")
	frozen, err := m.(engine.FullSnapshotter).SnapshotFull(t.Context(), layer, memory)
	if err != nil {
		t.Fatal(err)
	}
	if frozen != layer {
		t.Fatalf("froze %s instead of the copy %s", frozen, layer)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 2 {
		t.Errorf("beside the snapshot: %v, %v", left, err)
	}
	return layer, memory
}

// service starts a command that goes on by itself.
func service(t testing.TB, m engine.Machine, command string) {
	t.Helper()
	_, err := guestclient.New(m.DialGuest, guestclient.Options{}).StartService(t.Context(), guestproto.StartService{ServiceName: "service", Command: command})
	if err != nil {
		t.Fatal(err)
	}
}

// copyOf returns the specification of a machine that goes on from what save has
// saved.
func copyOf(t testing.TB, layer, memory string) engine.MachineSpec {
	spec := on(t, layer)
	spec.Memory, spec.Hostname = memory, "copy"
	return spec
}

// A machine that is saved again and again goes on as if nothing were: what its
// callers send and get on their connections arrives, whole and in order, and
// processes run on. Copies have the processes and not the callers.
func TestSaveWhileCommandsRun(t *testing.T) {
	e := newEngine(t)
	spec := on(t)
	spec.VCPUCount = 2
	m := start(t, e, spec)
	service(t, m, "i=0; while :; do i=$((i+1)); echo $i >/run/count; sleep 0.02; done")
	client := guestclient.New(m.DialGuest, guestclient.Options{})

	// A command that counts as fast as it can, one that says what it hears, and
	// requests one after the other.
	numbers, counted := io.Pipe()
	echoed, echo := io.Pipe()
	stdin, say := io.Pipe()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		_, err := client.Exec(ctx, guestproto.ExecRequest{Command: "seq 1 1000000000; echo counter"}, guestclient.ExecIO{Stdout: counted})
		counted.CloseWithError(err)
	}()
	said := make(chan error, 1)
	go func() {
		r, err := client.Exec(ctx, guestproto.ExecRequest{Command: "cat; echo end; exit 7"}, guestclient.ExecIO{Stdin: stdin, Stdout: echo})
		if err == nil && r.ExitCode != 7 {
			err = fmt.Errorf("exit code %d", r.ExitCode)
		}
		said <- err
		echo.Close()
	}()
	stop := make(chan struct{})
	asked := make(chan error, 1)
	go func() {
		for n := 0; ; n++ {
			select {
			case <-stop:
				if n < 10 {
					asked <- fmt.Errorf("%d requests only", n)
				}
				asked <- nil
				return
			default:
			}
			if out, err := tryGuest(ctx, m, "echo answer"); err != nil || out != "answer\n" {
				asked <- fmt.Errorf("request %d: %q, %w", n, out, err)
				return
			}
		}
	}()
	next := 1
	lines := bufio.NewScanner(numbers)
	read := func(n int) {
		t.Helper()
		for range n {
			if !lines.Scan() || lines.Text() != fmt.Sprint(next) {
				t.Fatalf("the counting command says %q after %d, %v", lines.Text(), next-1, lines.Err())
			}
			next++
		}
	}
	echoes := bufio.NewScanner(echoed)
	var layer, memory string
	for i := range 5 {
		read(100000)
		word := fmt.Sprintf("word %d", i)
		go func() { _, _ = io.WriteString(say, word+"\n") }()
		layer, memory = save(t, m)
		if !echoes.Scan() || echoes.Text() != word {
			t.Fatalf("%q came back as %q, %v", word, echoes.Text(), echoes.Err())
		}
	}
	read(100000)
	say.Close()
	if !echoes.Scan() || echoes.Text() != "end" {
		t.Errorf("at its end the command says %q", echoes.Text())
	}
	if err := <-said; err != nil {
		t.Error(err)
	}
	close(stop)
	if err := <-asked; err != nil {
		t.Error(err)
	}
	for i := range 2 {
		c := start(t, e, copyOf(t, layer, memory))
		for end := time.Now().Add(20 * time.Second); strings.Contains(guest(t, c, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"), "seq 1 1000"); {
			if time.Now().After(end) {
				t.Fatal("a command that nobody waits for in the copy runs on")
			}
		}
		before := guest(t, c, "cat /run/count")
		if after := guest(t, c, "sleep 0.3; cat /run/count"); after == before {
			t.Errorf("in copy %d the counter stays at %s", i, after)
		}
		if got := guest(t, c, "hostname; cat /etc/hostname"); got != "copy\ncopy\n" {
			t.Errorf("copy %d is called %q", i, got)
		}
	}
	read(100000)
}

// What the guest has open lives on, deleted files included.
func TestSaveOpenFiles(t *testing.T) {
	e := newEngine(t)
	m := start(t, e, on(t))
	service(t, m, `cd /workspace; echo kept >old; mkdir -p /tmp/d; echo memory >/tmp/d/f
		exec 3>>log 4<old 5>gone 6<gone; seq 1000 >&5; rm gone old; echo $$ >/run/pid
		i=0; while :; do i=$((i+1)); echo $i >&3; echo $i >&5; sleep 0.02; done`)
	for end := time.Now().Add(20 * time.Second); guest(t, m, "tail -n 1 /workspace/log") == ""; {
		if time.Now().After(end) {
			t.Fatal("the service does not write")
		}
	}
	layer, memory := save(t, m)
	for _, c := range []engine.Machine{m, start(t, e, copyOf(t, layer, memory))} {
		if got := guest(t, c, "cat /tmp/d/f; cat /proc/$(cat /run/pid)/fd/4; head -n 1000 /proc/$(cat /run/pid)/fd/6 | tail -n 1; test $(tail -n 1 /proc/$(cat /run/pid)/fd/6) -gt 0 && echo goes on"); got != "memory\nkept\n1000\ngoes on\n" {
			t.Errorf("the guest's files hold %q", got)
		}
		if got := guest(t, c, "a=$(tail -n 1 /workspace/log); sleep 0.3; b=$(tail -n 1 /workspace/log); test $b -gt $a && seq 1 $b | tr -d '\\n' >/run/a; tr -d '\\n' </workspace/log | head -c $(stat -c %s /run/a) | tr -d '\\n' >/run/b; test \"$(cat /run/a)\" = \"$(cat /run/b)\" && echo whole"); got != "whole\n" {
			t.Errorf("the log that is written to: %q", got)
		}
	}
}

// A full snapshot that is given up or refused leaves the machine as it was and
// nothing else.
func TestSaveGivenUp(t *testing.T) {
	e := newEngine(t)
	m := start(t, e, on(t))
	busy(t, m, "echo going; i=0; while :; do i=$((i+1)); echo $i >/run/count; sleep 0.01; done")
	goesOn := func(after string) {
		t.Helper()
		before := guest(t, m, "cat /run/count")
		if now := guest(t, m, "sleep 0.3; cat /run/count"); now == before {
			t.Errorf("%s the guest stands still", after)
		}
	}
	saved := 0
	for _, after := range []time.Duration{0, 1, 5, 10, 20, 30, 40, 60, 80, 100, 200} {
		ctx, cancel := context.WithTimeout(t.Context(), after*time.Millisecond)
		dir := t.TempDir()
		_, err := m.(engine.FullSnapshotter).SnapshotFull(ctx, filepath.Join(dir, "layer"), filepath.Join(dir, "memory"))
		cancel()
		left, _ := os.ReadDir(dir)
		switch {
		case err == nil:
			saved++
		case len(left) != 0:
			t.Errorf("given up after %d ms: %v is left, %v", after, left, err)
		}
		goesOn(fmt.Sprintf("given up after %d ms", after))
	}
	t.Logf("%d of 11 were made in time", saved)
	dir := t.TempDir()
	here := filepath.Join(dir, "here")
	if err := os.WriteFile(here, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, at := range [][2]string{{here, filepath.Join(dir, "memory")}, {filepath.Join(dir, "layer"), here}} {
		if _, err := m.(engine.FullSnapshotter).SnapshotFull(t.Context(), at[0], at[1]); !errors.Is(err, api.ErrExists) {
			t.Errorf("saving to what is there: %v, want ErrExists", err)
		}
	}
	p := m.(engine.Pauser)
	if err := p.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := m.(engine.FullSnapshotter).SnapshotFull(t.Context(), filepath.Join(dir, "layer"), filepath.Join(dir, "memory")); !errors.Is(err, api.ErrState) {
		t.Errorf("saving a paused machine: %v, want ErrState", err)
	}
	if err := p.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	goesOn("after all that")
	// Stop does not wait.
	done := make(chan error)
	go func() {
		_, err := m.(engine.FullSnapshotter).SnapshotFull(context.WithoutCancel(t.Context()), filepath.Join(dir, "layer"), filepath.Join(dir, "memory"))
		done <- err
	}()
	time.Sleep(30 * time.Millisecond) // the moment to be stopped at, not a wait
	stop(t, m)
	if err := <-done; err == nil {
		t.Log("the snapshot was complete before the machine ended")
	} else if left, _ := os.ReadDir(dir); !errors.Is(err, api.ErrUnavailable) || len(left) != 1 {
		t.Errorf("the snapshot of a machine that ends: %v; left: %v", err, left)
	}
}

// An image that is not what this runsc has saved is refused, and nothing of the
// start is left.
func TestStartFromBadImage(t *testing.T) {
	e := newEngine(t)
	m := start(t, e, on(t))
	guest(t, m, "echo 1 >/workspace/f; sync")
	layer, memory := save(t, m)
	for name, tt := range map[string]struct {
		spoil func(dir string) error
		want  error
	}{
		"another runsc": {func(dir string) error {
			b, err := os.ReadFile(filepath.Join(dir, "pyro.json"))
			if err != nil {
				return err
			}
			return os.WriteFile(filepath.Join(dir, "pyro.json"), []byte(strings.Replace(string(b), `"runtime": "`, `"runtime": "x`, 1)), 0o600)
		}, api.ErrUnsupported},
		"no record":    {func(dir string) error { return os.Remove(filepath.Join(dir, "pyro.json")) }, os.ErrNotExist},
		"no pages":     {func(dir string) error { return os.Remove(filepath.Join(dir, "pages.img")) }, api.ErrUnavailable},
		"half a state": {func(dir string) error { return os.Truncate(filepath.Join(dir, "checkpoint.img"), 10000) }, api.ErrUnavailable},
		"half pages":   {func(dir string) error { return os.Truncate(filepath.Join(dir, "pages.img"), 8192) }, api.ErrUnavailable},
		"no image":     {os.RemoveAll, os.ErrNotExist},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "memory")
			if err := os.CopyFS(dir, os.DirFS(memory)); err != nil {
				t.Fatal(err)
			}
			if err := tt.spoil(dir); err != nil {
				t.Fatal(err)
			}
			spec := copyOf(t, layer, dir)
			began := time.Now()
			c, err := e.Start(t.Context(), spec)
			if err == nil {
				_ = c.Stop(t.Context(), 0)
			}
			t.Logf("%v (%s) after %s", err, api.Hint(err), time.Since(began))
			if !errors.Is(err, tt.want) {
				t.Errorf("starting: %v, want %v", err, tt.want)
			}
			if left := leftovers(spec.ID, spec.Dir); left != "" {
				t.Error(left)
			}
		})
	}
	c := start(t, e, copyOf(t, layer, memory))
	if got := guest(t, c, "cat /workspace/f"); got != "1\n" {
		t.Errorf("the image itself has %q", got)
	}
}

// A host without the room refuses to save a machine, and one whose room goes
// meanwhile gives up. The machine goes on.
func TestSaveOnAFullDisk(t *testing.T) {
	e := newEngine(t)
	spec := on(t)
	spec.MemMiB = 512
	m := start(t, e, spec)
	guest(t, m, "head -c 150000000 /dev/urandom >/dev/shm/big")
	small := t.TempDir()
	resize := func(flags uintptr, mib int) {
		t.Helper()
		err := unix.Mount("none", small, "tmpfs", flags, fmt.Sprintf("size=%dM", mib))
		testenv.Require(t, "root", err == nil, fmt.Sprintf("mounting a small file system: %v", err))
	}
	resize(0, 200)
	t.Cleanup(func() {
		if err := unix.Unmount(small, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	memory, layer := filepath.Join(small, "memory"), filepath.Join(t.TempDir(), "layer")
	nothingLeft := func() {
		t.Helper()
		for _, dir := range []string{small, filepath.Dir(layer)} {
			if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
				t.Errorf("%v is left, %v", left, err)
			}
		}
		if got := guest(t, m, "echo on"); got != "on\n" {
			t.Errorf("the guest says %q", got)
		}
	}
	if _, err := m.(engine.FullSnapshotter).SnapshotFull(t.Context(), layer, memory); !errors.Is(err, api.ErrExhausted) || api.Hint(err) == "" {
		t.Errorf("saving to a full disk: %v (%s), want ErrExhausted with a hint", err, api.Hint(err))
	}
	nothingLeft()

	for try := 0; ; try++ {
		resize(unix.MS_REMOUNT, 600)
		shrunk := make(chan error, 1)
		go func() {
			for end := time.Now().Add(20 * time.Second); time.Now().Before(end); {
				if _, err := os.Lstat(memory + engine.UnfinishedSuffix + "/pages.img"); err == nil {
					break
				}
			}
			shrunk <- unix.Mount("none", small, "tmpfs", unix.MS_REMOUNT, "size=100M") // refused to those who have more in it
		}()
		_, err := m.(engine.FullSnapshotter).SnapshotFull(t.Context(), layer, memory)
		late := <-shrunk
		if err == nil && late != nil && try < 10 {
			if err := errors.Join(os.RemoveAll(memory), os.Remove(layer)); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if !errors.Is(err, api.ErrExhausted) || api.Hint(err) == "" {
			t.Errorf("saving to a disk that fills up: %v (%s), want ErrExhausted with a hint", err, api.Hint(err))
		}
		break
	}
	resize(unix.MS_REMOUNT, 600)
	nothingLeft()
	if _, err := m.(engine.FullSnapshotter).SnapshotFull(t.Context(), layer, memory); err != nil {
		t.Errorf("with room again: %v", err)
	}
	c := start(t, e, func() engine.MachineSpec { s := copyOf(t, layer, memory); s.MemMiB = 512; return s }())
	if got := guest(t, c, "stat -c %s /dev/shm/big"); got != "150000000\n" {
		t.Errorf("the copy has %q", got)
	}
}
