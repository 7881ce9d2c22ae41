package mcpserver

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/google/jsonschema-go/jsonschema"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/pyro-mcp/pyro/api"
)

// A tool is one entry of the tables that the server's tools are made from. Its
// parameters are the fields of a struct: json names them, jsonschema describes
// them, and the tags default, min, max and enum bound them.
type tool struct {
	name, title string
	// description is for the model: when to use the tool, when not, what comes
	// back. {project}, {exports} and {paths} stand for what the server was
	// started with.
	description string
	example     string // arguments, as JSON
	effect      effect
	// idempotent says that a repeated call changes nothing more, openWorld that
	// the call can reach beyond this host if a workspace may have a network.
	idempotent, openWorld bool
	// wide are the parameters that only profile workspace-full has.
	wide []string

	in, out reflect.Type
	call    func(ctx context.Context, c *call, arguments []byte) (any, error)
}

// effect is what a tool may do, for the annotations.
type effect int

const (
	reads    effect = iota // changes nothing
	changes                // changes or adds, and nothing is lost
	destroys               // something may be lost
)

// define completes t with what it does.
func define[In, Out any](t tool, run func(context.Context, *call, In) (Out, error)) tool {
	t.in, t.out = reflect.TypeFor[In](), reflect.TypeFor[Out]()
	t.call = func(ctx context.Context, c *call, arguments []byte) (any, error) {
		var in In
		if err := json.Unmarshal(arguments, &in); err != nil {
			return nil, api.Errorf(api.ErrInvalid, "%v", err)
		}
		return run(ctx, c, in)
	}
	return t
}

// A call is one tools/call under way.
type call struct {
	*Server
	tool     *tool
	progress *reporter
}

// offered is a tool as this server offers it: with its profile's parameters.
type offered struct {
	*tool
	mcp   mcp.Tool
	input *jsonschema.Resolved
}

// offer makes a tool fit for the server.
func (s *Server) offer(t *tool, narrow bool) (*offered, error) {
	var hidden []string
	if narrow {
		hidden = t.wide
	}
	in, err := inputSchema(t.in, hidden)
	if err != nil {
		return nil, fmt.Errorf("describing the parameters of %s: %w", t.name, err)
	}
	s.limits.adjust(in)
	if p := in.Properties["environment"]; p != nil {
		p.Default = mustJSON(s.environment)
		in.Required = slices.DeleteFunc(in.Required, func(n string) bool { return n == "environment" })
	}
	out, err := outputSchema(t.out)
	if err != nil {
		return nil, fmt.Errorf("describing the result of %s: %w", t.name, err)
	}
	resolved, err := in.Resolve(&jsonschema.ResolveOptions{ValidateDefaults: true})
	if err != nil {
		return nil, fmt.Errorf("resolving the schema of %s: %w", t.name, err)
	}
	description := t.description
	if special := s.profile.describe[t.name]; special != "" {
		description = special + "\n\n" + description
	}
	description = s.fill(description)
	if t.example != "" {
		description += "\n\nExample arguments: " + t.example
	}
	destructive, open := t.effect == destroys, t.openWorld && s.limits.network() != api.NetworkOff
	return &offered{tool: t, input: resolved, mcp: mcp.Tool{
		Name: t.name, Title: t.title, Description: description, InputSchema: in, OutputSchema: out,
		Annotations: &mcp.ToolAnnotations{
			Title: t.title, ReadOnlyHint: t.effect == reads, DestructiveHint: &destructive,
			IdempotentHint: t.idempotent || t.effect == reads, OpenWorldHint: &open,
		},
	}}, nil
}

// handle is the tool's mcp.ToolHandler: a failure is a result that says so, and
// never a failure of the protocol.
func (s *Server) handle(o *offered) mcp.ToolHandler {
	return func(ctx context.Context, req *mcp.CallToolRequest) (*mcp.CallToolResult, error) {
		arguments, err := o.arguments(req.Params.Arguments)
		if err != nil {
			return s.failure(fmt.Errorf("calling %s: %w", o.name, err)), nil
		}
		ctx, end := s.begin(ctx)
		defer end()
		c := &call{Server: s, tool: o.tool, progress: newReporter(ctx, req)}
		result, err := o.call(ctx, c, arguments)
		c.progress.close()
		if err != nil {
			s.log.Info("tool failed", "tool", o.name, "error", err)
			return s.failure(err), nil
		}
		text, err := encode(result)
		if err != nil {
			return s.failure(fmt.Errorf("writing the result of %s: %w", o.name, err)), nil
		}
		return &mcp.CallToolResult{
			StructuredContent: json.RawMessage(text),
			Content:           []mcp.Content{&mcp.TextContent{Text: string(text)}},
		}, nil
	}
}

