package hosthelper

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/boundedlog"
)

// commandTimeout bounds one command of a host: they only edit a file.
const commandTimeout = time.Minute

// run runs a host's command and returns its stdout.
func run(ctx context.Context, argv []string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("running %s: %w", Quote(argv), context.Cause(ctx))
		}
		text := strings.TrimSpace(complaint.String() + "\n" + out.String())
		return nil, api.Errorf(api.ErrUnavailable, "running %s: %s: %s", Quote(argv), err, boundedlog.Printable(firstLines(text)))
	}
	return out.Bytes(), nil
}

func firstLines(text string) string {
	const most = 500
	return text[:min(most, len(text))]
}

// Quote writes a command such that a shell would run it.
func Quote(argv []string) string {
	quoted := make([]string, len(argv))
	for i, w := range argv {
		quoted[i] = w
		plain := func(r rune) bool {
			return (r >= 'a' && r <= 'z') || (r >= 'A' && r <= 'Z') || (r >= '0' && r <= '9') || strings.ContainsRune("-_./:=@+,%", r)
		}
		if w == "" || strings.ContainsFunc(w, func(r rune) bool { return !plain(r) }) {
			quoted[i] = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
		}
	}
	return strings.Join(quoted, " ")
}

// missing is the error for a host whose command is not installed.
func (h *Helper) missing(host string, e Entry) error {
	config, err := h.Config(host, e)
	if err != nil {
		return err
	}
	return api.WithHint(api.Errorf(api.ErrUnavailable, "%s is not installed: no %s on PATH", host, programs[host][0]),
		"install it, or write this into its configuration:\n%s", strings.TrimSpace(config))
}

// connectClaude runs claude mcp add, which refuses a name that is taken: what
// is there is removed first, and put back if adding fails.
func (h *Helper) connectClaude(ctx context.Context, scope string, e Entry, dryRun bool) (*Change, error) {
	if !slices.Contains(claudeScopes, scope) {
		return nil, api.WithHint(api.Errorf(api.ErrInvalid, "there is no scope %q", scope), "the scopes are user, local and project")
	}
	claude := program(ClaudeCode)
	if claude == "" {
		return nil, h.missing(ClaudeCode, e)
	}
	c := &Change{Host: ClaudeCode, Action: ActionAdd, DryRun: dryRun, Commands: [][]string{}}
	found, err := h.claudeEntry(scope)
	if err != nil {
		return nil, err
	}
	if found.raw != nil {
		if found.ok && same(found.Entry, e) {
			c.Action = ActionNone
			return c, nil
		}
		c.Action = ActionReplace
		c.Commands = append(c.Commands, []string{claude, "mcp", "remove", "--scope", scope, ServerName})
	}
	add := []string{claude, "mcp", "add", "--scope", scope, ServerName}
	for _, k := range sortedKeys(e.Env) {
		add = append(add, "-e", k+"="+e.Env[k])
	}
	c.Commands = append(c.Commands, append(append(add, "--", e.Command), e.Args...))
	if dryRun {
		return c, nil
	}
	for i, argv := range c.Commands {
		if _, err := run(ctx, argv); err != nil {
			if i > 0 {
				err = h.restoreClaude(ctx, claude, scope, found.raw, err)
			}
			return nil, err
		}
	}
	return c, nil
}

// restoreClaude puts a removed entry back after failed.
func (h *Helper) restoreClaude(ctx context.Context, claude, scope string, raw map[string]any, failed error) error {
	text, err := json.Marshal(raw)
	if err == nil {
		argv := []string{claude, "mcp", "add-json", "--scope", scope, ServerName, string(text)}
		_, err = run(context.WithoutCancel(ctx), argv)
	}
	if err != nil {
		return api.WithHint(failed, "the entry that was there is gone; it was: %s", text)
	}
	return failed
}

var claudeScopes = []string{"local", "project", "user"} // in Claude Code's order

// foundEntry is an entry as it is in a host's configuration.
type foundEntry struct {
	Entry
	ok    bool           // it could be read as an Entry
	raw   map[string]any // nil if there is none
	where string
}

// claudeEntry reads the entry of one scope.
func (h *Helper) claudeEntry(scope string) (foundEntry, error) {
	file := h.claude
	if scope == "project" {
		file = filepath.Join(h.dir, ".mcp.json")
	}
	doc, err := readLenient(file)
	if err != nil {
		return foundEntry{}, err
	}
	if scope == "local" {
		projects, _ := doc["projects"].(map[string]any)
		doc, _ = projects[h.dir].(map[string]any)
	}
	return plainFormat.find(doc, file+" ("+scope+")"), nil
}

