package mcpserver

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/pyro-mcp/pyro/api"
)

// ref is the one parameter that most tools have.
type ref struct {
	WorkspaceID string `json:"workspace_id" maxlen:"256" jsonschema:"id, unique beginning of it, or name"`
}

type createInput struct {
	Environment     string            `json:"environment" maxlen:"256" jsonschema:"image to start from"`
	SeedPath        string            `json:"seed_path,omitempty" maxlen:"4095" jsonschema:"directory, Git checkout or tar archive on the host to copy in instead of the project"`
	Empty           bool              `json:"empty,omitempty" jsonschema:"begin without any files"`
	Name            string            `json:"name,omitempty" maxlen:"256" jsonschema:"name to call it by"`
	Labels          map[string]string `json:"labels,omitempty" jsonschema:"key-value pairs to find it by"`
	VCPUCount       int               `json:"vcpu_count,omitempty" default:"1" min:"1" max:"64" jsonschema:"virtual processors"`
	MemMiB          int               `json:"mem_mib,omitempty" default:"1024" min:"1" max:"8388608" jsonschema:"memory in MiB"`
	DiskMiB         int               `json:"disk_mib,omitempty" min:"1" max:"1073741824" jsonschema:"disk in MiB; the environment's own if left out"`
	TTLSeconds      float64           `json:"ttl_seconds,omitempty" default:"600" min:"0" max:"1000000000" jsonschema:"seconds until it deletes itself; 0 for never"`
	NetworkPolicy   string            `json:"network_policy,omitempty" default:"off" enum:"off|egress|egress+published-ports" jsonschema:"what it reaches of the network"`
	Secrets         []secretInput     `json:"secrets,omitempty" jsonschema:"values for its commands that no record, log or output shows"`
	AllowHostCompat *bool             `json:"allow_host_compat,omitempty" jsonschema:"run on the host itself if nothing isolates; normally refused"`
}

type secretInput struct {
	Name     string `json:"name" jsonschema:"letters, digits and underscores; also the name of its file below /run/pyro-secrets"`
	Value    string `json:"value,omitempty" jsonschema:"the value; better in a file"`
	FilePath string `json:"file_path,omitempty" jsonschema:"file of the host that has the value"`
}

type listInput struct {
	Labels map[string]string `json:"labels,omitempty" jsonschema:"only workspaces with these labels"`
}

type listOutput struct {
	Count      int             `json:"count"`
	Workspaces []api.Workspace `json:"workspaces"`
	// Omitted are those that no result has room for.
	Omitted int `json:"omitted"`
}

// maxListed bounds the workspaces of one result.
const maxListed = 50

type updateInput struct {
	ref
	Name        *string           `json:"name,omitempty" maxlen:"256" jsonschema:"new name"`
	ClearName   bool              `json:"clear_name,omitempty" jsonschema:"take the name away"`
	Labels      map[string]string `json:"labels,omitempty" jsonschema:"labels to set"`
	ClearLabels []string          `json:"clear_labels,omitempty" jsonschema:"keys of labels to take away"`
	TTLSeconds  *float64          `json:"ttl_seconds,omitempty" min:"0" max:"1000000000" jsonschema:"seconds from now until it deletes itself; 0 for never"`
}

type resetInput struct {
	ref
	Snapshot string `json:"snapshot,omitempty" default:"baseline" maxlen:"256" jsonschema:"snapshot to go back to; baseline is how it was created"`
}

type forkInput struct {
	ref
	Snapshot   string   `json:"snapshot,omitempty" maxlen:"256" jsonschema:"snapshot to begin with; the disk as it is now if left out"`
	Count      int      `json:"count,omitempty" default:"1" min:"1" max:"100" jsonschema:"how many to make"`
	Name       string   `json:"name,omitempty" maxlen:"256" jsonschema:"name of the new one; of several, -1 and so on is added"`
	TTLSeconds *float64 `json:"ttl_seconds,omitempty" min:"0" max:"1000000000" jsonschema:"seconds until each deletes itself, 0 for never; as the original if left out"`
}

