package mcpserver_test

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/pyro-mcp/pyro/internal/mcpserver"
)

var update = flag.Bool("update", false, "write docs/mcp.md anew")

func TestDocument(t *testing.T) {
	const mark = "<!-- generated -->\n"
	file := filepath.Join("..", "..", "docs", "mcp.md")
	page := string(must(os.ReadFile(file))(t))
	byHand, _, ok := strings.Cut(page, mark)
	if !ok {
		t.Fatalf("%s has no line %q", file, mark)
	}
	want := byHand + mark + "\n" + must(mcpserver.Document())(t)
	if *update {
		if err := os.WriteFile(file, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(want, page); diff != "" {
		t.Errorf("docs/mcp.md is not current; run this test with -update:\n%s", diff)
	}
}

// core are the tools that SURFACE promises of the default profile.
var core = []string{
	"vm_run", "workspace_create", "workspace_delete", "workspace_diff", "workspace_exec", "workspace_export", "workspace_file_list",
	"workspace_file_read", "workspace_file_write", "workspace_list", "workspace_logs", "workspace_patch_apply", "workspace_reset",
	"workspace_status", "workspace_summary", "workspace_sync_push", "workspace_update",
}

func TestProfilesAndModes(t *testing.T) {
	services := []string{"service_list", "service_logs", "service_start", "service_status", "service_stop"}
	shells := []string{"shell_close", "shell_open", "shell_read", "shell_signal", "shell_write", "snapshot_create", "snapshot_delete", "snapshot_list"}
	client := newClient(t)
	for _, test := range []struct {
		profile, mode string
		tools         []string
		prompts       []string
		bytes         int // most that the model reads of the tools
	}{
		{"", "", core, []string{"inspect", "repro-fix"}, 16 << 10},
		{mcpserver.ProfileRun, "", []string{"vm_run"}, nil, 2 << 10},
		{mcpserver.ProfileCore, "", core, []string{"inspect", "repro-fix"}, 16 << 10},
		{"", mcpserver.ModeReproFix, core, []string{"inspect", "repro-fix"}, 16 << 10},
		{"", mcpserver.ModeInspect, []string{"workspace_create", "workspace_delete", "workspace_exec", "workspace_export", "workspace_file_list",
			"workspace_file_read", "workspace_list", "workspace_logs", "workspace_status", "workspace_summary"}, []string{"inspect"}, 10 << 10},
		{"", mcpserver.ModeColdStart, append(services, core...), []string{"cold-start", "inspect", "repro-fix"}, 22 << 10},
		{"", mcpserver.ModeReviewEval, append(shells, core...), []string{"inspect", "repro-fix", "review-eval"}, 22 << 10},
	} {
		t.Run(test.profile+test.mode, func(t *testing.T) {
			o := options(t)
			o.Profile, o.Mode = test.profile, test.mode
			s := connect(t, client, o)
			want := slices.Clone(test.tools)
			slices.Sort(want)
			if diff := cmp.Diff(want, s.toolNames()); diff != "" {
				t.Errorf("tools (-want +got):\n%s", diff)
			}
			var prompts []string
			for p, err := range s.Prompts(t.Context(), nil) {
				if err != nil {
					t.Fatal(err)
				}
				prompts = append(prompts, p.Name)
				got := must(s.GetPrompt(t.Context(), &mcp.GetPromptParams{Name: p.Name, Arguments: map[string]string{"task": "issue 142"}}))(t)
				if text := got.Messages[0].Content.(*mcp.TextContent).Text; !strings.Contains(text, "issue 142") || !strings.Contains(text, "workspace_create") {
					t.Errorf("prompt %s: %s", p.Name, text)
				}
			}
			if diff := cmp.Diff(test.prompts, prompts); diff != "" {
				t.Errorf("prompts (-want +got):\n%s", diff)
			}
			if n := s.checkTools(); n > test.bytes {
				t.Errorf("a model reads %d bytes about the tools, want at most %d", n, test.bytes)
			}
		})
	}
	all := connect(t, client, options(t))
	all.checkTools()
}

// checkTools holds every tool to what a model needs of it and returns how much
// there is to read.
func (s *session) checkTools() (size int) {
	s.t.Helper()
	narrow := s.schemas["vm_list_environments"] == nil
	for tool, err := range s.Tools(s.t.Context(), nil) {
		if err != nil {
			s.t.Fatal(err)
		}
		size += len(tool.Name) + len(tool.Description) + len(mustMarshal(s.t, tool.InputSchema))
		if tool.Title == "" || len(tool.Description) < 60 || strings.ContainsAny(tool.Description, "{}") && !strings.Contains(tool.Description, "Example arguments: {") {
			s.t.Errorf("%s: title %q, description %q", tool.Name, tool.Title, tool.Description)
		}
		a := tool.Annotations
		if a == nil || a.DestructiveHint == nil || a.OpenWorldHint == nil || *a.OpenWorldHint || (a.ReadOnlyHint && *a.DestructiveHint) {
			s.t.Errorf("%s: annotations %+v", tool.Name, a)
		}
		input := tool.InputSchema.(map[string]any)
		if input["additionalProperties"] != false {
			s.t.Errorf("%s takes parameters that it does not know", tool.Name)
		}
		properties, _ := input["properties"].(map[string]any)
		for name, p := range properties {
			if p.(map[string]any)["description"] == nil {
				s.t.Errorf("%s: parameter %s has no description", tool.Name, name)
			}
		}
		if _, example, ok := strings.Cut(tool.Description, "Example arguments: "); ok {
			var a any
			if err := json.Unmarshal([]byte(example), &a); err != nil {
				s.t.Errorf("%s: example %s: %v", tool.Name, example, err)
			}
			if err := resolve(s.t, tool.InputSchema).Validate(a); err != nil {
				s.t.Errorf("%s: example %s: %v", tool.Name, example, err)
			}
		} else if len(properties) > 0 {
			s.t.Errorf("%s has no example", tool.Name)
		}
		for _, wide := range []string{"network_policy", "secrets", "secret_env", "allow_host_compat", "published_ports"} {
			if narrow && properties[wide] != nil {
				s.t.Errorf("%s has %s in a narrow profile", tool.Name, wide)
			}
		}
	}
	return size
}