func (f format) find(doc map[string]any, where string) foundEntry {
	servers, _ := doc[f.key].(map[string]any)
	raw, ok := servers[ServerName].(map[string]any)
	if !ok {
		if servers[ServerName] == nil {
			return foundEntry{}
		}
		raw = map[string]any{}
	}
	found := foundEntry{raw: raw, where: where}
	found.Entry, found.ok = f.entry(raw)
	return found
}

// maxConfigFile bounds a configuration file; Claude Code's also holds history.
const maxConfigFile = 64 << 20

func readBounded(file string) ([]byte, error) {
	st, err := os.Stat(file)
	if err != nil {
		return nil, fileError(err)
	}
	if !st.Mode().IsRegular() || st.Size() > maxConfigFile {
		return nil, api.Errorf(api.ErrInvalid, "%s is no regular file of at most %d MiB", file, maxConfigFile>>20)
	}
	text, err := os.ReadFile(file)
	return text, fileError(err)
}

// fileError gives an error of the file system its class.
func fileError(err error) error {
	switch {
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		return fmt.Errorf("%w (%w)", err, api.ErrDenied)
	case errors.Is(err, syscall.ENOSPC):
		return fmt.Errorf("%w (%w)", err, api.ErrExhausted)
	}
	return err
}

// connectCodex runs codex mcp add, which replaces an entry.
func (h *Helper) connectCodex(ctx context.Context, e Entry, dryRun bool) (*Change, error) {
	codex := program(Codex)
	if codex == "" {
		return nil, h.missing(Codex, e)
	}
	c := &Change{Host: Codex, Action: ActionAdd, DryRun: dryRun, Commands: [][]string{}}
	found, err := h.codexEntry(ctx, codex)
	if err != nil {
		return nil, err
	}
	if found.raw != nil {
		if found.ok && same(found.Entry, e) {
			c.Action = ActionNone
			return c, nil
		}
		c.Action = ActionReplace
	}
	add := []string{codex, "mcp", "add", ServerName}
	for _, k := range sortedKeys(e.Env) {
		add = append(add, "--env", k+"="+e.Env[k])
	}
	c.Commands = append(c.Commands, append(append(add, "--", e.Command), e.Args...))
	if !dryRun {
		_, err = run(ctx, c.Commands[0])
	}
	return c, err
}

// codexEntry asks codex itself: its file is TOML, in several layers.
func (h *Helper) codexEntry(ctx context.Context, codex string) (foundEntry, error) {
	out, err := run(ctx, []string{codex, "mcp", "list", "--json"})
	if err != nil {
		return foundEntry{}, err
	}
	var all []struct {
		Name      string
		Transport map[string]any
	}
	if err := json.Unmarshal(out, &all); err != nil {
		return foundEntry{}, api.Errorf(api.ErrUnsupported, "codex mcp list --json prints something else than a list of servers: %v", err)
	}
	for _, s := range all {
		if s.Name == ServerName {
			found := foundEntry{raw: s.Transport, where: "codex"}
			found.Entry, found.ok = plainEntry(s.Transport)
			return found, nil
		}
	}
	return foundEntry{}, nil
}

// codexConfig writes the entry as TOML, whose basic strings JSON strings are.
func codexConfig(e Entry) string {
	str := func(s string) string {
		text, err := indented(s, "", "")
		if err != nil {
			panic(err) // a string always has JSON
		}
		return strings.ReplaceAll(strings.TrimSpace(text), "\u007f", `\u007f`)
	}
	args := make([]string, len(e.Args))
	for i, a := range e.Args {
		args[i] = str(a)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "[mcp_servers.%s]\ncommand = %s\nargs = [%s]\n", ServerName, str(e.Command), strings.Join(args, ", "))
	if len(e.Env) > 0 {
		fmt.Fprintf(&b, "\n[mcp_servers.%s.env]\n", ServerName)
		for _, k := range sortedKeys(e.Env) {
			fmt.Fprintf(&b, "%s = %s\n", str(k), str(e.Env[k]))
		}
	}
	return b.String()
}

func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// same reports whether found does what want says. Variables that somebody added
// are theirs.
func same(found, want Entry) bool {
	if found.Command != want.Command || !slices.Equal(found.Args, want.Args) {
		return false
	}
	for k, v := range want.Env {
		if got, ok := found.Env[k]; !ok || got != v {
			return false
		}
	}
	return true
}
