package artifact_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/internal/artifact"
)

// The test binary is also the process that gets killed.
func TestMain(m *testing.M) {
	if dir := os.Getenv("ARTIFACT_TEST_BUILD"); dir != "" {
		if err := buildForEver(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// buildForEver begins a build that starts a process, in a session of its own,
// says its pid, and never ends.
func buildForEver(dir string) error {
	s, err := artifact.Open(artifact.Options{Dir: dir, Noun: "thing"})
	if err != nil {
		return err
	}
	_, err = s.Do(context.Background(), artifact.Install{Name: "x", Build: func(_ context.Context, b *artifact.Build) error {
		if err := os.WriteFile(filepath.Join(b.Out, "half"), []byte("half"), 0o600); err != nil {
			return err
		}
		cmd := exec.Command("sleep", "1000")
		cmd.ExtraFiles = []*os.File{b.Leash}
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := cmd.Start(); err != nil {
			return err
		}
		fmt.Println(cmd.Process.Pid)
		return cmd.Wait()
	}})
	return err
}

// TestKilledBuild: after a kill -9 in the middle of a build the next one ends
// what was left running, removes what was left lying, and succeeds.
func TestKilledBuild(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "ARTIFACT_TEST_BUILD="+dir)
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	orphan, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Kill(orphan, unix.SIGKILL) // should the test fail
	pidfd, err := unix.PidfdOpen(orphan, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed, as asked
	if _, err := os.Stat(filepath.Join(dir, "build/x/out/half")); err != nil {
		t.Fatalf("the killed build left nothing, this tests nothing: %v", err)
	}
	if err := unix.PidfdSendSignal(pidfd, 0, nil, 0); err != nil {
		t.Fatalf("the orphan is gone already: %v", err)
	}

	s := open(t, dir)
	h := install(t, s, "x", "whole")
	if len(h.Files) != 1 || h.Files[0].Path != "file" {
		t.Errorf("the artifact has the files %v", h.Files)
	}
	// Gone, or dead and waiting for its new parent to notice.
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", orphan))
	if err == nil && !strings.Contains(string(stat), ") Z ") {
		t.Errorf("the orphan still runs: %s", stat)
	}
}
