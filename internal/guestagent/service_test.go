package guestagent_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

func (a *agent) start(t testing.TB, req guestproto.StartService) guestproto.Service {
	t.Helper()
	if req.ReadyIntervalMS == 0 {
		req.ReadyIntervalMS = 10
	}
	sv, err := a.StartService(testContext(t), req)
	if err != nil {
		t.Fatal(err)
	}
	return sv
}

func (a *agent) status(t testing.TB, name string) guestproto.Service {
	t.Helper()
	sv, err := a.StatusService(testContext(t), name)
	if err != nil {
		t.Fatal(err)
	}
	return sv
}

func (a *agent) logs(t testing.TB, name string, tail *int64) guestproto.ServiceLogs {
	t.Helper()
	logs, err := a.LogsService(testContext(t), name, tail)
	if err != nil {
		t.Fatal(err)
	}
	return logs
}

// asJSON shows what a service's pointers hold.
func asJSON(sv guestproto.Service) []byte {
	b, _ := json.Marshal(sv)
	return b
}

func lines(n int64) *int64 { return &n }

func TestServiceReadiness(t *testing.T) {
	a := startAgent(t)
	// Each becomes ready at the third look only.
	var looks atomic.Int64
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.RequestURI() != "/health?x=%20y" || looks.Add(1) < 3 {
			w.WriteHeader(http.StatusInternalServerError)
		}
	}))
	defer web.Close()
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := closed.Addr().String()
	_ = closed.Close()
	open, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	for _, test := range []struct {
		name    string
		command string
		ready   *guestproto.Readiness
		failure string // "" for a success
	}{
		{"none", "exec sleep 1000", nil, ""},
		{"file", "sleep 0.1; touch there; exec sleep 1000", &guestproto.Readiness{Type: "file", Path: "there"}, ""},
		{"absolute-file", "sleep 0.1; touch abs; exec sleep 1000", &guestproto.Readiness{Type: "file", Path: "/workspace/abs"}, ""},
		{"no-file", "exec sleep 1000", &guestproto.Readiness{Type: "file", Path: "nothing"}, "nothing: no such file"},
		{"tcp", "exec sleep 1000", &guestproto.Readiness{Type: "tcp", Address: open.Addr().String()}, ""},
		{"no-tcp", "exec sleep 1000", &guestproto.Readiness{Type: "tcp", Address: address}, "connection refused"},
		{"http", "exec sleep 1000", &guestproto.Readiness{Type: "http", URL: web.URL + "/health?x=%20y"}, ""},
		{"no-http", "exec sleep 1000", &guestproto.Readiness{Type: "http", URL: web.URL + "/other"}, "status 500"},
		{"command", "echo x >>count; exec sleep 1000", &guestproto.Readiness{Type: "command", Command: `echo x >>count; [ $(wc -l <count) -gt 3 ] && [ "$A" = b ]`}, ""},
		{"no-command", "exec sleep 1000", &guestproto.Readiness{Type: "command", Command: "exit 9"}, "ends with status 9"},
		{"endless-command", "exec sleep 1000", &guestproto.Readiness{Type: "command", Command: "sleep 1000"}, "takes too long"},
		{"ends", "echo why >&2; exit 3", &guestproto.Readiness{Type: "file", Path: "nothing"}, "ended with status 3 before it was ready"},
		{"ends-well", "exit 0", &guestproto.Readiness{Type: "file", Path: "nothing"}, "ended with status 0 before it was ready"},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := marker()
			req := guestproto.StartService{ServiceName: test.name, Command: strings.ReplaceAll(test.command, "1000", "999."+m),
				Env: map[string]string{"A": "b"}, Readiness: test.ready, ReadyTimeoutSeconds: 20}
			if req.Readiness != nil {
				check := *req.Readiness
				check.Command = strings.ReplaceAll(check.Command, "sleep 1000", "sleep 999."+m)
				req.Readiness, test.ready = &check, &check
			}
			if test.failure != "" {
				req.ReadyTimeoutSeconds = 1
			}
			sv := a.start(t, req)
			if test.failure == "" {
				if sv.State != "running" || sv.ReadyAt == nil || sv.PID == nil || sv.EndedAt != nil || sv.StopReason != nil {
					t.Errorf("the service is %s", asJSON(sv))
				}
				if d := cmp.Diff(test.ready, sv.Readiness); d != "" {
					t.Error(d)
				}
				if n := len(running("999." + m)); n != 1 {
					t.Errorf("%d processes run", n)
				}
				sv, err := a.StopService(testContext(t), test.name, -1)
				if err != nil || sv.State != "stopped" || *sv.StopReason != "it was stopped" || *sv.ExitCode != 128+15 || sv.PID != nil || sv.EndedAt == nil {
					t.Errorf("stopped: %s, %v", asJSON(sv), err)
				}
			} else if sv.State != "failed" || sv.StopReason == nil || !strings.Contains(*sv.StopReason, test.failure) || sv.EndedAt == nil || sv.PID != nil {
				t.Errorf("the service is %s", asJSON(sv))
			}
			if left := running("999." + m); len(left) > 0 {
				t.Errorf("left running: %q", left)
			}
		})
	}
	if logs := a.logs(t, "ends", nil); logs.Stderr != "why\n" || logs.Stdout != "" || logs.Truncated {
		t.Errorf("the log of a failed one is %+v", logs)
	}
}

