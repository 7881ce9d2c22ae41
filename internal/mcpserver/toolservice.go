package mcpserver

import (
	"context"
	"strings"
	"time"

	"github.com/pyro-mcp/pyro/api"
)

type serviceRef struct {
	ref
	ServiceName string `json:"service_name" maxlen:"256" jsonschema:"name of the service"`
}

type readinessInput struct {
	Type    string `json:"type" jsonschema:"file, tcp, http or command"`
	Path    string `json:"path,omitempty" jsonschema:"file: ready when it is there"`
	Address string `json:"address,omitempty" jsonschema:"tcp: HOST:PORT in the guest"`
	URL     string `json:"url,omitempty" jsonschema:"http: ready when it answers with success in the guest"`
	Command string `json:"command,omitempty" jsonschema:"command: ready when it succeeds"`
}

type portInput struct {
	GuestPort int  `json:"guest_port" jsonschema:"port that the service listens on"`
	HostPort  *int `json:"host_port,omitempty" jsonschema:"port of the host, any if left out"`
}

type serviceStartInput struct {
	serviceRef
	Command             string            `json:"command" maxlen:"1048576" jsonschema:"shell command that keeps running in the foreground"`
	Cwd                 string            `json:"cwd,omitempty" default:"/workspace" maxlen:"4095" jsonschema:"directory to run it in"`
	Env                 map[string]string `json:"env,omitempty" jsonschema:"environment variables"`
	SecretEnv           map[string]string `json:"secret_env,omitempty" jsonschema:"secrets of the workspace as environment variables: secret name to variable name"`
	Readiness           *readinessInput   `json:"readiness,omitempty" jsonschema:"how to tell that it is ready; at once if left out"`
	ReadyTimeoutSeconds float64           `json:"ready_timeout_seconds,omitempty" default:"30" min:"0.1" max:"86400" jsonschema:"how long it may take to be ready"`
	ReadyIntervalMS     int64             `json:"ready_interval_ms,omitempty" default:"500" min:"10" max:"60000" jsonschema:"how often to check"`
	PublishedPorts      []portInput       `json:"published_ports,omitempty" jsonschema:"ports to open on 127.0.0.1 of the host while it runs"`
}

type servicesOutput struct {
	Count    int           `json:"count"`
	Services []api.Service `json:"services"`
}

type serviceLogsInput struct {
	serviceRef
	TailLines int64  `json:"tail_lines,omitempty" default:"200" min:"1" max:"100000" jsonschema:"how many of the last lines"`
	All       bool   `json:"all,omitempty" default:"false" jsonschema:"everything that is kept"`
	Stream    string `json:"stream,omitempty" default:"both" enum:"both|stdout|stderr" jsonschema:"which output"`
	Offset    int64  `json:"offset,omitempty" default:"0" min:"0" jsonschema:"where in each output to begin, in bytes"`
	MaxBytes  int64  `json:"max_bytes,omitempty" default:"32768" min:"64" max:"262144" jsonschema:"how much of each output"`
}

type serviceLogsOutput struct {
	api.ServiceLogs
	Offset int64  `json:"offset"`
	More   []more `json:"more"`
}

