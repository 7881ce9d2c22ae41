package mcpserver_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"testing"

	"github.com/pyro-mcp/pyro/internal/mcpserver"
)

// strayVariable makes this test program the one that prints where it must not.
const strayVariable = "PYRO_TEST_STRAY"

func stray() {
	protocol, err := mcpserver.TakeStdout()
	if err != nil {
		panic(err)
	}
	fmt.Println("stray")
	cmd := exec.Command("echo", "of a child")
	cmd.Stdout = os.Stdout
	if err := cmd.Run(); err != nil {
		panic(err)
	}
	fmt.Fprintln(protocol, "protocol")
}

func TestStdoutIsForTheProtocolOnly(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), strayVariable+"=1")
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v: %s", err, complaint.String())
	}
	if out.String() != "protocol\n" || complaint.String() != "stray\nof a child\n" {
		t.Errorf("stdout %q, stderr %q", out.String(), complaint.String())
	}
}
