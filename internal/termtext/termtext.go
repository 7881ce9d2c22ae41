// Package termtext gives the text that a person would have read on a terminal.
package termtext

import (
	"strings"

	"github.com/pyro-mcp/pyro/internal/boundedlog"
)

// Plain returns what a terminal of cols by rows characters shows of output.
func Plain(output []byte, cols, rows int) string {
	lines := strings.Split(strings.ReplaceAll(string(output), "\r\n", "\n"), "\n")
	for i, line := range lines {
		if cr := strings.LastIndexByte(line, '\r'); cr >= 0 {
			line = line[cr+1:]
		}
		lines[i] = strings.TrimRight(boundedlog.Printable(line), " ")
	}
	return strings.TrimRight(strings.Join(lines, "\n"), "\n")
}