// arguments checks what the model passed and fills in the defaults. null is as
// good as absent.
func (o *offered) arguments(raw json.RawMessage) ([]byte, error) {
	given := map[string]any{}
	if len(bytes.TrimSpace(raw)) > 0 {
		if err := json.Unmarshal(raw, &given); err != nil {
			return nil, api.Errorf(api.ErrInvalid, "the arguments are not a JSON object: %v", err)
		}
	}
	maps.DeleteFunc(given, func(_ string, v any) bool { return v == nil })
	known := o.input.Schema().Properties
	for _, name := range slices.Sorted(maps.Keys(given)) {
		if known[name] == nil {
			return nil, o.unknown(name)
		}
	}
	for _, name := range o.input.Schema().Required {
		if _, ok := given[name]; !ok {
			return nil, api.WithHint(api.Errorf(api.ErrInvalid, "parameter %s is missing", name), "%s", o.usage())
		}
	}
	if err := o.input.ApplyDefaults(&given); err != nil {
		return nil, api.Errorf(api.ErrInvalid, "%s", shorten(err.Error()))
	}
	if err := o.input.Validate(given); err != nil {
		text := strings.ReplaceAll(err.Error(), "validating root: validating /properties/", "parameter ")
		text = outOfRange.ReplaceAllString(text, "$1 is $2 than $3")
		return nil, api.WithHint(api.Errorf(api.ErrInvalid, "%s", shorten(text)), "%s", o.usage())
	}
	return json.Marshal(given)
}

// outOfRange is what the validator says of a number that is too small or too large,
// in fractions: minimum: -1/1 is less than 0.000000.
var outOfRange = regexp.MustCompile(`(?:minimum|maximum): (\S+?)(?:/1)? is (less|greater) than (-?\d+)\.0+`)

func (o *offered) usage() string {
	if o.example == "" {
		return "its parameters are " + strings.Join(o.input.Schema().PropertyOrder, ", ")
	}
	return "call it like this: " + o.example
}

// operatorFlags are what a model may ask for and only whoever runs the server
// can grant.
var operatorFlags = map[string]string{
	"engine": "--engine", "require": "--require", "max_workspaces": "--max-workspaces",
	"include_ignored": "--include-ignored", "allow_path": "--allow-path", "allow_export": "--allow-export",
	"project_path": "--project-path", "repo_url": "--repo-url", "repo_ref": "--repo-ref", "network": "--network-policy",
}

// unknown says why a parameter is not there and who could change that.
func (o *offered) unknown(name string) error {
	if slices.Contains(o.wide, name) {
		return api.WithHint(api.Errorf(api.ErrDenied, "parameter %s is not part of this server's profile", name),
			"leave it out; whoever runs the server can start it with --profile %s", ProfileFull)
	}
	if flag := operatorFlags[name]; flag != "" {
		return api.WithHint(api.Errorf(api.ErrDenied, "parameter %s is not for callers to set", name),
			"leave it out; whoever runs the server can start it with %s", flag)
	}
	return api.WithHint(api.Errorf(api.ErrInvalid, "there is no parameter %q", shorten(name)), "%s", o.usage())
}

// failure is a tool result that carries an error. It has no structured content:
// clients hold that against the output schema, of which an error is none.
func (s *Server) failure(err error) *mcp.CallToolResult {
	w := api.ToWire(err)
	w.Message, w.Hint = clean(w.Message), clean(s.forModel(w.Hint))
	text, encodeErr := encode(map[string]any{"error": w})
	if encodeErr != nil {
		text = []byte(`{"error":{"code":"internal","message":"the error cannot be written as JSON"}}`)
	}
	return &mcp.CallToolResult{IsError: true, Content: []mcp.Content{&mcp.TextContent{Text: string(text)}}}
}
