package mcpserver

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/pyro-mcp/pyro/api"
)

// maxTask bounds the argument of a prompt.
const maxTask = 16 << 10

// addPrompts offers every mode whose tools are all there as a prompt.
func (s *Server) addPrompts() {
	for _, p := range profiles() {
		if !p.isMode() || slices.ContainsFunc(p.tools, func(t string) bool { return !s.offers(t) }) {
			continue
		}
		s.mcp.AddPrompt(&mcp.Prompt{
			Name: p.name, Title: p.title, Description: p.purpose,
			Arguments: []*mcp.PromptArgument{{Name: "task", Description: "What to work on: a failing command, an issue, a path, a change"}},
		}, func(_ context.Context, req *mcp.GetPromptRequest) (*mcp.GetPromptResult, error) {
			task := req.Params.Arguments["task"]
			if len(task) > maxTask {
				return nil, api.Errorf(api.ErrInvalid, "argument task is longer than %d bytes", maxTask)
			}
			return &mcp.GetPromptResult{Description: p.purpose, Messages: []*mcp.PromptMessage{
				{Role: "user", Content: &mcp.TextContent{Text: s.promptText(p, task)}},
			}}, nil
		})
	}
}

func (s *Server) promptText(p *profile, task string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n\n", p.purpose)
	if strings.TrimSpace(task) != "" {
		fmt.Fprintf(&b, "The task: %s\n\n", task)
	}
	fmt.Fprintf(&b, "%s\n\nWork with pyro's tools, in this order:\n%s\n", s.project.sentence(), p.steps)
	return b.String()
}