func TestServiceRefusals(t *testing.T) {
	a := startAgent(t)
	ctx := testContext(t)
	a.start(t, guestproto.StartService{ServiceName: "web", Command: "exec sleep 1000"})
	start := func(change func(*guestproto.StartService)) error {
		req := guestproto.StartService{ServiceName: "other", Command: "sleep 1000"}
		change(&req)
		return second(a.StartService(ctx, req))
	}
	ready := func(r guestproto.Readiness) error {
		return start(func(req *guestproto.StartService) { req.Readiness = &r })
	}
	for name, test := range map[string]struct {
		err   error
		class error
	}{
		"Running":       {start(func(r *guestproto.StartService) { r.ServiceName = "web" }), api.ErrExists},
		"Name":          {start(func(r *guestproto.StartService) { r.ServiceName = "a/b" }), api.ErrInvalid},
		"NoCommand":     {start(func(r *guestproto.StartService) { r.Command = "" }), api.ErrInvalid},
		"Cwd":           {start(func(r *guestproto.StartService) { r.Cwd = "/nowhere" }), api.ErrInvalid},
		"Interval":      {start(func(r *guestproto.StartService) { r.ReadyIntervalMS = 1 }), api.ErrInvalid},
		"Restart":       {start(func(r *guestproto.StartService) { r.Restart = "always" }), api.ErrInvalid},
		"NoType":        {ready(guestproto.Readiness{}), api.ErrInvalid},
		"TwoChecks":     {ready(guestproto.Readiness{Type: "file", Path: "x", Command: "y"}), api.ErrInvalid},
		"NoPort":        {ready(guestproto.Readiness{Type: "tcp", Address: "host:0"}), api.ErrInvalid},
		"HTTPS":         {ready(guestproto.Readiness{Type: "http", URL: "https://localhost/"}), api.ErrInvalid},
		"NoURL":         {ready(guestproto.Readiness{Type: "http", URL: "localhost:80"}), api.ErrInvalid},
		"StatusMissing": {second(a.StatusService(ctx, "other")), api.ErrNotFound},
		"LogsMissing":   {second(a.LogsService(ctx, "other", nil)), api.ErrNotFound},
		"NegativeTail":  {second(a.LogsService(ctx, "web", lines(-1))), api.ErrInvalid},
		"StopMissing":   {second(a.StopService(ctx, "other", -1)), api.ErrNotFound},
		"LongGrace":     {second(a.StopService(ctx, "web", time.Hour)), api.ErrInvalid},
	} {
		if !errors.Is(test.err, test.class) {
			t.Errorf("%s: %v, want %v", name, test.err, test.class)
		}
	}
	all, err := a.ListServices(ctx)
	if err != nil || len(all) != 1 || all[0].ServiceName != "web" || all[0].State != "running" {
		t.Errorf("services %+v, %v", all, err)
	}
}

