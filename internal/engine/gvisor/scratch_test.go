package gvisor_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/engine/gvisor"
)

func run(t *testing.T, m engine.Machine, cmd string) string {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	c, err := m.DialGuest(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	b, _ := json.Marshal(map[string]string{"command": cmd})
	c.Write(append(b, '\n'))
	out, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func TestScratch(t *testing.T) {
	e := gvisor.New(gvisor.Options{Runtime: "/tmp/gv/pyro-runsc"})
	p := e.Probe(context.Background())
	fmt.Printf("%+v\n", p)
	dir := "/tmp/gv/machine"
	os.RemoveAll(dir)
	os.MkdirAll(dir, 0o700)
	for i := range 3 {
		t0 := time.Now()
		m, err := e.Start(context.Background(), engine.MachineSpec{ID: "m1", Dir: dir, RootImage: "/tmp/gv/base.ext4", VCPUCount: 1, MemMiB: 1024, DiskMiB: 8192,
			AgentPath: "/tmp/gv/miniagent", Hostname: "web", Console: os.Stderr, Logger: slog.Default()})
		if err != nil {
			t.Fatal(err)
		}
		t1 := time.Now()
		fmt.Println(run(t, m, "true"))
		t2 := time.Now()
		fmt.Println("start", t1.Sub(t0), "first exec", t2.Sub(t0), m.PIDs())
		if i == 0 {
			fmt.Println(run(t, m, "hostname; free -m; nproc; df -h /; mount; ls -la / /run /run/pyro; ls /workspace; id; cat /proc/1/environ; cat /etc/hosts /etc/resolv.conf; ip a; echo hi > /workspace/f; ulimit -n; ls -la /proc/1/exe"))
			t0 = time.Now()
			for range 20 {
				run(t, m, "true")
			}
			fmt.Println("exec", time.Since(t0)/20)
			t0 = time.Now()
			fmt.Println(m.(engine.Pauser).Pause(context.Background()), time.Since(t0))
			t0 = time.Now()
			fmt.Println(m.(engine.Pauser).Resume(context.Background()), time.Since(t0))
		}
		if i == 1 {
			fmt.Println(run(t, m, "cat /workspace/f; mv /usr/lib/git-core /usr/lib/git-core2 && echo moved; ls /sys/fs/cgroup"))
		}
		t3 := time.Now()
		if err := m.Stop(context.Background(), 10*time.Second); err != nil {
			t.Fatal(err)
		}
		x, _ := m.Wait(context.Background())
		fmt.Println("stop", time.Since(t3), x)
	}
}
