package api

import (
	"maps"
	"strings"
)

// ImageConfig is what an OCI image says of how to run it. It is data of whoever
// made the image: bounded and checked for form when the image is pulled, and
// meant for the guest only.
type ImageConfig struct {
	// Env holds "NAME=value", each name once, in the image's order.
	Env []string `json:"env,omitempty"`
	// WorkingDir is an absolute path without "..", "" for none. It exists in
	// the environment, as a directory or a link.
	WorkingDir string `json:"working_dir,omitempty"`
	// User is a name or number with an optional group, as in "app:1000". Only
	// the guest can say what a name means.
	User       string   `json:"user,omitempty"`
	Entrypoint []string `json:"entrypoint,omitempty"`
	Cmd        []string `json:"cmd,omitempty"`
}

// Environ returns the image's variables with those of over in their place or
// beside them. Neither is changed.
func (c ImageConfig) Environ(over map[string]string) map[string]string {
	out := make(map[string]string, len(c.Env)+len(over))
	for _, v := range c.Env {
		if name, value, ok := strings.Cut(v, "="); ok {
			out[name] = value
		}
	}
	maps.Copy(out, over)
	return out
}
