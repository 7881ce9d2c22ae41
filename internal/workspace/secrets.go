package workspace

import (
	"cmp"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/redact"
	"github.com/pyro-mcp/pyro/internal/statedir"
	"github.com/pyro-mcp/pyro/internal/store"
)

// The secrets of a workspace outlive its machine, so they have to be kept; they
// are kept sealed, so that no copy of a record, a log or a directory gives them
// away. Whoever can read the key can read them: that is the user, as with any
// file of theirs.

// The bounds of a workspace's secrets.
const (
	maxSecrets     = 64
	maxSecretBytes = 64 << 10
)

// validVariable reports whether a shell can use s as a variable's name.
func validVariable(s string) bool { return len(s) <= maxVariable && variablePattern.MatchString(s) }

var variablePattern = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

const maxVariable = 64

// checkSecrets refuses secrets that could not be kept secret.
func checkSecrets(secrets []api.Secret) error {
	if len(secrets) > maxSecrets {
		return api.Errorf(api.ErrInvalid, "%d secrets are more than the limit of %d", len(secrets), maxSecrets)
	}
	seen := map[string]bool{}
	for _, s := range secrets {
		switch {
		case !validVariable(s.Name):
			return api.WithHint(api.Errorf(api.ErrInvalid, "a secret cannot be called %q", s.Name), "use letters, digits and underscores, such as API_TOKEN")
		case seen[s.Name]:
			return api.Errorf(api.ErrInvalid, "there are two secrets called %s", s.Name)
		case len(s.Value) < redact.MinLength:
			return api.WithHint(api.Errorf(api.ErrInvalid, "secret %s has %d bytes", s.Name, len(s.Value)),
				"give it at least %d: what is shorter cannot be told from other text", redact.MinLength)
		case len(s.Value) > maxSecretBytes:
			return api.Errorf(api.ErrInvalid, "secret %s has %d bytes, the limit is %d", s.Name, len(s.Value), maxSecretBytes)
		case strings.ContainsRune(s.Value, 0):
			return api.Errorf(api.ErrInvalid, "secret %s has a NUL in it, which no environment variable can hold", s.Name)
		}
		seen[s.Name] = true
	}
	return nil
}

// dangerous are variables through which a program is made to run something
// else. A secret is never meant to be in one.
func dangerous(variable string) bool {
	return strings.HasPrefix(variable, "LD_") || slices.Contains([]string{
		"PATH", "HOME", "SHELL", "IFS", "ENV", "BASH_ENV", "PYTHONPATH", "PYTHONSTARTUP", "NODE_OPTIONS", "PERL5OPT", "RUBYOPT", "GIT_SSH_COMMAND",
	}, variable)
}

// secretInfos is what records show of secrets.
func secretInfos(secrets []api.Secret) []api.SecretInfo {
	out := []api.SecretInfo{}
	for _, s := range secrets {
		kind := "literal"
		if s.FromFile {
			kind = "file"
		}
		out = append(out, api.SecretInfo{Name: s.Name, SourceKind: kind})
	}
	return out
}

