package engines_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/engine/enginetest"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// until reads a shell until its output holds text.
func (m machine) until(t *testing.T, id string, cursor *int64, text string) {
	t.Helper()
	ctx := m.within(t, time.Minute)
	for out := ""; !strings.Contains(out, text); {
		r, err := m.ReadShell(ctx, guestproto.ReadShell{ShellID: id, Cursor: *cursor, WaitMS: 5000})
		if err != nil {
			t.Fatalf("waiting for %q behind %q: %v", text, out, err)
		}
		out += r.Output
		*cursor = r.NextCursor
	}
}

// TestWorkload uses shells and services in a guest: terminals, process groups
// and control groups are what guests' kernels differ in.
func TestWorkload(t *testing.T) {
	s := chosenEngine(t)
	g := enginetest.Boot(t, s, func(spec *engine.MachineSpec) { spec.MemMiB = 1024 })
	m := machine{g.Client, time.Duration(max(1, s.Engine.Probe(t.Context()).TimeScale))}
	ctx := m.within(t, 5*time.Minute)

	if _, err := m.OpenShell(ctx, guestproto.OpenShell{ShellID: "s", Env: map[string]string{"HOME": "/tmp"}}); err != nil {
		t.Fatal(err)
	}
	cursor := int64(0)
	line := func(text string) {
		t.Helper()
		if _, err := m.WriteShell(ctx, guestproto.WriteShell{ShellID: "s", Input: text, AppendNewline: true}); err != nil {
			t.Fatal(err)
		}
	}
	line("stty size; tty; echo up-$((1+1))")
	m.until(t, "s", &cursor, "up-2")
	if _, err := m.ResizeShell(ctx, guestproto.ResizeShell{ShellID: "s", Cols: 44, Rows: 22}); err != nil {
		t.Fatal(err)
	}
	line("stty size")
	m.until(t, "s", &cursor, "22 44")
	line(`sh -c 'trap "echo changed-size" WINCH; echo set-$((1+1)); while :; do sleep 0.1; done'`)
	m.until(t, "s", &cursor, "set-2")
	if _, err := m.ResizeShell(ctx, guestproto.ResizeShell{ShellID: "s", Cols: 45, Rows: 23}); err != nil {
		t.Fatal(err)
	}
	m.until(t, "s", &cursor, "changed-size")
	if _, err := m.SignalShell(ctx, guestproto.SignalShell{ShellID: "s", Signal: "INT"}); err != nil {
		t.Fatal(err)
	}
	line("echo back-$((1+1))")
	m.until(t, "s", &cursor, "back-2")
	for _, name := range []string{"HUP", "TERM", "KILL"} {
		line("sleep 43210; echo over-$((1+1))")
		waiting := func() bool {
			_, _, r := m.sh(t, "grep -qz 43210 /proc/[0-9]*/cmdline && exit 3; :", 0)
			return r.ExitCode == 3
		}
		for !waiting() {
			if ctx.Err() != nil {
				t.Fatal("sleep does not begin")
			}
		}
		if _, err := m.SignalShell(ctx, guestproto.SignalShell{ShellID: "s", Signal: name}); err != nil {
			t.Fatal(err)
		}
		m.until(t, "s", &cursor, "over-2")
	}

	// Attached to, typed into, and left.
	stdin, typed := io.Pipe()
	defer typed.Close()
	attached, detach := context.WithCancel(ctx)
	left := make(chan error, 1)
	go func() {
		_, err := m.AttachShell(attached, guestproto.AttachShell{ShellID: "s"}, guestclient.ExecIO{Stdin: stdin}, nil)
		left <- err
	}()
	fmt.Fprintln(typed, "sleep 98765 & (setsid nohup sleep 98765 >/dev/null 2>&1 &) ; echo typed-$((1+1))")
	m.until(t, "s", &cursor, "typed-2")
	detach()
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Errorf("detached with %v", err)
	}
	line("echo alive-$((1+1))")
	m.until(t, "s", &cursor, "alive-2")

	// A lot of output, of which the last is kept.
	line("stty -echo -onlcr; head -c 67108864 /dev/zero | tr '\\0' x; echo; echo the-$((1+1))nd")
	m.until(t, "s", &cursor, "the-2nd")
	if r, err := m.ReadShell(ctx, guestproto.ReadShell{ShellID: "s", Cursor: 0}); err != nil || !r.Truncated || r.MissedBytes < 32<<20 {
		t.Errorf("missed %d bytes, %v", r.MissedBytes, err)
	}

	const ps = `for p in /proc/[0-9]*; do tr '\0' ' ' <$p/cmdline 2>/dev/null; echo; done | grep -c '^sleep 98765' || :`
	count := func() string {
		t.Helper()
		out, _, _ := m.sh(t, ps, 0)
		return strings.TrimSpace(out)
	}
	if n := count(); n != "2" {
		t.Errorf("%s processes run in the shell", n)
	}
	began := time.Now()
	if r, err := m.CloseShell(ctx, guestproto.CloseShell{ShellID: "s"}); err != nil || r.State != "stopped" {
		t.Errorf("%+v, %v", r, err)
	}
	t.Logf("closing the shell took %v", time.Since(began).Round(time.Millisecond))
	if n := count(); n != "0" {
		t.Errorf("%s processes are left of the shell", n)
	}

	start := func(req guestproto.StartService) guestproto.Service {
		t.Helper()
		req.ReadyTimeoutSeconds = float64(20 * m.scale)
		sv, err := m.StartService(ctx, req)
		if err != nil {
			t.Fatal(err)
		}
		return sv
	}
	for name, req := range map[string]guestproto.StartService{
		"file":    {Command: "echo out; echo err >&2; touch there; exec sleep 98765", Readiness: &guestproto.Readiness{Type: "file", Path: "there"}},
		"command": {Command: "(setsid nohup sleep 98765 &); touch here; exec sleep 98765", Readiness: &guestproto.Readiness{Type: "command", Command: "test -e here"}},
		"daemon":  {Command: "setsid sleep 98765 >/dev/null 2>&1 & exit 0", Readiness: &guestproto.Readiness{Type: "file", Path: "."}},
		"deaf":    {Command: "trap '' TERM; sleep 98765; sleep 98765"},
	} {
		req.ServiceName = name
		if req.Readiness == nil {
			req.ReadyTimeoutSeconds = 0
		}
		if sv := start(req); sv.State != "running" {
			t.Errorf("%s: %+v", name, sv)
		}
	}
	if logs, err := m.LogsService(ctx, "file", nil); err != nil || logs.Stdout != "out\n" || logs.Stderr != "err\n" {
		t.Errorf("%+v, %v", logs, err)
	}
	for _, name := range []string{"file", "command", "daemon", "deaf"} {
		began := time.Now()
		if sv, err := m.StopService(ctx, name, time.Second*m.scale); err != nil || sv.State != "stopped" {
			t.Errorf("%s: %+v, %v", name, sv, err)
		}
		t.Logf("stopping %s took %v", name, time.Since(began).Round(time.Millisecond))
	}
	if n := count(); n != "0" {
		t.Errorf("%s processes are left of the services", n)
	}
	if _, err := m.StatusService(ctx, "other"); !errors.Is(err, api.ErrNotFound) {
		t.Errorf("no service: %v", err)
	}
	// A shell and a service do not hold a shutdown up.
	if _, err := m.OpenShell(ctx, guestproto.OpenShell{ShellID: "t"}); err != nil {
		t.Fatal(err)
	}
	start(guestproto.StartService{ServiceName: "again", Command: "sleep 0.5; exit 1", Restart: guestproto.RestartOnFailure})
	began = time.Now()
	if err := m.Shutdown(ctx, 10*time.Second); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	took := time.Since(began)
	t.Logf("the shutdown took %v", took.Round(time.Millisecond))
	if took > 8*time.Second*m.scale {
		t.Errorf("the shutdown took %v", took)
	}
}
