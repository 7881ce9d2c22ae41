// Package hosthelper puts pyro's MCP server into the configuration of chat
// hosts, tells whether it is there and right, and mends it.
//
// Hosts that have a command of their own for this, Claude Code and Codex, are
// changed through it. For the others pyro edits a JSON file: in place, so that
// all of it that is not pyro's stays byte for byte, in one step, and with a copy
// of what was there. A file that is not plain JSON (with comments, for instance)
// is never touched: the person gets the lines to paste.
package hosthelper

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/pyro-mcp/pyro/api"
)

// ServerName is what the entries are called.
const ServerName = "pyro"

// An Entry is how a host starts the server.
type Entry struct {
	Command string            `json:"command"`
	Args    []string          `json:"args"`
	Env     map[string]string `json:"env"`
}

// The hosts.
const (
	ClaudeCode    = "claude-code"
	Codex         = "codex"
	OpenCode      = "opencode"
	ClaudeDesktop = "claude-desktop"
	Cursor        = "cursor"
	VSCode        = "vscode"
	Zed           = "zed"
)

// Hosts are the hosts that pyro knows.
func Hosts() []string {
	return []string{ClaudeCode, Codex, OpenCode, ClaudeDesktop, Cursor, VSCode, Zed}
}

// HasCommand reports whether a host is changed through its own command.
func HasCommand(host string) bool { return host == ClaudeCode || host == Codex }

// A Helper works for one person. Its zero value does not work: use New.
type Helper struct {
	home   string
	config string // XDG_CONFIG_HOME, or what stands for it
	claude string // Claude Code's file
	dir    string // working directory, which Claude Code's scopes depend on
	// check says what is wrong with the arguments of an entry, by which it is
	// told whether an entry that nobody described is right.
	check func([]string) error
}

// New returns a Helper for the person that runs this process.
func New(check func([]string) error) (*Helper, error) {
	home, err := os.UserHomeDir()
	if err != nil {
		return nil, api.WithHint(api.Errorf(api.ErrUnavailable, "no home directory is known"), "set HOME")
	}
	h := &Helper{home: home, config: filepath.Join(home, ".config"), claude: filepath.Join(home, ".claude.json"), check: check}
	if runtime.GOOS == "darwin" {
		h.config = filepath.Join(home, "Library", "Application Support")
	}
	if d := os.Getenv("XDG_CONFIG_HOME"); filepath.IsAbs(d) {
		h.config = d
	}
	if d := os.Getenv("CLAUDE_CONFIG_DIR"); d != "" {
		h.claude = filepath.Join(d, ".claude.json")
	}
	if h.dir, err = os.Getwd(); err != nil {
		h.dir = home
	}
	return h, nil
}

// checkHost returns an error for a host that pyro does not know.
func checkHost(host string) error {
	if slices.Contains(Hosts(), host) {
		return nil
	}
	return api.WithHint(api.Errorf(api.ErrInvalid, "there is no chat host %q", host), "the hosts are %s", strings.Join(Hosts(), ", "))
}

// programs are the commands by which a host is known to be installed.
var programs = map[string][]string{
	ClaudeCode: {"claude"}, Codex: {"codex"}, OpenCode: {"opencode"}, ClaudeDesktop: {"claude-desktop"},
	Cursor: {"cursor"}, VSCode: {"code", "codium"}, Zed: {"zed", "zeditor"},
}