var workspaceTools = []tool{
	define(tool{
		name: "workspace_create", title: "Create a workspace", effect: changes, openWorld: true,
		description: `Create an isolated Linux workspace, copy files into its /workspace, start it, and return when it takes commands. Do this first, once per task; then use its workspace_id, or the name you gave it, in every other call. It is offline unless network_policy says otherwise, and nothing in it can change the originals.
{project} {paths}
It deletes itself after ttl_seconds; workspace_update prolongs that.
Returns the workspace: workspace_id, state, isolation, and in workspace_seed what was copied, from which commit, and what had to be skipped.`,
		example: `{"name":"fix-142","ttl_seconds":3600}`,
		wide:    []string{"disk_mib", "network_policy", "allow_host_compat", "secrets"},
	}, createWorkspace),
	define(tool{
		name: "workspace_list", title: "List workspaces", effect: reads,
		description: `List the workspaces of this host, the one with the latest activity first: to find one again, or one to delete. Some may belong to other people's work.`,
		example:     `{"labels":{"issue":"142"}}`,
	}, func(ctx context.Context, c *call, in listInput) (*listOutput, error) {
		all, err := c.client.Workspaces(ctx, api.WorkspaceFilter{Labels: in.Labels})
		if err != nil {
			return nil, err
		}
		n := min(len(all), maxListed)
		return &listOutput{len(all), all[:n], len(all) - n}, nil
	}),
	define(tool{
		name: "workspace_status", title: "Show a workspace", effect: reads,
		description: `Show one workspace: state, isolation, resources, expiry, seed, counts, and in last_error why it failed if it did.`,
		example:     `{"workspace_id":"fix-142"}`,
	}, func(ctx context.Context, c *call, in ref) (*api.Workspace, error) {
		return c.client.Workspace(ctx, in.WorkspaceID)
	}),
	define(tool{
		name: "workspace_update", title: "Rename, label or prolong a workspace", effect: changes, idempotent: true,
		description: `Change a workspace's name, labels or expiry; what is left out stays. Returns the workspace.`,
		example:     `{"workspace_id":"fix-142","ttl_seconds":3600}`,
	}, updateWorkspace),
	define(tool{
		name: "workspace_start", title: "Start a stopped workspace", effect: changes, idempotent: true,
		description: `Boot a stopped workspace from its disk. Its files are as they were; processes of before are gone.`,
		example:     `{"workspace_id":"fix-142"}`,
	}, func(ctx context.Context, c *call, in ref) (*api.Workspace, error) {
		return c.client.StartWorkspace(ctx, in.WorkspaceID, c.progress.step)
	}),
	define(tool{
		name: "workspace_stop", title: "Stop a workspace", effect: destroys, idempotent: true,
		description: `Stop a workspace and keep its disk: to free its memory, or to look into the disk with workspace_disk_list and _read. Everything that runs in it ends. workspace_start boots it again.`,
		example:     `{"workspace_id":"fix-142"}`,
	}, func(ctx context.Context, c *call, in ref) (*api.Workspace, error) {
		return c.client.StopWorkspace(ctx, in.WorkspaceID)
	}),
	define(tool{
		name: "workspace_reset", title: "Rewind a workspace", effect: destroys, idempotent: true,
		description: `Rewind a workspace to a snapshot, or to how it was created. Every change since then is lost: files, installed packages, processes, the journal of commands. Use it instead of undoing changes by hand. To keep changes, take workspace_diff first. Returns the workspace.`,
		example:     `{"workspace_id":"fix-142"}`,
	}, func(ctx context.Context, c *call, in resetInput) (*api.Workspace, error) {
		return c.client.Reset(ctx, in.WorkspaceID, in.Snapshot, c.progress.step)
	}),
	define(tool{
		name: "workspace_fork", title: "Fork a workspace", effect: changes,
		description: `Make new workspaces that begin with the disk of another one, as it is now or in a snapshot, and start them: to try several things from one prepared state, side by side. It takes no copy and little time. Processes are not part of it. Returns the new workspaces.`,
		example:     `{"workspace_id":"fix-142","name":"try","count":2}`,
	}, forkWorkspace),
	define(tool{
		name: "workspace_summary", title: "Summarize what happened", effect: reads,
		description: `Summarize what happened in a workspace since its last reset: commands with their results, edits, changed paths, snapshots, exports, and the outcome in one sentence. Use it to report what was done; use workspace_logs for the output of commands.`,
		example:     `{"workspace_id":"fix-142"}`,
	}, func(ctx context.Context, c *call, in ref) (*api.Summary, error) {
		return c.client.Summary(ctx, in.WorkspaceID)
	}),
	define(tool{
		name: "workspace_delete", title: "Delete a workspace", effect: destroys,
		description: `Delete a workspace with everything in it, also while it runs. Do this when the work is handed over. Cannot be undone.`,
		example:     `{"workspace_id":"fix-142"}`,
	}, func(ctx context.Context, c *call, in ref) (*api.DeleteResult, error) {
		return c.client.DeleteWorkspace(ctx, in.WorkspaceID)
	}),
}

