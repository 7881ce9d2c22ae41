package oci

import (
	"fmt"
	"path"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/pyro-mcp/pyro/api"
)

// The bounds of an image's settings. Linux takes an argument or variable of at
// most 128 KiB (MAX_ARG_STRLEN), and the settings travel with every command.
const (
	maxStrings     = 1000
	maxStringBytes = 32 << 10
	maxListBytes   = 128 << 10
	maxPath        = 4096
)

// checkConfig takes over an image's settings, or says why not.
func checkConfig(c v1.Config) (api.ImageConfig, error) {
	var out api.ImageConfig
	for _, list := range []struct {
		name string
		from []string
		to   *[]string
	}{
		{"environment", c.Env, &out.Env},
		{"entry point", c.Entrypoint, &out.Entrypoint},
		{"command", c.Cmd, &out.Cmd},
	} {
		if err := checkStrings(list.from); err != nil {
			return out, api.Errorf(api.ErrInvalid, "the image's %s: %w", list.name, err)
		}
		*list.to = list.from
	}
	env, err := variables(c.Env)
	if err != nil {
		return out, err
	}
	out.Env = env
	if c.User != "" {
		if err := api.CheckUser(c.User); err != nil {
			return out, fmt.Errorf("the image's user: %w", err)
		}
	}
	out.User = c.User
	if c.WorkingDir != "" {
		if len(c.WorkingDir) > maxPath || strings.ContainsRune(c.WorkingDir, 0) {
			return out, api.Errorf(api.ErrInvalid, "the image's working directory has %d bytes or a NUL, the limit is %d", len(c.WorkingDir), maxPath)
		}
		for _, elem := range strings.Split(c.WorkingDir, "/") {
			if elem == ".." {
				return out, api.Errorf(api.ErrInvalid, "the image's working directory %.200q has .. in it", c.WorkingDir)
			}
		}
		// A relative one is relative to the root, as docker has it.
		out.WorkingDir = path.Clean("/" + c.WorkingDir)
	}
	return out, nil
}

func checkStrings(list []string) error {
	if len(list) > maxStrings {
		return api.Errorf(api.ErrInvalid, "%d entries are more than the limit of %d", len(list), maxStrings)
	}
	total := 0
	for i, s := range list {
		if total += len(s); len(s) > maxStringBytes || total > maxListBytes {
			return api.Errorf(api.ErrInvalid, "entry %d has %d bytes, the limit is %d, and %d for all", i+1, len(s), maxStringBytes, maxListBytes)
		}
		if strings.ContainsRune(s, 0) {
			return api.Errorf(api.ErrInvalid, "entry %d has a NUL in it", i+1)
		}
	}
	return nil
}

// variables returns each variable once, with its last value. An entry without
// "=" sets nothing.
func variables(env []string) ([]string, error) {
	last := map[string]int{}
	for i, s := range env {
		name, _, ok := strings.Cut(s, "=")
		if ok && name == "" {
			return nil, api.Errorf(api.ErrInvalid, "the image's environment: entry %d has no name", i+1)
		}
		if ok {
			last[name] = i
		}
	}
	var out []string
	for i, s := range env {
		if name, _, ok := strings.Cut(s, "="); ok && last[name] == i {
			out = append(out, s)
		}
	}
	return out, nil
}
