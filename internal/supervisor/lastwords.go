package supervisor

import "strings"

// telling are words of the lines that say why a guest died; a kernel prints
// pages of registers after them.
var telling = []string{"Kernel panic", "BUG:", "Oops:", "Out of memory", "pyro-agent: ", "EXT4-fs error", "VFS: Unable", "crash"}

// maxLastWords is how many console lines an error carries.
const maxLastWords = 8

// lastWords picks, out of a console's newest lines, those worth showing in an
// error: up to half for the newest telling ones, the rest for the very last.
func lastWords(lines []string) []string {
	if len(lines) <= maxLastWords {
		return lines
	}
	tellings := map[int]bool{}
	for i := len(lines) - 1; i >= 0 && len(tellings) < maxLastWords/2; i-- {
		for _, word := range telling {
			if strings.Contains(lines[i], word) {
				tellings[i] = true
				break
			}
		}
	}
	last := len(lines) - (maxLastWords - len(tellings))
	var out []string
	for i, line := range lines {
		if tellings[i] || i >= last {
			out = append(out, line)
		}
	}
	return out[max(0, len(out)-maxLastWords):]
}
