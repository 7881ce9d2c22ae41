package mcpserver

import (
	"regexp"
	"slices"
	"strings"
)

// operatorClause begins what a hint has for whoever runs the server, who works
// with the command line.
const operatorClause = "whoever runs the server"

var (
	commandPattern = regexp.MustCompile(`(?:run |use )?pyro workspace ([a-z]+)(?: ([a-z]+))?`)
	flagPattern    = regexp.MustCompile(`--[a-z]+(?:-[a-z]+)*`)
)

// forModel says a hint, which names commands and their flags, in the tools and
// parameters that this server offers. What has no counterpart stays as it is.
func (s *Server) forModel(hint string) string {
	at := strings.Index(hint, operatorClause)
	if at < 0 {
		at = len(hint)
	}
	mine := commandPattern.ReplaceAllStringFunc(hint[:at], func(command string) string {
		words := commandPattern.FindStringSubmatch(command)
		first, second := words[1], words[2]
		for _, way := range []struct{ tool, rest string }{
			{first + "_" + second, ""}, {"workspace_" + first + "_" + second, ""}, {"workspace_" + first, " " + second},
		} {
			if s.offers(way.tool) {
				return "call " + way.tool + strings.TrimRight(way.rest, " ")
			}
		}
		return command
	})
	mine = flagPattern.ReplaceAllStringFunc(mine, func(flag string) string {
		name := strings.ReplaceAll(strings.TrimPrefix(flag, "--"), "-", "_")
		if s.takes(name) {
			return name
		}
		return flag
	})
	return mine + hint[at:]
}

// takes reports whether a tool has a parameter of that name.
func (s *Server) takes(name string) bool {
	return slices.ContainsFunc(s.offered, func(o *offered) bool { return o.input.Schema().Properties[name] != nil })
}
