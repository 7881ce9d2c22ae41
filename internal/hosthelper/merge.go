package hosthelper

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"

	"github.com/tailscale/hujson"

	"github.com/pyro-mcp/pyro/api"
)

// BackupSuffix is behind the name of the copy of a file that was changed.
const BackupSuffix = ".before-pyro"

// Merge puts the entry into a host's configuration file, or into file if that is
// not "". Everything else in the file stays byte for byte.
func (h *Helper) Merge(host, file string, e Entry, dryRun bool) (*Change, error) {
	if err := checkHost(host); err != nil {
		return nil, err
	}
	if HasCommand(host) {
		return nil, api.WithHint(api.Errorf(api.ErrUnsupported, "%s keeps its configuration to itself", host), "run: pyro host connect %s", host)
	}
	own, f := h.file(host)
	if file == "" {
		file = own
	}
	c := &Change{Host: host, Action: ActionAdd, DryRun: dryRun, Commands: [][]string{}, File: file}
	old, err := readBounded(file)
	if err != nil && !notExist(err) {
		return nil, fmt.Errorf("reading %s: %w", file, err)
	}
	isNew := err != nil
	merged, err := f.merge(c, old, e)
	if err != nil {
		config, configErr := h.Config(host, e)
		if configErr != nil {
			return nil, configErr
		}
		return nil, api.WithHint(fmt.Errorf("%s is left as it is: %w", file, err), "add this to it by hand:\n%s", strings.TrimSpace(config))
	}
	if c.Action == ActionNone || dryRun {
		return c, nil
	}
	if !isNew {
		c.Backup = file + BackupSuffix
	}
	return c, replaceFile(file, c.Backup, old, merged, isNew)
}

// merge returns text with the entry in it, and tells c what changes.
func (f format) merge(c *Change, text []byte, e Entry) ([]byte, error) {
	if len(bytes.TrimSpace(text)) == 0 {
		text = []byte("{}\n")
	}
	root, err := hujson.Parse(text)
	if err != nil {
		return nil, api.Errorf(api.ErrUnsupported, "it is not JSON (%v)", err)
	}
	if !root.IsStandard() {
		return nil, api.Errorf(api.ErrUnsupported, "it has comments or trailing commas, and is not plain JSON")
	}
	if _, ok := root.Value.(*hujson.Object); !ok {
		return nil, api.Errorf(api.ErrUnsupported, "it is not a JSON object")
	}
	servers, err := member(&root, f.key)
	if err != nil {
		return nil, err
	}
	indent := indentOf(text)
	fields := f.fields(e)
	var merged []byte
	switch {
	case servers == nil:
		c.After, merged, err = insert(text, &root, f.key, map[string]any{ServerName: fields}, indent)
	default:
		var entry *hujson.Value
		if entry, err = member(servers, ServerName); err != nil {
			return nil, err
		}
		if entry == nil {
			c.After, merged, err = insert(text, servers, ServerName, fields, indent)
			break
		}
		merged, err = f.replace(c, text, entry, e, fields, indent)
	}
	if err != nil || c.Action == ActionNone {
		return merged, err
	}
	return merged, f.verify(text, merged, fields)
}

// replace changes an entry that is there: pyro's fields of it.
func (f format) replace(c *Change, text []byte, entry *hujson.Value, e Entry, fields map[string]any, indent string) ([]byte, error) {
	raw := text[entry.StartOffset:entry.EndOffset]
	c.Before = string(raw)
	was := map[string]any{}
	if json.Unmarshal(raw, &was) == nil {
		found, ok := f.entry(was)
		if ok && same(found, e) && hasPlain(was, fields) {
			c.Action = ActionNone
			return text, nil
		}
	}
	c.Action = ActionReplace
	maps.Copy(was, keepEnv(was, fields))
	value, err := indented(was, lineIndent(text, entry.StartOffset), indent)
	if err != nil {
		return nil, err
	}
	c.After = strings.TrimSpace(value)
	return splice(text, entry.StartOffset, entry.EndOffset, c.After), nil
}

// hasPlain reports whether what pyro writes besides command, arguments and
// variables, such as the type, is there.
func hasPlain(was, fields map[string]any) bool {
	for k, v := range fields {
		switch v.(type) {
		case string, bool:
			if was[k] != v {
				return false
			}
		}
	}
	return true
}

// keepEnv returns fields with the variables that somebody added.
func keepEnv(was, fields map[string]any) map[string]any {
	out := maps.Clone(fields)
	for _, key := range []string{"env", "environment"} {
		old, ok := was[key].(map[string]any)
		if !ok {
			continue
		}
		all := maps.Clone(old)
		if own, ok := fields[key].(map[string]any); ok {
			maps.Copy(all, own)
		}
		out[key] = all
	}
	return out
}

// member returns the value of a name in an object, nil if it is not there. A
// name that is there twice means something else to everybody who reads it.
func member(v *hujson.Value, name string) (*hujson.Value, error) {
	object, ok := v.Value.(*hujson.Object)
	if !ok {
		return nil, api.Errorf(api.ErrUnsupported, "something else than an object is where the servers belong")
	}
	var found *hujson.Value
	for i := range object.Members {
		m := &object.Members[i]
		if literal, ok := m.Name.Value.(hujson.Literal); !ok || literal.String() != name {
			continue
		}
		if found != nil {
			return nil, api.Errorf(api.ErrUnsupported, "it has %q twice", name)
		}
		found = &m.Value
	}
	return found, nil
}