// Words keep their boundaries, and a guest without a shell has services too.
func TestServiceArgv(t *testing.T) {
	a := startAgent(t)
	sv := a.start(t, guestproto.StartService{ServiceName: "s", Command: "shown", Argv: []string{"printf", "<%s>", "a b", "$HOME"}})
	if sv.Command != "shown" || sv.State != "exited" || *sv.ExitCode != 0 {
		t.Errorf("%s", asJSON(sv))
	}
	if logs := a.logs(t, "s", nil); logs.Stdout != "<a b><$HOME>" {
		t.Errorf("stdout %q", logs.Stdout)
	}
	sv = a.start(t, guestproto.StartService{ServiceName: "s", Command: "shown", Argv: []string{"no-such-program"}})
	if sv.State != "failed" || !strings.Contains(*sv.StopReason, "could not be started") || sv.ExitCode != nil {
		t.Errorf("a program that does not exist: %s", asJSON(sv))
	}
}

func TestServiceStops(t *testing.T) {
	a := startAgent(t)
	for _, test := range []struct {
		name, command string
		grace         time.Duration
		code          int
		min, max      time.Duration
	}{
		{"ByTerm", "trap 'echo bye; exit 5' TERM; echo set; while :; do sleep 999.$M & wait; done", 20 * time.Second, 5, 0, 10 * time.Second},
		{"IgnoresTerm", "trap '' TERM; echo set; sleep 999.$M; sleep 999.$M", 300 * time.Millisecond, 128 + 9, 300 * time.Millisecond, 20 * time.Second},
		{"AtOnce", "trap '' TERM; echo set; sleep 999.$M; sleep 999.$M", 0, 128 + 9, 0, 10 * time.Second},
		{"Hidden", "(setsid nohup sleep 999.$M &) ; trap 'exit 6' TERM; echo set; while :; do sleep 999.$M & wait; done", 20 * time.Second, 6, 0, 10 * time.Second},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := marker()
			a.start(t, guestproto.StartService{ServiceName: test.name, Command: strings.ReplaceAll(test.command, "$M", m)})
			eventually(t, "it has begun", func() bool { return a.logs(t, test.name, nil).Stdout == "set\n" })
			began := time.Now()
			sv, err := a.StopService(testContext(t), test.name, test.grace)
			if err != nil || sv.State != "stopped" || *sv.ExitCode != test.code {
				t.Errorf("%s, %v", asJSON(sv), err)
			}
			if took := time.Since(began); took < test.min || took > test.max {
				t.Errorf("it took %v", took)
			}
			if left := running("999." + m); len(left) > 0 {
				t.Errorf("left running: %q", left)
			}
			// Again changes nothing.
			if again, err := a.StopService(testContext(t), test.name, -1); err != nil || cmp.Diff(sv, again) != "" {
				t.Errorf("stopped again: %+v, %v", again, err)
			}
		})
	}
}

// A service whose command goes to the background runs as long as what it left.
func TestServiceForksAway(t *testing.T) {
	a := startAgent(t)
	m := marker()
	sv := a.start(t, guestproto.StartService{ServiceName: "d", Command: "setsid sh -c 'echo $$ >pid; exec sleep 999." + m + "' >/dev/null 2>&1 & exit 0",
		Readiness: &guestproto.Readiness{Type: "command", Command: "kill -0 $(cat pid)"}})
	if sv.State != "running" {
		t.Errorf("%s", asJSON(sv))
	}
	eventually(t, "its first process is gone", func() bool { return a.status(t, "d").PID == nil })
	if sv := a.status(t, "d"); sv.State != "running" || len(running("sleep\x00999."+m)) != 1 {
		t.Errorf("%s", asJSON(sv))
	}
	_, _, _ = a.sh(t, "kill $(cat pid)")
	eventually(t, "it has ended", func() bool { return a.status(t, "d").State == "exited" })

	// A failure takes along what it left.
	sv = a.start(t, guestproto.StartService{ServiceName: "d", Command: "setsid sleep 999." + m + " & exit 1"})
	if sv.State != "exited" || *sv.ExitCode != 1 || len(running("999."+m)) != 0 {
		t.Errorf("%+v, %q", sv, running("999."+m))
	}
}

