package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/pyro-mcp/pyro/internal/guestconn"
)

func main() {
	path := strings.TrimPrefix(os.Args[2], "unix:")
	c, err := net.Dial("unix", path)
	if err != nil {
		fmt.Println("pyro-agent:", err)
		os.Exit(3)
	}
	fmt.Fprintf(c, "%s\n", os.Getenv("PYRO_AGENT_TOKEN"))
	m, err := guestconn.NewMux(context.Background(), c, guestconn.Guest)
	if err != nil {
		fmt.Println("pyro-agent:", err)
		os.Exit(4)
	}
	fmt.Println("pyro-agent: up")
	go func() { <-m.Done(); os.Exit(5) }()
	for {
		s, err := m.Accept()
		if err != nil {
			os.Exit(6)
		}
		go func() {
			defer s.Close()
			line, _ := bufio.NewReader(s).ReadBytes('\n')
			var r struct{ Action, Command string }
			json.Unmarshal(line, &r)
			if r.Action == "shutdown" {
				fmt.Fprintf(s, `{"ok":true}`)
				s.(interface{ CloseWrite() error }).CloseWrite()
				time.Sleep(10 * time.Millisecond)
				exec.Command("sync").Run()
				os.Exit(0)
			}
			cmd := exec.Command("sh", "-c", r.Command)
			out, err := cmd.CombinedOutput()
			rep := map[string]any{"stdout": string(out), "exit_code": cmd.ProcessState.ExitCode(), "stderr": "", "duration_ms": 1}
			if err != nil && cmd.ProcessState == nil {
				rep["stderr"] = err.Error()
			}
			json.NewEncoder(s).Encode(rep)
			s.(interface{ CloseWrite() error }).CloseWrite()
			var b [1]byte
			s.Read(b[:])
		}()
	}
}