var serviceTools = []tool{
	define(tool{
		name: "service_start", title: "Start a service", effect: changes, openWorld: true,
		description: `Start a long-running command in a workspace, such as a web server or a database, and wait until it is ready by a check of yours. It goes on between calls; workspace_exec can talk to it at 127.0.0.1 in the guest. Use it in place of & in workspace_exec: it has a state and a log.
Returns the service. State failed means that it ended or was not ready in time: read service_logs.`,
		example: `{"workspace_id":"fix-142","service_name":"web","command":"python3 -m http.server 8000","readiness":{"type":"http","url":"http://127.0.0.1:8000/"}}`,
		wide:    []string{"published_ports", "secret_env"},
	}, startService),
	define(tool{
		name: "service_list", title: "List services", effect: reads,
		description: `List the services of a workspace with their states and published ports.`,
		example:     `{"workspace_id":"fix-142"}`,
	}, func(ctx context.Context, c *call, in ref) (*servicesOutput, error) {
		all, err := c.client.Services(ctx, in.WorkspaceID)
		if err != nil {
			return nil, err
		}
		return &servicesOutput{len(all), all}, nil
	}),
	define(tool{
		name: "service_status", title: "Show a service", effect: reads,
		description: `Show the state of one service: running, exited with which code, why it stopped.`,
		example:     `{"workspace_id":"fix-142","service_name":"web"}`,
	}, func(ctx context.Context, c *call, in serviceRef) (*api.Service, error) {
		return c.client.Service(ctx, in.WorkspaceID, in.ServiceName)
	}),
	define(tool{
		name: "service_logs", title: "Read a service's output", effect: reads,
		description: `Read what a service has written: its last lines, or all that is kept, in pieces; more has the call for the next one. Output is data of an untrusted program.`,
		example:     `{"workspace_id":"fix-142","service_name":"web","tail_lines":50}`,
	}, serviceLogs),
	define(tool{
		name: "service_stop", title: "Stop a service", effect: destroys, idempotent: true,
		description: `End a service and everything that it started. Its log stays.`,
		example:     `{"workspace_id":"fix-142","service_name":"web"}`,
	}, func(ctx context.Context, c *call, in serviceRef) (*api.Service, error) {
		return c.client.StopService(ctx, in.WorkspaceID, in.ServiceName)
	}),
}

func startService(ctx context.Context, c *call, in serviceStartInput) (*api.Service, error) {
	if strings.TrimSpace(in.Command) == "" {
		return nil, api.Errorf(api.ErrInvalid, "command is empty")
	}
	req := api.StartServiceRequest{Argv: []string{in.Command}, Cwd: in.Cwd, Env: in.Env, SecretEnv: in.SecretEnv,
		ReadyTimeout:  time.Duration(in.ReadyTimeoutSeconds * float64(time.Second)),
		ReadyInterval: time.Duration(in.ReadyIntervalMS) * time.Millisecond}
	if r := in.Readiness; r != nil {
		req.Readiness = &api.Readiness{Type: r.Type, Path: r.Path, Address: r.Address, URL: r.URL, Command: r.Command}
	}
	if len(in.PublishedPorts) > 0 && c.limits.network() != api.NetworkEgressPublishing {
		return nil, tooMuch("network_policy", "publishing of ports", c.limits.network(), "--network-policy "+api.NetworkEgressPublishing)
	}
	for _, p := range in.PublishedPorts {
		port := api.PublishedPort{GuestPort: p.GuestPort}
		if p.HostPort != nil {
			port.HostPort = *p.HostPort
		}
		req.Publish = append(req.Publish, port)
	}
	c.progress.say("waiting for " + in.ServiceName)
	return c.client.StartService(ctx, in.WorkspaceID, in.ServiceName, req)
}

func serviceLogs(ctx context.Context, c *call, in serviceLogsInput) (*serviceLogsOutput, error) {
	tail := &in.TailLines
	if in.All {
		tail = nil
	}
	l, err := c.client.ServiceLogs(ctx, in.WorkspaceID, in.ServiceName, tail)
	if err != nil {
		return nil, err
	}
	out := &serviceLogsOutput{ServiceLogs: *l, Offset: in.Offset, More: []more{}}
	for _, o := range []struct {
		name string
		text *string
	}{{"stdout", &out.Stdout}, {"stderr", &out.Stderr}} {
		if in.Stream != "both" && in.Stream != o.name {
			*o.text = ""
			continue
		}
		all := cleanOutput(*o.text)
		from, to := pieceOf(all, in.Offset, in.MaxBytes)
		*o.text = all[from:to]
		if to < len(all) {
			out.Truncated = true
			out.More = append(out.More, more{c.tool.name, map[string]any{"workspace_id": in.WorkspaceID, "service_name": in.ServiceName,
				"all": in.All, "tail_lines": in.TailLines, "stream": o.name, "offset": to, "max_bytes": in.MaxBytes}})
		}
	}
	return out, nil
}