// sealSecrets writes a workspace's secrets.
func (m *Manager) sealSecrets(dir statedir.Workspace, secrets []api.Secret) error {
	if len(secrets) == 0 {
		return nil
	}
	values := map[string]string{}
	for _, s := range secrets {
		values[s.Name] = s.Value
	}
	plain, err := json.Marshal(values)
	if err != nil {
		return err
	}
	box, err := m.secretBox(true)
	if err != nil {
		return err
	}
	nonce := make([]byte, box.NonceSize())
	_, _ = rand.Read(nonce) // never fails: crypto/rand ends the program instead
	f, err := os.OpenFile(dir.SecretsFile(), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	// Bound to the workspace, so that one's cannot be passed off as another's.
	_, err = f.Write(box.Seal(nonce, nonce, plain, []byte(dir.ID())))
	return errors.Join(err, f.Sync(), f.Close())
}

// secretsOf returns the values of a workspace's secrets by name.
func (m *Manager) secretsOf(ws *store.Workspace) (map[string]string, error) {
	if len(ws.Secrets) == 0 {
		return nil, nil
	}
	dir := m.state.Workspace(ws.WorkspaceID)
	sealed, err := os.ReadFile(dir.SecretsFile())
	if err != nil {
		return nil, fmt.Errorf("reading the secrets of workspace %s: %w", label(ws), err)
	}
	box, err := m.secretBox(false)
	if err != nil {
		return nil, fmt.Errorf("reading the secrets of workspace %s: %w", label(ws), err)
	}
	var plain []byte
	if n := box.NonceSize(); len(sealed) >= n {
		plain, err = box.Open(nil, sealed[:n], sealed[n:], []byte(dir.ID()))
	} else {
		err = errors.New("they are cut off")
	}
	values := map[string]string{}
	if err == nil {
		err = json.Unmarshal(plain, &values)
	}
	if err != nil {
		return nil, api.WithHint(api.Errorf(api.ErrDamaged, "reading the secrets of workspace %s: %w", label(ws), err), "create the workspace anew with its secrets")
	}
	return values, nil
}

// secretBox opens the key of the state directory, making it where it is missing
// and create says so.
func (m *Manager) secretBox(create bool) (cipher.AEAD, error) {
	path := m.state.SecretsKey()
	key, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) && create {
		key = make([]byte, 32)
		_, _ = rand.Read(key)
		temp := path + "." + newID()
		if err := os.WriteFile(temp, key, 0o600); err != nil {
			return nil, err
		}
		// Linked, not renamed: of two that make one at once the first stays.
		err = os.Link(temp, path)
		if rmErr := os.Remove(temp); rmErr != nil {
			return nil, rmErr
		}
		if err == nil || errors.Is(err, os.ErrExist) {
			key, err = os.ReadFile(path)
		}
	}
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, api.Errorf(api.ErrDamaged, "the key %s: %w", path, err)
	}
	return cipher.NewGCM(block)
}

// deliverSecrets gives a machine that has just come up its secrets, before
// anything else runs in it.
func (m *Manager) deliverSecrets(ctx context.Context, ws *store.Workspace, client *guestclient.Client) error {
	values, err := m.secretsOf(ws)
	if err != nil || len(values) == 0 {
		return err
	}
	raw := map[string][]byte{}
	for name, value := range values {
		raw[name] = []byte(value)
	}
	_, err = client.SetSecrets(ctx, raw)
	return err
}

// environ returns the environment of a command: what its image says, env over
// that, and the secrets that it asks for; and what is to be redacted of its
// output.
func (m *Manager) environ(ws *store.Workspace, env, secretEnv map[string]string) (map[string]string, *redact.Set, error) {
	values, err := m.secretsOf(ws)
	if err != nil {
		return nil, nil, err
	}
	full := ws.Image.Environ(env)
	for name, variable := range secretEnv {
		value, ok := values[name]
		if !ok {
			return nil, nil, api.WithHint(api.Errorf(api.ErrNotFound, "workspace %s has no secret %q", label(ws), name),
				"its secrets are given when it is created: %s", cmp.Or(secretNames(ws), "none were"))
		}
		if !validVariable(variable) || dangerous(variable) {
			return nil, nil, api.WithHint(api.Errorf(api.ErrInvalid, "secret %s cannot be put into the variable %q", name, variable), "choose another variable: --secret-env %s=VARIABLE", name)
		}
		full[variable] = value
	}
	return full, redactions(values), nil
}

func secretNames(ws *store.Workspace) string {
	var names []string
	for _, s := range ws.Secrets {
		names = append(names, s.Name)
	}
	return strings.Join(names, ", ")
}

// redactions is what must not be shown of a workspace.
func redactions(values map[string]string) *redact.Set {
	var all []string
	for _, v := range values {
		all = append(all, v)
	}
	return redact.New(all...)
}
