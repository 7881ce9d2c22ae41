package mcpserver

import (
	"context"
	"strings"

	"github.com/pyro-mcp/pyro/api"
)

// allTools is every tool there is, in the order in which they are listed.
var allTools = concat(runTools, workspaceTools, commandTools, fileTools, snapshotTools, shellTools, serviceTools, diskTools)

func concat(tables ...[]tool) []tool {
	var all []tool
	for _, t := range tables {
		all = append(all, t...)
	}
	return all
}

func findTool(name string) *tool {
	for i := range allTools {
		if allTools[i].name == name {
			return &allTools[i]
		}
	}
	return nil
}

type runInput struct {
	Command         string            `json:"command" maxlen:"1048576" jsonschema:"shell command, run by sh -c"`
	Environment     string            `json:"environment" maxlen:"256" jsonschema:"image to run in"`
	TimeoutSeconds  float64           `json:"timeout_seconds,omitempty" default:"30" min:"0" max:"1000000000" jsonschema:"limit for the command; 0 for none"`
	VCPUCount       int               `json:"vcpu_count,omitempty" default:"1" min:"1" max:"64" jsonschema:"virtual processors"`
	MemMiB          int               `json:"mem_mib,omitempty" default:"1024" min:"1" max:"8388608" jsonschema:"memory in MiB"`
	TTLSeconds      float64           `json:"ttl_seconds,omitempty" default:"600" min:"0" max:"1000000000" jsonschema:"limit for the guest; 0 for none"`
	DiskMiB         int               `json:"disk_mib,omitempty" min:"1" max:"1073741824" jsonschema:"disk in MiB; the environment's own if left out"`
	Env             map[string]string `json:"env,omitempty" jsonschema:"environment variables"`
	Network         bool              `json:"network,omitempty" default:"false" jsonschema:"reach the internet, and nothing private"`
	AllowHostCompat *bool             `json:"allow_host_compat,omitempty" jsonschema:"run on the host itself if nothing isolates; normally refused"`
}

type environmentsOutput struct {
	Count        int               `json:"count"`
	Environments []api.Environment `json:"environments"`
}

var runTools = []tool{
	define(tool{
		name: "vm_run", title: "Run one command in a fresh guest", effect: destroys, openWorld: true,
		description: `Run one command in a fresh isolated guest and throw the guest away. Use it for a single self-contained command; nothing is kept and no files of the host are in it. For several commands on the same files use workspace_create and workspace_exec if they are offered.
Returns exit_code, stdout, stderr, timed_out, and which isolation it ran with. A command that fails is a result with its exit_code, not an error. Of long output the beginning and the end come back: redirect and filter inside of the command.`,
		example: `{"command":"python3 -c 'print(2**100)'"}`,
		wide:    []string{"disk_mib", "env", "network", "allow_host_compat"},
	}, vmRun),
	define(tool{
		name: "vm_list_environments", title: "List environments", effect: reads,
		description: `List the environments (images) that vm_run and workspace_create can start from, with what is in each. One that is not installed is built when first used, which takes a minute or two.`,
	}, func(ctx context.Context, c *call, _ struct{}) (environmentsOutput, error) {
		all, err := c.client.Environments(ctx)
		if err != nil {
			return environmentsOutput{}, err
		}
		return environmentsOutput{len(all), all}, nil
	}),
}

// runOutput is api.ExecResult with what a result that leaves something out
// needs.
type runOutput struct {
	api.ExecResult
	StdoutBytes int64 `json:"stdout_bytes"`
	StderrBytes int64 `json:"stderr_bytes"`
}

func vmRun(ctx context.Context, c *call, in runInput) (*runOutput, error) {
	disk, err := c.limits.size(in.VCPUCount, in.MemMiB, in.DiskMiB)
	if err != nil {
		return nil, err
	}
	ttl, err := c.limits.ttl(in.TTLSeconds)
	if err != nil {
		return nil, err
	}
	hostCompat, err := c.limits.hostCompat(in.AllowHostCompat)
	if err != nil {
		return nil, err
	}
	policy := api.NetworkOff
	if in.Network {
		if policy, err = c.limits.networkPolicy(api.NetworkEgress); err != nil {
			return nil, err
		}
	}
	if strings.TrimSpace(in.Command) == "" {
		return nil, api.Errorf(api.ErrInvalid, "command is empty")
	}
	release, err := c.reserve(ctx, 1)
	if err != nil {
		return nil, err
	}
	defer release()
	out := c.captures()
	res, err := c.client.Run(ctx, api.RunRequest{
		Environment: in.Environment, Argv: []string{in.Command}, VCPUCount: in.VCPUCount, MemMiB: in.MemMiB, DiskMiB: disk,
		Timeout: duration(in.TimeoutSeconds), TTL: ttl, Env: in.Env, NetworkPolicy: policy,
		Engine: c.limits.Engine, Require: c.limits.Require, AllowHostCompat: hostCompat,
		Stdout: out.stdout, Stderr: out.stderr, Progress: c.progress.step,
	})
	if err != nil {
		return nil, err
	}
	return out.result(res), nil
}

// captures are the two streams of a command under way.
type captures struct{ stdout, stderr *capture }

// captures makes a place for a command's output and has the call's progress
// show the last lines of it.
func (c *call) captures() captures {
	out := captures{&capture{r: c.progress}, &capture{r: c.progress}}
	last := ""
	c.progress.observe(func() string {
		text := strings.Join(append(out.stdout.lastLines(), out.stderr.lastLines()...), "\n")
		if text == last {
			return ""
		}
		last = text
		return text
	})
	return out
}

func (o captures) result(res *api.ExecResult) *runOutput {
	res.Stdout, res.StdoutTruncated = o.stdout.text(), o.stdout.overflowed()
	res.Stderr, res.StderrTruncated = o.stderr.text(), o.stderr.overflowed()
	return &runOutput{*res, o.stdout.total, o.stderr.total}
}
