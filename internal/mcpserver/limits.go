package mcpserver

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/jsonschema-go/jsonschema"

	"github.com/pyro-mcp/pyro/api"
)

// Limits are what whoever runs the server allows. A model cannot pass them: it
// is told which flag would have to be given. Zero means no limit of the
// server's own.
type Limits struct {
	// Engine and Require hold for everything that is started.
	Engine  string
	Require api.Require
	// AllowHostCompat lets commands run on this host where nothing isolates.
	AllowHostCompat bool
	// MaxWorkspaces bounds the workspaces on this host, whoever made them,
	// together with the one-shot guests of this server.
	MaxWorkspaces int
	// The largest guest that may be asked for.
	MaxVCPUs, MaxMemMiB, MaxDiskMiB int
	MaxTTL                          time.Duration
	// Network is the widest network policy, NetworkOff if "".
	Network string
	// AllowPaths are directories of this host, next to the project's own, whose
	// files may be copied into workspaces; AllowExports are those into which
	// files may be copied out.
	AllowPaths, AllowExports []string
}

// networks are the policies, from the narrowest to the widest.
var networks = []string{api.NetworkOff, api.NetworkEgress, api.NetworkEgressPublishing}

// Check reports whether the limits are ones that can be held.
func (l Limits) Check() error {
	for flag, n := range map[string]int{"--max-workspaces": l.MaxWorkspaces, "--max-vcpus": l.MaxVCPUs, "--max-mem-mib": l.MaxMemMiB, "--max-disk-mib": l.MaxDiskMiB} {
		if n < 0 {
			return api.Errorf(api.ErrInvalid, "%s is %d and must not be negative", flag, n)
		}
	}
	if l.MaxTTL < 0 {
		return api.Errorf(api.ErrInvalid, "--max-ttl-seconds must not be negative")
	}
	if l.Network != "" && !slices.Contains(networks, l.Network) {
		return api.WithHint(api.Errorf(api.ErrInvalid, "there is no network policy %q", l.Network), "the policies are %s", strings.Join(networks, ", "))
	}
	if l.Require != api.RequireAny && l.Require != api.RequireSandbox && l.Require != api.RequireVM {
		return api.WithHint(api.Errorf(api.ErrInvalid, "--require is %q", l.Require), "pass vm or sandbox")
	}
	return nil
}

// adjust makes the defaults of a schema such that they keep within the limits,
// and says what the limits are.
func (l Limits) adjust(s *jsonschema.Schema) {
	lower := func(name string, byDefault, most int) {
		p := s.Properties[name]
		if p == nil || most == 0 {
			return
		}
		if p.Default != nil && byDefault > most {
			p.Default = json.RawMessage(fmt.Sprint(most))
		}
		p.Description += fmt.Sprintf("; at most %d here", most)
	}
	lower("vcpu_count", api.DefaultVCPUCount, l.MaxVCPUs)
	lower("mem_mib", api.DefaultMemMiB, l.MaxMemMiB)
	lower("disk_mib", 0, l.MaxDiskMiB)
	lower("ttl_seconds", int(api.DefaultTTL.Seconds()), int(l.MaxTTL.Seconds()))
	if p := s.Properties["network_policy"]; p != nil {
		p.Description += "; at most " + l.network() + " here"
	}
}

func (l Limits) network() string {
	if l.Network == "" {
		return api.NetworkOff
	}
	return l.Network
}

// tooMuch is the refusal of a request above a limit.
func tooMuch(parameter string, asked, most any, flag string) error {
	return api.WithHint(api.Errorf(api.ErrDenied, "%s is %v, and this server allows at most %v", parameter, asked, most),
		"ask for %v or less; whoever runs the server raises that with %s", most, flag)
}

func (l Limits) size(vcpus, memMiB, diskMiB int) (disk int, err error) {
	for _, x := range []struct {
		parameter   string
		asked, most int
		flag        string
	}{
		{"vcpu_count", vcpus, l.MaxVCPUs, "--max-vcpus"}, {"mem_mib", memMiB, l.MaxMemMiB, "--max-mem-mib"}, {"disk_mib", diskMiB, l.MaxDiskMiB, "--max-disk-mib"},
	} {
		if x.most > 0 && x.asked > x.most {
			return 0, tooMuch(x.parameter, x.asked, x.most, x.flag)
		}
	}
	if diskMiB == 0 {
		// The environment's own size is not known here; the limit is.
		diskMiB = l.MaxDiskMiB
	}
	return diskMiB, nil
}

// ttl converts a parameter: 0 is for ever.
func (l Limits) ttl(seconds float64) (time.Duration, error) {
	if l.MaxTTL > 0 && (seconds == 0 || seconds > l.MaxTTL.Seconds()) {
		asked := fmt.Sprint(seconds)
		if seconds == 0 {
			asked = "0, which is for ever"
		}
		return 0, tooMuch("ttl_seconds", asked, l.MaxTTL.Seconds(), "--max-ttl-seconds")
	}
	return duration(seconds), nil
}

// duration is a parameter in seconds, 0 for none, as the SDK takes it.
func duration(seconds float64) time.Duration {
	if seconds == 0 {
		return -1
	}
	return time.Duration(seconds * float64(time.Second))
}

func (l Limits) networkPolicy(asked string) (string, error) {
	if asked == "" {
		return api.NetworkOff, nil
	}
	if slices.Index(networks, asked) > slices.Index(networks, l.network()) {
		return "", tooMuch("network_policy", asked, l.network(), "--network-policy "+asked)
	}
	return asked, nil
}

// hostCompat decides whether a request may run without isolation. A model may
// forbid it and not allow it.
func (l Limits) hostCompat(asked *bool) (bool, error) {
	if asked == nil {
		return l.AllowHostCompat, nil
	}
	if *asked && !l.AllowHostCompat {
		return false, api.WithHint(api.Errorf(api.ErrDenied, "allow_host_compat would run commands on this host without isolation, which this server does not allow"),
			"leave it out; whoever runs the server can start it with --allow-host-compat")
	}
	return *asked, nil
}

// reserve counts so many more guests against the limit until release.
func (s *Server) reserve(ctx context.Context, more int) (release func(), err error) {
	most := s.limits.MaxWorkspaces
	s.making.Lock()
	defer s.making.Unlock()
	if most > 0 {
		all, err := s.client.Workspaces(ctx, api.WorkspaceFilter{})
		if err != nil {
			return nil, fmt.Errorf("counting workspaces: %w", err)
		}
		// One that is being made is pending and not to be counted twice.
		n := s.pending
		for _, ws := range all {
			if ws.State != api.StateStarting {
				n++
			}
		}
		if n+more > most {
			return nil, api.WithHint(api.Errorf(api.ErrExhausted, "there are %d workspaces, and this server allows at most %d", n, most),
				"delete one with workspace_delete, after workspace_list; whoever runs the server raises the limit with --max-workspaces")
		}
	}
	s.pending += more
	return func() {
		s.making.Lock()
		defer s.making.Unlock()
		s.pending -= more
	}, nil
}