// insert adds a member at the end of an object and returns it and all the text.
func insert(text []byte, v *hujson.Value, name string, value any, indent string) (string, []byte, error) {
	object := v.Value.(*hujson.Object)
	outer := lineIndent(text, v.StartOffset)
	inner := outer + indent
	at, before, after := 0, "\n"+inner, "\n"+outer
	if n := len(object.Members); n > 0 {
		at = object.Members[n-1].Value.EndOffset
		inner = lineIndent(text, object.Members[n-1].Name.StartOffset)
		before, after = ",\n"+inner, ""
	} else {
		at = v.StartOffset + 1 // behind the brace
		// What is between the braces of an empty object is white space.
		text = splice(text, at, v.EndOffset-1, "")
	}
	written, err := indented(value, inner, indent)
	if err != nil {
		return "", nil, err
	}
	key, err := json.Marshal(name)
	if err != nil {
		return "", nil, err
	}
	entry := string(key) + ": " + strings.TrimSpace(written)
	return entry, splice(text, at, at, before+entry+after), nil
}

func splice(text []byte, from, to int, with string) []byte {
	out := append([]byte(nil), text[:from]...)
	out = append(out, with...)
	return append(out, text[to:]...)
}

// lineIndent is the white space at the beginning of the line of a position.
func lineIndent(text []byte, at int) string {
	line := text[bytes.LastIndexByte(text[:at], '\n')+1:]
	return string(line[:len(line)-len(bytes.TrimLeft(line, " \t"))])
}

// indentOf is one step of a file's indentation.
func indentOf(text []byte) string {
	for line := range bytes.Lines(text) {
		if in := len(line) - len(bytes.TrimLeft(line, " \t")); in > 0 && in < 9 {
			return string(line[:in])
		}
	}
	return "  "
}

// verify makes sure that nothing but the entry differs.
func (f format) verify(before, after []byte, fields map[string]any) error {
	var was, is map[string]any
	for text, to := range map[*[]byte]*map[string]any{&before: &was, &after: &is} {
		dec := json.NewDecoder(bytes.NewReader(*text))
		dec.UseNumber()
		if err := dec.Decode(to); err != nil {
			return api.Errorf(api.ErrInternal, "what would be written cannot be read: %v", err)
		}
	}
	servers, _ := is[f.key].(map[string]any)
	entry, _ := servers[ServerName].(map[string]any)
	for k, v := range fields {
		if m, isEnv := v.(map[string]any); isEnv {
			got, _ := entry[k].(map[string]any)
			for name := range m {
				if got[name] != m[name] {
					return api.Errorf(api.ErrInternal, "what would be written is not the entry")
				}
			}
			continue
		}
		if !reflect.DeepEqual(entry[k], v) {
			return api.Errorf(api.ErrInternal, "what would be written is not the entry")
		}
	}
	for _, doc := range []map[string]any{was, is} {
		if servers, ok := doc[f.key].(map[string]any); ok {
			delete(servers, ServerName)
			if len(servers) == 0 {
				delete(doc, f.key)
			}
		}
	}
	if !reflect.DeepEqual(was, is) {
		return api.Errorf(api.ErrInternal, "what would be written changes more than the entry")
	}
	return nil
}

// replaceFile writes a file in one step, through links, with the mode and owner
// it had, after a copy of what was there to backup.
func replaceFile(file, backup string, old, text []byte, isNew bool) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("writing %s: %w", file, fileError(err))
		}
	}()
	mode, uid, gid := os.FileMode(0o600), -1, -1
	if isNew {
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			return err
		}
	} else {
		if file, err = filepath.EvalSymlinks(file); err != nil {
			return err
		}
		st, err := os.Stat(file)
		if err != nil {
			return err
		}
		mode = st.Mode().Perm()
		if sys, ok := st.Sys().(*syscall.Stat_t); ok && (int(sys.Uid) != os.Geteuid() || int(sys.Gid) != os.Getegid()) {
			uid, gid = int(sys.Uid), int(sys.Gid)
		}
		if err := writeNew(backup, old, mode, uid, gid); err != nil {
			return err
		}
	}
	// Somebody who wrote meanwhile, the host itself for instance, wins.
	now, err := os.ReadFile(file)
	if (isNew && !os.IsNotExist(err)) || (!isNew && (err != nil || !bytes.Equal(now, old))) {
		return api.WithHint(api.Errorf(api.ErrBusy, "it changed at the same moment"), "close the chat host and try again")
	}
	return writeNew(file, text, mode, uid, gid)
}

// writeNew puts a file in place of what is there, flushed to the disk.
func writeNew(file string, text []byte, mode os.FileMode, uid, gid int) error {
	tmp, err := os.CreateTemp(filepath.Dir(file), ".pyro-*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	if uid >= 0 {
		if err := tmp.Chown(uid, gid); err != nil {
			return err
		}
	}
	if err := tmp.Chmod(mode); err != nil {
		return err
	}
	if _, err := tmp.Write(text); err != nil {
		return err
	}
	if err := tmp.Sync(); err != nil {
		return err
	}
	if err := tmp.Close(); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), file)
}

// WriteConfig writes a new file with nothing but the entry.
func (h *Helper) WriteConfig(host, file string, e Entry, dryRun bool) (*Change, error) {
	config, err := h.Config(host, e)
	if err != nil {
		return nil, err
	}
	c := &Change{Host: host, Action: ActionAdd, DryRun: dryRun, Commands: [][]string{}, File: file, After: config}
	old, err := readBounded(file)
	switch {
	case err == nil && string(old) == config:
		c.Action = ActionNone
		return c, nil
	case !notExist(err):
		return nil, api.WithHint(api.Errorf(api.ErrExists, "%s exists", file), "name another file, or pass --merge to change %s's own", host)
	case dryRun:
		return c, nil
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("writing %s: %w", file, fileError(err))
	}
	_, err = f.WriteString(config)
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return nil, fmt.Errorf("writing %s: %w", file, fileError(err))
	}
	return c, nil
}