func TestServiceRestarts(t *testing.T) {
	a := startAgent(t)
	m := marker()
	command := `n=$(cat n 2>/dev/null || echo 0); echo $((n+1)) >n; echo run $n; case $n in 0) sleep 0.4; exit 3;; 1) sleep 0.4; kill -9 $$;; esac; exec sleep 999.` + m
	sv := a.start(t, guestproto.StartService{ServiceName: "r", Command: command, Restart: guestproto.RestartOnFailure})
	if sv.State != "running" || sv.Restarts != 0 {
		t.Errorf("%s", asJSON(sv))
	}
	eventually(t, "the third run lasts", func() bool {
		sv := a.status(t, "r")
		return sv.State == "running" && sv.Restarts == 2
	})
	if logs := a.logs(t, "r", nil); logs.Stdout != "run 0\nrun 1\nrun 2\n" {
		t.Errorf("log %q", logs.Stdout)
	}
	if sv, err := a.StopService(testContext(t), "r", -1); err != nil || sv.State != "stopped" {
		t.Errorf("%s, %v", asJSON(sv), err)
	}

	// A success is an end, a start that fails is one too, and a stop ends the
	// pause before a restart.
	sv = a.start(t, guestproto.StartService{ServiceName: "once", Command: "sleep 0.3", Restart: guestproto.RestartOnFailure})
	eventually(t, "it has ended", func() bool { return a.status(t, "once").State == "exited" })
	sv = a.start(t, guestproto.StartService{ServiceName: "bad", Command: "exit 1", Restart: guestproto.RestartOnFailure})
	if sv.State != "exited" || *sv.ExitCode != 1 || sv.Restarts != 0 {
		t.Errorf("one that dies at once: %s", asJSON(sv))
	}
	a.start(t, guestproto.StartService{ServiceName: "p", Command: "sleep 0.3; exit 1", Restart: guestproto.RestartOnFailure})
	eventually(t, "it pauses", func() bool { return a.status(t, "p").State == "starting" })
	if sv, err := a.StopService(testContext(t), "p", -1); err != nil || sv.State != "stopped" || *sv.ExitCode != 1 {
		t.Errorf("stopped in the pause: %s, %v", asJSON(sv), err)
	}
}

// A service that writes without end fills its log and nothing else.
func TestServiceFillsItsLog(t *testing.T) {
	a := startAgent(t)
	a.start(t, guestproto.StartService{ServiceName: "loud", Command: "seq 1 8000000; echo last >&2; exec sleep 1000"})
	eventually(t, "it has written", func() bool { return a.logs(t, "loud", nil).Stderr == "last\n" })
	logs := a.logs(t, "loud", nil)
	if !logs.Truncated || len(logs.Stdout) > guestproto.MaxPlainOutput || !strings.HasSuffix(logs.Stdout, "\n7999999\n8000000\n") {
		t.Errorf("%d bytes of log, truncated %v", len(logs.Stdout), logs.Truncated)
	}
	if logs := a.logs(t, "loud", lines(3)); logs.Truncated || logs.Stdout != "7999998\n7999999\n8000000\n" || *logs.TailLines != 3 {
		t.Errorf("the last lines are %+v", logs)
	}
	if logs := a.logs(t, "loud", lines(0)); logs.Truncated || logs.Stdout != "" || logs.Stderr != "" {
		t.Errorf("no lines are %+v", logs)
	}
	if logs := a.logs(t, "loud", lines(1<<40)); !logs.Truncated {
		t.Error("more lines than are kept count as all")
	}
	var out, errs bytes.Buffer
	if _, err := a.StreamLogs(testContext(t), "loud", nil, false, &out, &errs); err != nil || out.Len() < 256<<10 || out.Len() > 8<<20 ||
		!strings.HasSuffix(out.String(), "\n8000000\n") || errs.String() != "last\n" {
		t.Errorf("streamed %d bytes, %q, %v", out.Len(), errs.String(), err)
	}
	if mem := agentMemory(t, a); mem > 64<<20 {
		t.Errorf("the agent has %d MiB", mem>>20)
	}
}

