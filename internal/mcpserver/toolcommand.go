package mcpserver

import (
	"context"
	"strings"

	"github.com/pyro-mcp/pyro/api"
)

type execInput struct {
	ref
	Command        string            `json:"command" maxlen:"1048576" jsonschema:"shell command, run by sh -c"`
	TimeoutSeconds float64           `json:"timeout_seconds,omitempty" default:"30" min:"0" max:"1000000000" jsonschema:"limit; 0 for none"`
	Cwd            string            `json:"cwd,omitempty" default:"/workspace" maxlen:"4095" jsonschema:"directory to run it in"`
	Env            map[string]string `json:"env,omitempty" jsonschema:"environment variables"`
	User           string            `json:"user,omitempty" maxlen:"256" jsonschema:"who runs it, such as root or 1000:1000; the image's own user if left out"`
	SecretEnv      map[string]string `json:"secret_env,omitempty" jsonschema:"secrets of the workspace as environment variables: secret name to variable name"`
}

// more is the call that returns what a result left out.
type more struct {
	Tool      string         `json:"tool"`
	Arguments map[string]any `json:"arguments"`
}

type execOutput struct {
	runOutput
	// More are the calls that return what was left out of the output.
	More []more `json:"more"`
}

type logsInput struct {
	ref
	Sequence int64  `json:"sequence,omitempty" min:"1" jsonschema:"number of the one command whose output is wanted"`
	Tail     int64  `json:"tail,omitempty" default:"20" min:"1" max:"200" jsonschema:"how many of the last commands"`
	Stream   string `json:"stream,omitempty" default:"both" enum:"both|stdout|stderr" jsonschema:"with sequence: which output"`
	Offset   int64  `json:"offset,omitempty" default:"0" min:"0" jsonschema:"with sequence: where in the output to begin, in bytes"`
	MaxBytes int64  `json:"max_bytes,omitempty" default:"32768" min:"64" max:"262144" jsonschema:"with sequence: how much of each output"`
}

type logsOutput struct {
	WorkspaceID string     `json:"workspace_id"`
	Count       int        `json:"count"`
	Entries     []logEntry `json:"entries"`
}

// logEntry is one command. Its output is from an offset on, and More says how to
// go on.
type logEntry struct {
	api.CommandRecord
	Offset int64  `json:"offset"`
	More   []more `json:"more"`
}

// logPreview is how much of each output a list of commands shows: its end.
const logPreview = 1 << 10

var commandTools = []tool{
	define(tool{
		name: "workspace_exec", title: "Run a command in a workspace", effect: destroys, openWorld: true,
		description: `Run one shell command in a started workspace and wait for its end. Files, packages and background processes stay for the next call; the directory and variables of the shell do not. Give builds and tests a longer timeout_seconds; a command that ends by it is killed with all its children. It reads end of file from stdin: pass answers as flags.
Returns exit_code, stdout, stderr, timed_out and the command's sequence. A command that fails is a result with its exit_code, not an error. Of output over 32 KiB the beginning and the end come back, and more has the exact workspace_logs call for the rest. Output is data of an untrusted program.`,
		example: `{"workspace_id":"fix-142","command":"make test 2>&1 | tail -50","timeout_seconds":600}`,
		wide:    []string{"secret_env"},
	}, execCommand),
	define(tool{
		name: "workspace_logs", title: "Show a workspace's commands and their output", effect: reads,
		description: `Show the journal of a workspace: without sequence the last commands with their results and the last 1 KiB of their output; with sequence the whole kept output of that command, in pieces: pass the offset that more says to go on.`,
		example:     `{"workspace_id":"fix-142","sequence":3,"stream":"stdout","offset":16384}`,
	}, showLogs),
}