// program returns the host's program, "" if it is not on PATH.
func program(host string) string {
	for _, name := range programs[host] {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	return ""
}

// file returns the host's configuration file, and its format.
func (h *Helper) file(host string) (string, format) {
	switch host {
	case OpenCode:
		dir := h.config
		if os.Getenv("XDG_CONFIG_HOME") == "" {
			dir = filepath.Join(h.home, ".config") // on every system
		}
		// It reads both and makes the second itself.
		for _, name := range []string{"opencode.json", "opencode.jsonc"} {
			if path := filepath.Join(dir, "opencode", name); exists(path) {
				return path, openCodeFormat
			}
		}
		return filepath.Join(dir, "opencode", "opencode.json"), openCodeFormat
	case ClaudeDesktop:
		return filepath.Join(h.config, "Claude", "claude_desktop_config.json"), plainFormat
	case Cursor:
		return filepath.Join(h.home, ".cursor", "mcp.json"), plainFormat
	case VSCode:
		return filepath.Join(h.config, "Code", "User", "mcp.json"), vscodeFormat
	case Zed:
		dir := h.config
		if runtime.GOOS == "darwin" {
			dir = filepath.Join(h.home, ".config")
		}
		return filepath.Join(dir, "zed", "settings.json"), zedFormat
	case ClaudeCode:
		return h.claude, plainFormat
	}
	return "", format{}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// A format is how an entry looks in a host's file.
type format struct {
	key string // of the object that holds the servers
	// fields returns what pyro writes of an entry.
	fields func(Entry) map[string]any
	// entry reads one back; ok is whether it is of a kind that pyro writes.
	entry func(map[string]any) (e Entry, ok bool)
}

var (
	plainFormat  = format{"mcpServers", plainFields, plainEntry}
	vscodeFormat = format{"servers", func(e Entry) map[string]any { return with(plainFields(e), "type", "stdio") }, plainEntry}
	zedFormat    = format{"context_servers", func(e Entry) map[string]any { return with(plainFields(e), "source", "custom") }, plainEntry}
	// https://opencode.ai/docs/mcp-servers: one list for command and arguments.
	openCodeFormat = format{"mcp", openCodeFields, openCodeEntry}
)

func with(m map[string]any, key string, value any) map[string]any {
	m[key] = value
	return m
}

func plainFields(e Entry) map[string]any {
	m := map[string]any{"command": e.Command, "args": stringsToAny(e.Args)}
	if len(e.Env) > 0 {
		m["env"] = envToAny(e.Env)
	}
	return m
}

func plainEntry(m map[string]any) (Entry, bool) {
	var e Entry
	var ok bool
	if e.Command, ok = m["command"].(string); !ok {
		return e, false
	}
	if kind, given := m["type"]; given && kind != "stdio" {
		return e, false
	}
	args, okArgs := anyToStrings(m["args"])
	env, okEnv := anyToEnv(m["env"])
	e.Args, e.Env = args, env
	return e, okArgs && okEnv
}

func openCodeFields(e Entry) map[string]any {
	m := map[string]any{"type": "local", "enabled": true, "command": stringsToAny(append([]string{e.Command}, e.Args...))}
	if len(e.Env) > 0 {
		m["environment"] = envToAny(e.Env)
	}
	return m
}

func openCodeEntry(m map[string]any) (Entry, bool) {
	words, ok := anyToStrings(m["command"])
	env, okEnv := anyToEnv(m["environment"])
	if !ok || !okEnv || len(words) == 0 || m["type"] != "local" {
		return Entry{}, false
	}
	return Entry{words[0], words[1:], env}, true
}

func stringsToAny(in []string) []any {
	out := make([]any, len(in))
	for i, s := range in {
		out[i] = s
	}
	return out
}

func envToAny(in map[string]string) map[string]any {
	out := map[string]any{}
	for k, v := range in {
		out[k] = v
	}
	return out
}

func anyToStrings(v any) ([]string, bool) {
	if v == nil {
		return nil, true
	}
	list, ok := v.([]any)
	out := make([]string, len(list))
	for i, x := range list {
		s, isString := x.(string)
		out[i], ok = s, ok && isString
	}
	return out, ok
}

func anyToEnv(v any) (map[string]string, bool) {
	if v == nil {
		return nil, true
	}
	m, ok := v.(map[string]any)
	out := map[string]string{}
	for k, x := range m {
		s, isString := x.(string)
		out[k], ok = s, ok && isString
	}
	return out, ok
}

// Config returns what a person would write into a host's configuration: JSON,
// and TOML for Codex.
func (h *Helper) Config(host string, e Entry) (string, error) {
	if err := checkHost(host); err != nil {
		return "", err
	}
	if host == Codex {
		return codexConfig(e), nil
	}
	_, f := h.file(host)
	return indented(map[string]any{f.key: map[string]any{ServerName: f.fields(e)}}, "", "  ")
}

// indented writes v as JSON with every line but the first behind prefix.
func indented(v any, prefix, indent string) (string, error) {
	var b strings.Builder
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent(prefix, indent)
	if err := enc.Encode(v); err != nil {
		return "", err
	}
	return b.String(), nil
}

// A Change is what was done to a host, or would be.
type Change struct {
	Host   string `json:"host"`
	Action string `json:"action"` // one of the Action constants
	DryRun bool   `json:"dry_run"`
	// Commands are those of the host that make the change.
	Commands [][]string `json:"commands"`
	// File is changed, from Before to After at pyro's entry; Backup is what was
	// there.
	File   string `json:"file"`
	Backup string `json:"backup"`
	Before string `json:"before"`
	After  string `json:"after"`
}

// The actions of a Change.
const (
	ActionNone    = "none"
	ActionAdd     = "add"
	ActionReplace = "replace"
)

// Connect puts the entry into a host that has a command for that. scope is
// Claude Code's: user, local or project.
func (h *Helper) Connect(ctx context.Context, host, scope string, e Entry, dryRun bool) (*Change, error) {
	switch host {
	case ClaudeCode:
		return h.connectClaude(ctx, scope, e, dryRun)
	case Codex:
		return h.connectCodex(ctx, e, dryRun)
	}
	if err := checkHost(host); err != nil {
		return nil, err
	}
	return nil, api.WithHint(api.Errorf(api.ErrUnsupported, "%s has no command that adds a server", host), "run: pyro host print-config %s --merge", host)
}

// notExist reports whether err says that a file is not there.
func notExist(err error) bool { return errors.Is(err, fs.ErrNotExist) }
