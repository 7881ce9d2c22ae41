package hosthelper_test

import (
	"encoding/json"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/hosthelper"
)

// program is a file that can be run, which stands for pyro.
func program(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "pyro")
	write(t, path, "#!/bin/sh\n", 0o755)
	return path
}

func write(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// newHelper works below a home directory of the test's own. It understands
// arguments that begin with mcp.
func newHelper(t *testing.T) (*hosthelper.Helper, string) {
	t.Helper()
	home := t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("XDG_CONFIG_HOME", "")
	t.Setenv("CLAUDE_CONFIG_DIR", "")
	t.Setenv("PATH", filepath.Join(home, "bin"))
	h, err := hosthelper.New(func(args []string) error {
		if len(args) == 0 || args[0] != "mcp" {
			return errors.New("nonsense")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return h, home
}

func entry(t *testing.T) hosthelper.Entry {
	return hosthelper.Entry{Command: program(t), Args: []string{"mcp", "serve"}, Env: map[string]string{"A": "b"}}
}

// file is where each host that is edited keeps its servers, and under which key.
var files = map[string][2]string{
	hosthelper.OpenCode:      {".config/opencode/opencode.json", "mcp"},
	hosthelper.ClaudeDesktop: {".config/Claude/claude_desktop_config.json", "mcpServers"},
	hosthelper.Cursor:        {".cursor/mcp.json", "mcpServers"},
	hosthelper.VSCode:        {".config/Code/User/mcp.json", "servers"},
	hosthelper.Zed:           {".config/zed/settings.json", "context_servers"},
}

func TestMergeEveryHost(t *testing.T) {
	for host, at := range files {
		t.Run(host, func(t *testing.T) {
			h, home := newHelper(t)
			e := entry(t)
			file := filepath.Join(home, at[0])
			want := hosthelper.Want{Entry: e}
			if s, err := h.Status(t.Context(), host, want); err != nil || s.State != hosthelper.StateAbsent || s.Installed {
				t.Errorf("before: %+v, %v", s, err)
			}
			dry, err := h.Merge(host, "", e, true)
			if err != nil || dry.Action != hosthelper.ActionAdd || !strings.Contains(dry.After, e.Command) {
				t.Fatalf("dry run: %+v, %v", dry, err)
			}
			if _, err := os.Stat(file); err == nil {
				t.Fatal("a dry run wrote")
			}
			if c, err := h.Merge(host, "", e, false); err != nil || c.File != file || c.Backup != "" {
				t.Fatalf("%+v, %v", c, err)
			}
			first := read(t, file)
			var doc map[string]map[string]any
			if err := json.Unmarshal([]byte(first), &doc); err != nil || doc[at[1]]["pyro"] == nil {
				t.Fatalf("%s, %v", first, err)
			}
			if c, err := h.Merge(host, "", e, false); err != nil || c.Action != hosthelper.ActionNone || read(t, file) != first {
				t.Errorf("a second time: %+v, %v", c, err)
			}
			if s, err := h.Status(t.Context(), host, want); err != nil || s.State != hosthelper.StateConfigured || !s.Installed {
				t.Errorf("after: %+v, %v", s, err)
			}
			write(t, file, strings.Replace(first, `"serve"`, `"drifted"`, 1), 0o600)
			if s, err := h.Status(t.Context(), host, want); err != nil || s.State != hosthelper.StateDrifted || s.Repair == "" {
				t.Errorf("drifted: %+v, %v", s, err)
			}
			if c, err := h.Repair(t.Context(), host, want, false); err != nil || c.Action != hosthelper.ActionReplace {
				t.Errorf("repair: %+v, %v", c, err)
			}
			if got := read(t, file); got != first {
				t.Errorf("repaired to\n%s\nwhich was\n%s", got, first)
			}
			if snippet, err := h.Config(host, e); err != nil || !sameJSON(t, snippet, first) {
				t.Errorf("print-config says\n%s, %v", snippet, err)
			}
		})
	}
}

func sameJSON(t *testing.T, a, b string) bool {
	t.Helper()
	var x, y any
	if json.Unmarshal([]byte(a), &x) != nil || json.Unmarshal([]byte(b), &y) != nil {
		t.Fatalf("no JSON: %s or %s", a, b)
	}
	return cmp.Equal(x, y)
}

// What is not pyro's stays byte for byte.
func TestMergeKeepsTheRest(t *testing.T) {
	for _, test := range []struct{ name, before, after string }{
		{"NoServers", "{\n\t\"b\": 1.50,\n\t\"a\": [1,2]\n}\n", "{\n\t\"b\": 1.50,\n\t\"a\": [1,2],\n\t\"mcpServers\": {\n\t\t\"pyro\": ENTRY\n\t}\n}\n"},
		{"OtherServer", "{ \"mcpServers\": {\n    \"x\": {}\n  }, \"z\": 12345678901234567890 }", "{ \"mcpServers\": {\n    \"x\": {},\n    \"pyro\": ENTRY\n  }, \"z\": 12345678901234567890 }"},
		{"NoOther", "{\"mcpServers\": {}}", "{\"mcpServers\": {\n  \"pyro\": ENTRY\n}}"},
		{"OneLine", `{"mcpServers":{"x":{"command":"x"}}}`, "{\"mcpServers\":{\"x\":{\"command\":\"x\"},\n\"pyro\": ENTRY}}"},
		{"Drifted", "{\n  \"mcpServers\": {\n    \"pyro\": {\"command\": \"old\", \"timeout\": 5, \"env\": {\"MINE\": \"1\"}},\n    \"x\": {}\n  }\n}", "{\n  \"mcpServers\": {\n    \"pyro\": ENTRY,\n    \"x\": {}\n  }\n}"},
		{"NoObject", "{\n  \"mcpServers\": {\n    \"pyro\": 7\n  }\n}", "{\n  \"mcpServers\": {\n    \"pyro\": ENTRY\n  }\n}"},
		{"Empty", "", "{\n  \"mcpServers\": {\n    \"pyro\": ENTRY\n  }\n}\n"},
		{"CRLF", "{\r\n  \"a\": 1\r\n}\r\n", "{\r\n  \"a\": 1,\n  \"mcpServers\": {\n    \"pyro\": ENTRY\n  }\r\n}\r\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			h, home := newHelper(t)
			file := filepath.Join(home, ".cursor", "mcp.json")
			write(t, file, test.before, 0o640)
			c, err := h.Merge(hosthelper.Cursor, "", entry(t), false)
			if err != nil {
				t.Fatal(err)
			}
			got := read(t, file)
			prefix, suffix, _ := strings.Cut(test.after, "ENTRY")
			if !strings.HasPrefix(got, prefix) || !strings.HasSuffix(got, suffix) || !json.Valid([]byte(got)) {
				t.Errorf("got\n%q\nwant\n%q", got, test.after)
			}
			if test.name == "Drifted" && (!strings.Contains(got, `"timeout": 5`) || !strings.Contains(got, `"MINE": "1"`)) {
				t.Errorf("what the person added is gone: %s", got)
			}
			if c.Backup == "" || read(t, c.Backup) != test.before {
				t.Errorf("backup %q", c.Backup)
			}
			if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o640 {
				t.Errorf("mode %v, %v", st.Mode(), err)
			}
			if again, err := h.Merge(hosthelper.Cursor, "", hosthelper.Entry{Command: jsonCommand(t, got), Args: []string{"mcp", "serve"}, Env: map[string]string{"A": "b"}}, false); err != nil || again.Action != hosthelper.ActionNone {
				t.Errorf("again: %+v, %v", again, err)
			}
		})
	}
}

func jsonCommand(t *testing.T, text string) string {
	t.Helper()
	var doc struct {
		MCPServers map[string]hosthelper.Entry `json:"mcpServers"`
	}
	if err := json.Unmarshal([]byte(text), &doc); err != nil {
		t.Fatal(err)
	}
	return doc.MCPServers["pyro"].Command
}

// A file that pyro does not understand is left as it is, with the lines to paste.
func TestMergeRefuses(t *testing.T) {
	for name, text := range map[string]string{
		"Comment":       "{\n  // mine\n  \"a\": 1\n}",
		"TrailingComma": `{"a": 1,}`,
		"TOML":          "[mcp]\na = 1\n",
		"Damaged":       `{"a": `,
		"Array":         `[]`,
		"ServersArray":  `{"mcpServers": []}`,
		"Twice":         `{"mcpServers": {}, "mcpServers": {"x": {}}}`,
		"TwiceEscaped":  `{"mcpServers": {}, "mcpServer\u0073": {"x": {}}}`,
		"EntryTwice":    `{"mcpServers": {"pyro": {}, "pyro": {}}}`,
		"BOM":           "\ufeff{}",
		"Two":           "{} {}",
	} {
		t.Run(name, func(t *testing.T) {
			h, home := newHelper(t)
			file := filepath.Join(home, ".cursor", "mcp.json")
			write(t, file, text, 0o600)
			e := entry(t)
			_, err := h.Merge(hosthelper.Cursor, "", e, false)
			if !errors.Is(err, api.ErrUnsupported) || !strings.Contains(api.Hint(err), e.Command) {
				t.Errorf("got %v (%s)", err, api.Hint(err))
			}
			if read(t, file) != text {
				t.Error("it was changed")
			}
			if left, err := os.ReadDir(filepath.Dir(file)); err != nil || len(left) != 1 {
				t.Errorf("left behind: %v, %v", left, err)
			}
		})
	}
}

func TestMergeThroughALink(t *testing.T) {
	h, home := newHelper(t)
	real := filepath.Join(home, "dotfiles", "mcp.json")
	write(t, real, "{}", 0o600)
	link := filepath.Join(home, ".cursor", "mcp.json")
	if err := os.MkdirAll(filepath.Dir(link), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(real, link); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Merge(hosthelper.Cursor, "", entry(t), false); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Lstat(link); err != nil || st.Mode().Type() != os.ModeSymlink || !strings.Contains(read(t, real), "pyro") {
		t.Errorf("the link is %v, %v, and leads to %s", st.Mode(), err, read(t, real))
	}
}

// Drift is what keeps the entry from starting this pyro.
func TestStatus(t *testing.T) {
	h, home := newHelper(t)
	e := entry(t)
	other := program(t)
	for _, test := range []struct {
		name    string
		text    string
		anyArgs bool
		want    string
	}{
		{"Right", `{"command":"PYRO","args":["mcp","serve"],"env":{"A":"b"}}`, false, hosthelper.StateConfigured},
		{"MoreEnv", `{"command":"PYRO","args":["mcp","serve"],"env":{"A":"b","C":"d"}}`, false, hosthelper.StateConfigured},
		{"OtherArgs", `{"command":"PYRO","args":["mcp","other"],"env":{"A":"b"}}`, false, hosthelper.StateDrifted},
		{"OtherArgsUnderstood", `{"command":"PYRO","args":["mcp","other"],"env":{"A":"b"}}`, true, hosthelper.StateConfigured},
		{"Nonsense", `{"command":"PYRO","args":["nonsense"],"env":{"A":"b"}}`, true, hosthelper.StateDrifted},
		{"OtherEnv", `{"command":"PYRO","args":["mcp","serve"],"env":{"A":"x"}}`, true, hosthelper.StateDrifted},
		{"OtherPyro", `{"command":"` + other + `","args":["mcp","serve"],"env":{"A":"b"}}`, true, hosthelper.StateDrifted},
		{"Gone", `{"command":"/nowhere/pyro","args":["mcp","serve"],"env":{"A":"b"}}`, true, hosthelper.StateDrifted},
		{"NoCommand", `{"url":"http://x"}`, true, hosthelper.StateDrifted},
		{"NoObject", `7`, true, hosthelper.StateDrifted},
		{"Absent", `null`, true, hosthelper.StateAbsent},
	} {
		t.Run(test.name, func(t *testing.T) {
			text := `{/* a comment */ "mcpServers": {"pyro": ` + strings.ReplaceAll(test.text, "PYRO", e.Command) + `,}}`
			write(t, filepath.Join(home, ".cursor", "mcp.json"), text, 0o600)
			s, err := h.Status(t.Context(), hosthelper.Cursor, hosthelper.Want{Entry: e, AnyArgs: test.anyArgs})
			if err != nil || s.State != test.want || (s.State == hosthelper.StateDrifted) != (s.Detail != "") {
				t.Errorf("got %+v, %v, want %s", s, err, test.want)
			}
		})
	}
	write(t, filepath.Join(home, ".cursor", "mcp.json"), "{", 0o600)
	if s, err := h.Status(t.Context(), hosthelper.Cursor, hosthelper.Want{Entry: e}); err != nil || s.State != hosthelper.StateUnknown {
		t.Errorf("damaged: %+v, %v", s, err)
	}
}

// Repair keeps arguments that are right where nobody says which.
func TestRepairKeepsArguments(t *testing.T) {
	h, home := newHelper(t)
	e := entry(t)
	file := filepath.Join(home, ".cursor", "mcp.json")
	write(t, file, `{"mcpServers":{"pyro":{"command":"/nowhere/pyro","args":["mcp","serve","--mode","inspect"]}}}`, 0o600)
	if _, err := h.Repair(t.Context(), hosthelper.Cursor, hosthelper.Want{Entry: e, AnyArgs: true}, false); err != nil {
		t.Fatal(err)
	}
	if got := read(t, file); !strings.Contains(got, `"inspect"`) || !strings.Contains(got, e.Command) {
		t.Errorf("repaired to %s", got)
	}
}

func TestWriteConfig(t *testing.T) {
	h, _ := newHelper(t)
	e := entry(t)
	file := filepath.Join(t.TempDir(), "new.json")
	for _, want := range []string{hosthelper.ActionAdd, hosthelper.ActionNone} {
		if c, err := h.WriteConfig(hosthelper.VSCode, file, e, false); err != nil || c.Action != want {
			t.Errorf("%+v, %v, want %s", c, err, want)
		}
	}
	other := maps.Clone(e.Env)
	other["A"] = "c"
	e.Env = other
	if _, err := h.WriteConfig(hosthelper.VSCode, file, e, false); !errors.Is(err, api.ErrExists) {
		t.Errorf("over another file: %v", err)
	}
}

func TestHostsThatAreNotThere(t *testing.T) {
	h, _ := newHelper(t)
	e := entry(t)
	for _, host := range []string{hosthelper.ClaudeCode, hosthelper.Codex} {
		if _, err := h.Connect(t.Context(), host, "user", e, false); !errors.Is(err, api.ErrUnavailable) || !strings.Contains(api.Hint(err), e.Command) {
			t.Errorf("%s: %v (%s)", host, err, api.Hint(err))
		}
		if _, err := h.Merge(host, "", e, false); !errors.Is(err, api.ErrUnsupported) {
			t.Errorf("%s: merge: %v", host, err)
		}
	}
	if _, err := h.Connect(t.Context(), hosthelper.Zed, "user", e, false); !errors.Is(err, api.ErrUnsupported) {
		t.Errorf("zed: %v", err)
	}
	if _, err := h.Connect(t.Context(), "nobody", "user", e, false); !errors.Is(err, api.ErrInvalid) {
		t.Errorf("nobody: %v", err)
	}
}

func TestQuote(t *testing.T) {
	if got, want := hosthelper.Quote([]string{"a", "b c", "it's", "", "$x", "--y=z"}), `a 'b c' 'it'\''s' '' '$x' --y=z`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// Whatever the file is: it stays, or it is valid with nothing lost.
func FuzzMerge(f *testing.F) {
	for _, s := range []string{"", "{}", `{"mcpServers":{"pyro":{"env":{"A":1}}}}`, `{"a":{},"mcpServers":{ }}`, `{"mcpServers":null}`, "{\n\t\"mcpServers\" : {\"x\":[]}\n}", `{"mcpServers":{"pyro":[]},"":""}`} {
		f.Add([]byte(s))
	}
	dir := f.TempDir()
	f.Setenv("HOME", dir)
	h, err := hosthelper.New(func([]string) error { return nil })
	if err != nil {
		f.Fatal(err)
	}
	e := hosthelper.Entry{Command: "/bin/pyro", Args: []string{"mcp", "serve"}, Env: map[string]string{"A": "b"}}
	f.Fuzz(func(t *testing.T, text []byte) {
		file := filepath.Join(t.TempDir(), "c.json")
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := h.Merge(hosthelper.Cursor, file, e, false); err != nil {
			if errors.Is(err, api.ErrInternal) {
				t.Fatalf("%q: %v", text, err)
			}
			if got, _ := os.ReadFile(file); string(got) != string(text) {
				t.Fatalf("refused and changed: %q", got)
			}
			return
		}
		got, err := os.ReadFile(file)
		if err != nil || !json.Valid(got) {
			t.Fatalf("%q became %q, %v", text, got, err)
		}
		c, err := h.Merge(hosthelper.Cursor, file, e, true)
		if err != nil || c.Action != hosthelper.ActionNone {
			t.Fatalf("%q became %q: %+v, %v", text, got, c, err)
		}
	})
}
