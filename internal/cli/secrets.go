package cli

import (
	"errors"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pyro-mcp/pyro/api"
)

// maxSecretFile bounds what is read of a secret's file, a little above what the
// SDK takes so that it is the one to refuse.
const maxSecretFile = 64<<10 + 2

// parseSecrets reads the values of --secret and --secret-file. A line break at
// the end of a file is not part of the value.
func parseSecrets(given, files []string, lookup func(string) (string, bool)) ([]api.Secret, error) {
	var out []api.Secret
	for _, s := range given {
		name, value, ok := strings.Cut(s, "=")
		if !ok {
			if value, ok = lookup(name); !ok {
				return nil, api.WithHint(api.Errorf(api.ErrInvalid, "--secret %s: this process has no such variable", name),
					"set it, or use --secret-file %s=PATH", name)
			}
		}
		out = append(out, api.Secret{Name: name, Value: value})
	}
	for _, s := range files {
		name, path, ok := strings.Cut(s, "=")
		if !ok || path == "" {
			return nil, api.WithHint(api.Errorf(api.ErrInvalid, "--secret-file %q names no file", s), "write --secret-file NAME=PATH")
		}
		f, err := os.Open(path)
		if err != nil {
			if errors.Is(err, os.ErrNotExist) {
				err = api.WithHint(api.Errorf(api.ErrInvalid, "--secret-file %s: %s does not exist", name, path), "name a file on this host")
			}
			return nil, err
		}
		b, err := io.ReadAll(io.LimitReader(f, maxSecretFile))
		f.Close()
		if err != nil {
			return nil, err
		}
		value := strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), "\r")
		out = append(out, api.Secret{Name: name, Value: value, FromFile: true})
	}
	return out, nil
}

// addSecretEnv adds the flag by which a command asks for secrets.
func addSecretEnv(cmd *cobra.Command, to *[]string) {
	cmd.Flags().StringArrayVar(to, "secret-env", nil, "give the workspace's secret `NAME[=VARIABLE]` as an environment variable; repeatable")
}

func parseSecretEnv(given []string) (map[string]string, error) {
	out := map[string]string{}
	for _, s := range given {
		name, variable, ok := strings.Cut(s, "=")
		if !ok {
			variable = name
		}
		if name == "" || variable == "" {
			return nil, api.WithHint(api.Errorf(api.ErrInvalid, "--secret-env %q", s), "write --secret-env NAME or --secret-env NAME=VARIABLE")
		}
		out[name] = variable
	}
	return out, nil
}
