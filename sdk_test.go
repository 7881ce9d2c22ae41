package pyro_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro"
	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/test/build"
)

// A program that embeds the SDK is not pyro: it says where pyro is.
func TestRunFromAnotherProgram(t *testing.T) {
	programs := t.TempDir()
	if err := build.Programs(programs, false); err != nil {
		t.Fatal(err)
	}
	state := filepath.Join(t.TempDir(), "state")
	client, err := pyro.Open(t.Context(), &pyro.Options{
		StateDir: state, CacheDir: filepath.Join(t.TempDir(), "cache"), Engine: "host",
		Binary: filepath.Join(programs, "pyro"), Agent: filepath.Join(programs, "pyro-agent"),
	})
	if err != nil {
		t.Fatal(err)
	}
	request := api.RunRequest{Environment: "debian:12", AllowHostCompat: true, Timeout: time.Minute}

	t.Run("Captured", func(t *testing.T) {
		req := request
		req.Argv = []string{"sh", "-c", "cat; echo err >&2; exit 3"}
		req.Stdin = strings.NewReader("in")
		res, err := client.Run(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		if res.Stdout != "in" || res.Stderr != "err\n" || res.ExitCode != 3 || res.Isolation != api.IsolationNone || res.ExecutionMode != api.ModeHostCompat {
			t.Errorf("got %+v", res)
		}
	})
	t.Run("Streamed", func(t *testing.T) {
		var out bytes.Buffer
		var phases []string
		req := request
		req.Argv, req.Stdout = []string{"echo live"}, &out
		req.Progress = func(p api.Progress) { phases = append(phases, p.Phase) }
		res, err := client.Run(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		if out.String() != "live\n" || res.Stdout != "" || strings.Join(phases, " ") != "boot ready" {
			t.Errorf("wrote %q, result %q, phases %q", out.String(), res.Stdout, phases)
		}
	})
	t.Run("Canceled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		req := request
		req.Argv = []string{"echo up; sleep 1000"}
		req.Stdout = writerFunc(func(p []byte) (int, error) { cancel(); return len(p), nil })
		if _, err := client.Run(ctx, req); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want Canceled", err)
		}
	})
	t.Run("NoPyro", func(t *testing.T) {
		lost, err := pyro.Open(t.Context(), &pyro.Options{StateDir: state, CacheDir: t.TempDir(), Engine: "host", Binary: "/nowhere/pyro"})
		if err != nil {
			t.Fatal(err)
		}
		req := request
		req.Argv = []string{"true"}
		if _, err := lost.Run(t.Context(), req); !errors.Is(err, api.ErrNotFound) || !strings.Contains(api.Hint(err), "PYRO_BINARY") {
			t.Errorf("got %v (%s), want ErrNotFound and a hint", err, api.Hint(err))
		}
	})
	if left, err := os.ReadDir(filepath.Join(state, "machines")); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
