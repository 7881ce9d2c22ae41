//go:build !linux

package workspacedisk

import (
	"os"
	"os/exec"

	"github.com/pyro-mcp/pyro/api"
)

func confine(*exec.Cmd, *os.File) (release func(), err error) {
	return nil, api.Errorf(api.ErrUnsupported, "e2fsprogs cannot be confined on this system")
}

func limitProcess(int) {}
