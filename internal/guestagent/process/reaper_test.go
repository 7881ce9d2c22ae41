package process

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// helperVariable makes this test program the process that reaps: it would take
// the children of package os/exec from any other test.
const helperVariable = "PYRO_TEST_REAPER"

func TestMain(m *testing.M) {
	if os.Getenv(helperVariable) != "" {
		os.Exit(reap())
	}
	os.Exit(m.Run())
}

// reap starts very many short commands at once and prints every wrong status.
func reap() int {
	_ = os.Unsetenv(helperVariable)
	r, err := NewReaper()
	if err != nil {
		fmt.Println(err)
		return 1
	}
	defer r.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	run := func(argv ...string) int {
		path, err := lookPath(argv[0], Spec{Dir: "/", Env: os.Environ()})
		if err != nil {
			fmt.Println(err)
			return -1
		}
		fd := null.Fd()
		c, err := r.start(path, argv, &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{fd, fd, fd}, Sys: &syscall.SysProcAttr{Setsid: true}})
		if err != nil {
			fmt.Println(err)
			return -1
		}
		<-c.Done()
		return c.ExitCode()
	}
	var wg sync.WaitGroup
	for i := range 1000 {
		wg.Go(func() {
			if got := run([]string{"true", "false"}[i%2]); got != i%2 {
				fmt.Printf("command %d exits with %d\n", i, got)
			}
		})
	}
	wg.Wait()
	if got := run("sh", "-c", "kill -TERM $$"); got != 143 {
		fmt.Printf("a killed command exits with %d\n", got)
	}
	// 1000 orphans, each made by a process that ends before it.
	if got := run("sh", "-c", "i=0; while [ $i -lt 1000 ]; do (true &); i=$((i+1)); done"); got != 0 {
		fmt.Printf("the maker of orphans exits with %d\n", got)
	}
	none := waitFor(10*time.Second, func() bool {
		for _, e := range listProcesses() {
			if e.parent == os.Getpid() {
				return false
			}
		}
		return true
	})
	if !none {
		fmt.Println("children are left")
	}
	return 0
}

// TestReaper is RELIABILITY L7.
func TestReaper(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), helperVariable+"=1")
	out, err := cmd.CombinedOutput()
	// The race detector's program says PASS or nothing else of its own.
	if text := strings.TrimSpace(string(out)); err != nil || text != "" {
		t.Errorf("%v\n%s", err, text)
	}
}