func createWorkspace(ctx context.Context, c *call, in createInput) (*api.Workspace, error) {
	req := api.CreateRequest{
		Environment: in.Environment, Name: in.Name, Labels: in.Labels, VCPUCount: in.VCPUCount, MemMiB: in.MemMiB,
		Engine: c.limits.Engine, Require: c.limits.Require, Progress: c.progress.step,
	}
	var err error
	if req.DiskMiB, err = c.limits.size(in.VCPUCount, in.MemMiB, in.DiskMiB); err != nil {
		return nil, err
	}
	if req.TTL, err = c.limits.ttl(in.TTLSeconds); err != nil {
		return nil, err
	}
	if req.NetworkPolicy, err = c.limits.networkPolicy(in.NetworkPolicy); err != nil {
		return nil, err
	}
	if req.Secrets, err = c.secrets(in.Secrets); err != nil {
		return nil, err
	}
	if req.AllowHostCompat, err = c.limits.hostCompat(in.AllowHostCompat); err != nil {
		return nil, err
	}
	switch {
	case in.Empty && in.SeedPath != "":
		return nil, api.Errorf(api.ErrInvalid, "empty and seed_path exclude each other")
	case in.Empty:
	case in.SeedPath != "":
		req.SeedPath, err = c.paths.read(in.SeedPath)
	default:
		req.SeedPath, err = c.project.seed(ctx, c.progress.say)
		req.IncludeIgnored = c.project.includeIgnored
	}
	if err != nil {
		return nil, err
	}
	release, err := c.reserve(ctx, 1)
	if err != nil {
		return nil, err
	}
	defer release()
	return c.client.CreateWorkspace(ctx, req)
}

func forkWorkspace(ctx context.Context, c *call, in forkInput) (*api.ForkResult, error) {
	req := api.ForkRequest{Snapshot: in.Snapshot, Count: in.Count, Name: in.Name, Progress: c.progress.step}
	var err error
	switch {
	case in.TTLSeconds != nil:
		req.TTL, err = c.limits.ttl(*in.TTLSeconds)
	case c.limits.MaxTTL > 0:
		// The original may be somebody's who has no such limit.
		req.TTL = min(api.DefaultTTL, c.limits.MaxTTL)
	}
	if err != nil {
		return nil, err
	}
	release, err := c.reserve(ctx, in.Count)
	if err != nil {
		return nil, err
	}
	defer release()
	return c.client.Fork(ctx, in.WorkspaceID, req)
}

func updateWorkspace(ctx context.Context, c *call, in updateInput) (*api.Workspace, error) {
	u := api.WorkspaceUpdate{Name: in.Name, SetLabels: in.Labels, ClearLabels: in.ClearLabels}
	if in.ClearName {
		if in.Name != nil {
			return nil, api.Errorf(api.ErrInvalid, "name and clear_name exclude each other")
		}
		u.Name = new(string)
	}
	if in.TTLSeconds != nil {
		ttl, err := c.limits.ttl(*in.TTLSeconds)
		if err != nil {
			return nil, err
		}
		u.TTL = new(time.Duration)
		*u.TTL = ttl
	}
	return c.client.UpdateWorkspace(ctx, in.WorkspaceID, u)
}

// maxSecretFile bounds what is read of a secret's file, a little above what the
// SDK takes so that it is the one to refuse.
const maxSecretFile = 64<<10 + 2

// secrets reads the values of secrets. A line break at the end of a file is not
// part of the value.
func (c *call) secrets(given []secretInput) ([]api.Secret, error) {
	var out []api.Secret
	for _, s := range given {
		secret := api.Secret{Name: s.Name, Value: s.Value}
		if (s.Value == "") == (s.FilePath == "") {
			return nil, api.Errorf(api.ErrInvalid, "a secret has either a value or a file_path")
		}
		if s.FilePath != "" {
			path, err := c.paths.read(s.FilePath)
			if err != nil {
				return nil, fmt.Errorf("reading a secret: %w", err)
			}
			text, err := readRegular(path, maxSecretFile)
			if err != nil {
				return nil, fmt.Errorf("reading a secret: %w", err)
			}
			secret.Value, secret.FromFile = strings.TrimSuffix(strings.TrimSuffix(string(text), "\n"), "\r"), true
		}
		out = append(out, secret)
	}
	return out, nil
}
