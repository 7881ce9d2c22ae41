package mcpserver_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/jsonschema-go/jsonschema"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/pyro-mcp/pyro"
	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/mcpserver"
	"github.com/pyro-mcp/pyro/test/build"
)

var programs string

func TestMain(m *testing.M) {
	if os.Getenv(strayVariable) != "" {
		stray()
		return
	}
	os.Exit(build.Main(m, &programs, false))
}

// newClient returns the SDK on engine host, with a state directory of its own.
func newClient(t testing.TB) *pyro.Client {
	t.Helper()
	client, err := pyro.Open(t.Context(), &pyro.Options{
		StateDir: filepath.Join(t.TempDir(), "state"), CacheDir: filepath.Join(t.TempDir(), "cache"), Engine: "host",
		Binary: filepath.Join(programs, "pyro"), Agent: filepath.Join(programs, "pyro-agent"),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		all, err := client.Workspaces(context.Background(), api.WorkspaceFilter{})
		if err != nil {
			t.Error(err)
		}
		for _, ws := range all {
			if _, err := client.DeleteWorkspace(context.Background(), ws.WorkspaceID); err != nil {
				t.Error(err)
			}
		}
		client.Close()
	})
	return client
}

// options are a server for engine host that finds no project by itself.
func options(t testing.TB) mcpserver.Options {
	return mcpserver.Options{
		Profile: mcpserver.ProfileFull,
		Project: mcpserver.ProjectOptions{None: true},
		Limits:  mcpserver.Limits{AllowHostCompat: true},
		Logger:  slog.New(slog.NewTextHandler(testLog{t}, nil)),
	}
}

type testLog struct{ t testing.TB }

func (l testLog) Write(p []byte) (int, error) {
	l.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// A session is a client of a server, over pipes as over stdio.
type session struct {
	*mcp.ClientSession
	t      testing.TB
	server *mcpserver.Server
	served chan error
	in     io.Closer

	mu       *sync.Mutex
	progress []string
	schemas  map[string]*jsonschema.Resolved
}

// connect starts a server and a session with it; both end with the test.
func connect(t testing.TB, client *pyro.Client, o mcpserver.Options) *session {
	t.Helper()
	server, err := mcpserver.New(client, o)
	if err != nil {
		t.Fatal(err)
	}
	serverIn, clientOut := io.Pipe()
	clientIn, serverOut := io.Pipe()
	s := &session{t: t, server: server, served: make(chan error, 1), in: clientOut, mu: new(sync.Mutex), schemas: map[string]*jsonschema.Resolved{}}
	go func() {
		s.served <- server.ServeStdio(context.Background(), serverIn, serverOut)
		serverOut.Close()
	}()
	peer := mcp.NewClient(&mcp.Implementation{Name: "test", Version: "1"}, &mcp.ClientOptions{
		ProgressNotificationHandler: func(_ context.Context, req *mcp.ProgressNotificationClientRequest) {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.progress = append(s.progress, req.Params.Message)
		},
	})
	if s.ClientSession, err = peer.Connect(t.Context(), &mcp.IOTransport{Reader: clientIn, Writer: clientOut}, nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.Close()
		if err := <-s.served; err != nil {
			t.Errorf("serving: %v", err)
		}
		server.Close()
	})
	tools, err := s.ListTools(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, tool := range tools.Tools {
		s.schemas[tool.Name] = resolve(t, tool.OutputSchema)
	}
	return s
}

func resolve(t testing.TB, schema any) *jsonschema.Resolved {
	t.Helper()
	text, err := json.Marshal(schema)
	if err != nil {
		t.Fatal(err)
	}
	var s jsonschema.Schema
	if err := json.Unmarshal(text, &s); err != nil {
		t.Fatal(err)
	}
	r, err := s.Resolve(nil)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

type args = map[string]any

// raw calls a tool and returns the result as it is.
func (s *session) raw(ctx context.Context, name string, a args) (*mcp.CallToolResult, error) {
	return s.CallTool(ctx, &mcp.CallToolParams{Name: name, Arguments: a})
}

// call calls a tool that works. Its structured content holds the schema, and its
// text says the same.
func (s *session) call(name string, a args) map[string]any {
	s.t.Helper()
	res, err := s.raw(s.t.Context(), name, a)
	if err != nil {
		s.t.Fatalf("%s: %v", name, err)
	}
	text := contentText(s.t, res)
	if res.IsError {
		s.t.Fatalf("%s %v failed: %s", name, a, text)
	}
	if err := s.schemas[name].Validate(res.StructuredContent); err != nil {
		s.t.Errorf("%s returned what its schema forbids: %v", name, err)
	}
	var fromText any
	if err := json.Unmarshal([]byte(text), &fromText); err != nil {
		s.t.Fatalf("%s: the text is not JSON: %v", name, err)
	}
	if a, b := mustMarshal(s.t, fromText), mustMarshal(s.t, res.StructuredContent); !bytes.Equal(a, b) {
		s.t.Errorf("%s says in text\n%s\nand in structure\n%s", name, a, b)
	}
	return res.StructuredContent.(map[string]any)
}

// fails calls a tool that refuses, and returns what it says.
func (s *session) fails(name string, a args) api.WireError {
	s.t.Helper()
	res, err := s.raw(s.t.Context(), name, a)
	if err != nil {
		s.t.Fatalf("%s: a failure of the protocol: %v", name, err)
	}
	text := contentText(s.t, res)
	if !res.IsError || res.StructuredContent != nil {
		s.t.Fatalf("%s %v did not fail as a tool does: %s", name, a, text)
	}
	var e struct{ Error api.WireError }
	if err := json.Unmarshal([]byte(text), &e); err != nil || e.Error.Code == "" || e.Error.Message == "" {
		s.t.Fatalf("%s: %q is no error, %v", name, text, err)
	}
	return e.Error
}

func contentText(t testing.TB, res *mcp.CallToolResult) string {
	t.Helper()
	if len(res.Content) != 1 {
		t.Fatalf("%d contents", len(res.Content))
	}
	return res.Content[0].(*mcp.TextContent).Text
}

func mustMarshal(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (s *session) messages() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.progress...)
}

// wait waits until ok, for something that another process does.
func wait(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("%s has not come", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}
