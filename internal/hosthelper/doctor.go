package hosthelper

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
)

// The states of pyro in a host.
const (
	StateAbsent     = "absent"
	StateConfigured = "configured"
	StateDrifted    = "drifted"
	StateUnknown    = "unknown" // the configuration cannot be read
)

// A Status is what pyro knows about one host.
type Status struct {
	Host      string `json:"host"`
	Installed bool   `json:"installed"`
	State     string `json:"state"`
	// Where is the file or scope in which the entry was found.
	Where   string   `json:"where"`
	Command string   `json:"command"`
	Args    []string `json:"args"`
	// Detail says what is wrong, and Repair the command that mends it.
	Detail string `json:"detail"`
	Repair string `json:"repair"`
}

// Want is the entry that a host should have. Where nobody said which arguments,
// any that pyro understands will do.
type Want struct {
	Entry
	AnyArgs bool
}

// Status looks at one host and changes nothing.
func (h *Helper) Status(ctx context.Context, host string, want Want) (*Status, error) {
	if err := checkHost(host); err != nil {
		return nil, err
	}
	s := &Status{Host: host, State: StateAbsent, Args: []string{}, Installed: h.installed(host)}
	found, err := h.found(ctx, host)
	switch {
	case err != nil:
		s.State, s.Detail = StateUnknown, err.Error()
	case found.raw == nil:
		if s.Installed {
			s.Repair = "pyro host repair " + host
		}
	default:
		s.State, s.Where, s.Command = StateConfigured, found.where, found.Command
		s.Args = append(s.Args, found.Args...)
		if s.Detail = h.drift(found, want); s.Detail != "" {
			s.State, s.Repair = StateDrifted, "pyro host repair "+host
		}
	}
	return s, nil
}

func (h *Helper) installed(host string) bool {
	if program(host) != "" {
		return true
	}
	file, _ := h.file(host)
	return file != "" && !HasCommand(host) && exists(filepath.Dir(file))
}

// found reads a host's entry. The one that Claude Code would use is that of the
// narrowest scope.
func (h *Helper) found(ctx context.Context, host string) (foundEntry, error) {
	switch host {
	case ClaudeCode:
		for _, scope := range claudeScopes {
			if found, err := h.claudeEntry(scope); err != nil || found.raw != nil {
				return found, err
			}
		}
		return foundEntry{}, nil
	case Codex:
		if codex := program(Codex); codex != "" {
			return h.codexEntry(ctx, codex)
		}
		return foundEntry{}, nil
	}
	file, f := h.file(host)
	doc, err := readLenient(file)
	if err != nil {
		return foundEntry{}, err
	}
	return f.find(doc, file), nil
}

// drift says how an entry differs from what it should be, "" if it does not.
func (h *Helper) drift(found foundEntry, want Want) string {
	switch {
	case !found.ok:
		return "the entry does not start a program"
	case !runnable(found.Command):
		return fmt.Sprintf("its command %s cannot be run", found.Command)
	case !sameFile(found.Command, want.Command):
		return fmt.Sprintf("it starts %s, and this pyro is %s", found.Command, want.Command)
	}
	if want.AnyArgs {
		if err := h.check(found.Args); err != nil {
			return fmt.Sprintf("its arguments are wrong: %v", err)
		}
	} else if !slices.Equal(found.Args, want.Args) {
		return fmt.Sprintf("it runs %s, which should be %s", Quote(found.Args), Quote(want.Args))
	}
	for _, k := range sortedKeys(want.Env) {
		if got, ok := found.Env[k]; !ok || got != want.Env[k] {
			return fmt.Sprintf("its environment has not %s=%s", k, want.Env[k])
		}
	}
	return ""
}

func runnable(command string) bool {
	st, err := os.Stat(command)
	return filepath.IsAbs(command) && err == nil && st.Mode().IsRegular() && st.Mode().Perm()&0o111 != 0
}

func sameFile(a, b string) bool {
	sa, errA := os.Stat(a)
	sb, errB := os.Stat(b)
	return errA == nil && errB == nil && os.SameFile(sa, sb)
}

// Repair makes a host's entry what it should be, in the place where it is or,
// if there is none, where Connect or Merge would put it. Arguments that pyro
// understands are kept where nobody said which.
func (h *Helper) Repair(ctx context.Context, host string, want Want, dryRun bool) (*Change, error) {
	if err := checkHost(host); err != nil {
		return nil, err
	}
	e := want.Entry
	found, err := h.found(ctx, host)
	if err != nil && HasCommand(host) {
		return nil, fmt.Errorf("looking at %s: %w", host, err)
	}
	if want.AnyArgs && found.ok && h.check(found.Args) == nil {
		e.Args = found.Args
	}
	if found.ok && sameFile(found.Command, e.Command) {
		e.Command = found.Command // another name of the same program
	}
	if !HasCommand(host) {
		return h.Merge(host, "", e, dryRun)
	}
	scope := "user"
	if host == ClaudeCode {
		for _, s := range claudeScopes {
			if there, err := h.claudeEntry(s); err == nil && there.raw != nil {
				scope = s
				break
			}
		}
	}
	if found.raw != nil && len(found.Env) > 0 && found.ok {
		env := map[string]string{}
		for k, v := range found.Env {
			env[k] = v
		}
		for k, v := range e.Env {
			env[k] = v
		}
		e.Env = env
	}
	return h.Connect(ctx, host, scope, e, dryRun)
}