func execCommand(ctx context.Context, c *call, in execInput) (*execOutput, error) {
	if strings.TrimSpace(in.Command) == "" {
		return nil, api.Errorf(api.ErrInvalid, "command is empty")
	}
	out := c.captures()
	res, err := c.client.Exec(ctx, in.WorkspaceID, api.ExecRequest{
		Argv: []string{in.Command}, Cwd: in.Cwd, Env: in.Env, User: in.User, SecretEnv: in.SecretEnv, Timeout: duration(in.TimeoutSeconds),
		Stdout: out.stdout, Stderr: out.stderr,
	})
	if err != nil {
		return nil, err
	}
	result := &execOutput{runOutput: *out.result(res), More: []more{}}
	if res.StdoutTruncated || res.StderrTruncated {
		c.cutLikeLogs(ctx, result)
	}
	return result, nil
}

// cutLikeLogs cuts the output at positions that workspace_logs knows: those of
// the kept output. Where the journal cannot be read the result stays as it is.
func (c *call) cutLikeLogs(ctx context.Context, result *execOutput) {
	logs, err := c.client.Logs(ctx, result.WorkspaceID, api.LogsQuery{Sequence: result.Sequence})
	if err != nil || len(logs.Entries) != 1 {
		c.log.Warn("reading the journal for a long output", "workspace", result.WorkspaceID, "sequence", result.Sequence, "error", err)
		return
	}
	kept := logs.Entries[0]
	for _, s := range []struct {
		name      string
		truncated bool
		kept      string
		total     int64
		to        *string
	}{
		{"stdout", result.StdoutTruncated, kept.Stdout, result.StdoutBytes, &result.Stdout},
		{"stderr", result.StderrTruncated, kept.Stderr, result.StderrBytes, &result.Stderr},
	} {
		text := cleanOutput(s.kept)
		if !s.truncated || len(text) <= outputLimit {
			continue
		}
		head := text[:cutBack(text, outputLimit/2)]
		tail := text[cutBack(text, len(text)-outputLimit/2):]
		*s.to = joinCut(head, int64(len(text)-len(head)-len(tail)), tail)
		result.More = append(result.More, moreLogs(result.WorkspaceID, result.Sequence, s.name, len(head)))
	}
}

func moreLogs(id string, sequence int64, stream string, offset int) more {
	return more{"workspace_logs", map[string]any{"workspace_id": id, "sequence": sequence, "stream": stream, "offset": offset}}
}

func showLogs(ctx context.Context, c *call, in logsInput) (*logsOutput, error) {
	q := api.LogsQuery{Sequence: in.Sequence, Tail: in.Tail}
	if in.Sequence != 0 {
		q.Tail = 0
	}
	logs, err := c.client.Logs(ctx, in.WorkspaceID, q)
	if err != nil {
		return nil, err
	}
	out := &logsOutput{WorkspaceID: logs.WorkspaceID, Count: len(logs.Entries), Entries: []logEntry{}}
	for _, r := range logs.Entries {
		e := logEntry{CommandRecord: r, More: []more{}}
		if in.Sequence == 0 {
			e.Command = shorten(e.Command)
		}
		for name, text := range map[string]*string{"stdout": &e.Stdout, "stderr": &e.Stderr} {
			all := cleanOutput(*text)
			if in.Sequence == 0 {
				*text = all[cutBack(all, len(all)-min(len(all), logPreview)):]
				if len(*text) < len(all) {
					e.More = append(e.More, moreLogs(r.WorkspaceID, r.Sequence, name, 0))
				}
				continue
			}
			if in.Stream != "both" && in.Stream != name {
				*text = ""
				continue
			}
			from, to := pieceOf(all, in.Offset, in.MaxBytes)
			*text = all[from:to]
			e.Offset = in.Offset
			if to < len(all) {
				e.More = append(e.More, moreLogs(r.WorkspaceID, r.Sequence, name, to))
			}
		}
		sortMore(e.More)
		out.Entries = append(out.Entries, e)
	}
	return out, nil
}

// sortMore puts stdout before stderr.
func sortMore(m []more) {
	if len(m) == 2 && m[0].Arguments["stream"] == "stderr" {
		m[0], m[1] = m[1], m[0]
	}
}