func TestServiceLogsFollow(t *testing.T) {
	a := startAgent(t)
	a.start(t, guestproto.StartService{ServiceName: "f", Command: "echo one; echo two; echo e >&2; until [ -e go ]; do sleep 0.02; done; echo three; printf four"})
	eventually(t, "it has written", func() bool { return a.logs(t, "f", nil).Stderr == "e\n" })
	var out, errs bytes.Buffer
	first := make(chan struct{}, 100)
	done := make(chan guestproto.Service, 1)
	go func() {
		sv, err := a.StreamLogs(testContext(t), "f", lines(1), true, writerFunc(func(p []byte) (int, error) {
			first <- struct{}{}
			return out.Write(p)
		}), &errs)
		if err != nil {
			t.Error(err)
		}
		done <- sv
	}()
	<-first
	// One that is detached does not end anything.
	ctx, cancel := context.WithCancel(testContext(t))
	_, err := a.StreamLogs(ctx, "f", nil, true, writerFunc(func(p []byte) (int, error) { cancel(); return len(p), nil }), nil)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("detached with %v", err)
	}
	a.put(t, "go", "", 0o644)
	if sv := <-done; sv.State != "exited" || *sv.ExitCode != 0 {
		t.Errorf("it ended with %s", asJSON(sv))
	}
	if out.String() != "two\nthree\nfour" || errs.String() != "e\n" {
		t.Errorf("followed %q and %q", &out, &errs)
	}
}

// A caller that hangs up while it waits for a start takes the service back.
func TestServiceCallerHangsUp(t *testing.T) {
	a := startAgent(t)
	m := marker()
	ctx, cancel := context.WithCancel(testContext(t))
	failed := make(chan error, 1)
	go func() {
		failed <- second(a.StartService(ctx, guestproto.StartService{ServiceName: "h", Command: "exec sleep 999." + m,
			Readiness: &guestproto.Readiness{Type: "file", Path: "nothing"}}))
	}()
	eventually(t, "it runs", func() bool { return len(running("999."+m)) > 0 })
	if sv := a.status(t, "h"); sv.State != "starting" {
		t.Errorf("while it waits it is %s", asJSON(sv))
	}
	cancel()
	if err := <-failed; !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	eventually(t, "it is stopped", func() bool { return a.status(t, "h").State == "stopped" })
	if left := running("999." + m); len(left) > 0 {
		t.Errorf("left running: %q", left)
	}
}

// Services end with the agent, also those that are restarted.
func TestServicesEndWithTheAgent(t *testing.T) {
	for name, end := range map[string]func(a *agent) error{
		"Shutdown": func(a *agent) error { return a.Shutdown(context.Background(), 5*time.Second) },
		"Term":     func(a *agent) error { return a.cmd.Process.Signal(os.Interrupt) },
	} {
		t.Run(name, func(t *testing.T) {
			a := startAgent(t)
			m := marker()
			a.start(t, guestproto.StartService{ServiceName: "a", Command: "trap 'touch bye; exit 1' TERM; while :; do sleep 999." + m + " & wait; done", Restart: guestproto.RestartOnFailure})
			a.start(t, guestproto.StartService{ServiceName: "b", Command: "setsid sleep 999." + m + " & exit 0"})
			if err := end(a); err != nil {
				t.Fatal(err)
			}
			<-a.done
			if left := running("999." + m); len(left) > 0 {
				t.Errorf("left running: %q", left)
			}
			if _, err := os.Stat(filepath.Join(a.root, "workspace", "bye")); err != nil {
				t.Errorf("it was not asked to end: %v", err)
			}
		})
	}
}

func TestServiceLimit(t *testing.T) {
	a := startAgent(t)
	start := func(i int, command string) error {
		return second(a.StartService(testContext(t), guestproto.StartService{ServiceName: fmt.Sprint("s", i), Command: command}))
	}
	errs := make(chan error, guestproto.MaxServices)
	for i := range guestproto.MaxServices {
		command := "exec sleep 1000"
		if i == 5 {
			command = "exit 1"
		}
		go func() { errs <- start(i, command) }()
	}
	for range guestproto.MaxServices {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	if err := start(100, "exec sleep 1000"); err != nil { // in place of the one that has ended
		t.Error(err)
	}
	if err := start(101, "exec sleep 1000"); !errors.Is(err, api.ErrExhausted) {
		t.Errorf("one more: %v", err)
	}
	if _, err := a.StatusService(testContext(t), "s5"); !errors.Is(err, api.ErrNotFound) {
		t.Errorf("the one that has ended: %v", err)
	}
}
