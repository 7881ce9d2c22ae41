package mcpserver_test

import (
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/mcpserver"
)

// Arguments are what a model, or somebody who speaks through it, makes up.
func FuzzArguments(f *testing.F) {
	for _, s := range []string{"", "null", "{}", `{"workspace_id":"w","command":"x"}`, `{"workspace_id":null}`, `{"command":1e400}`, `{"timeout_seconds":-1}`, `[1]`, `{"a":{"a":{"a":[]}}}`, `{"command":"x","command":"y"}`, `{"COMMAND":"x"}`, "{\"command\":\"\xff\"}"} {
		f.Add("workspace_exec", []byte(s))
	}
	f.Add("service_start", []byte(`{"readiness":{"type":1},"published_ports":[{"guest_port":null}]}`))
	f.Add("workspace_create", []byte(`{"secrets":[{}],"labels":{"a":1}}`))
	f.Fuzz(func(t *testing.T, name string, raw []byte) {
		switch name {
		case "workspace_exec", "service_start", "workspace_create":
		default:
			name = "workspace_exec"
		}
		got, err := mcpserver.Arguments(name, raw)
		if err != nil {
			if code := api.Code(err); code != "invalid" && code != "denied" {
				t.Fatalf("%q: %s: %v", raw, code, err)
			}
			if !utf8.ValidString(err.Error()) && utf8.Valid(raw) {
				t.Fatalf("message %q", err)
			}
			return
		}
		if !json.Valid(got) {
			t.Fatalf("%q became %q", raw, got)
		}
	})
}

// Output comes from a guest.
func FuzzOutput(f *testing.F) {
	f.Add([]byte("a\r\nb\x1b[31mc\x1b]0;t\x07\u202e\u200b\U000e0041\xff"), 3)
	f.Add([]byte(strings.Repeat("é\n", 40000)), 4097)
	f.Fuzz(func(t *testing.T, raw []byte, n int) {
		if len(raw) < 1000 && len(raw) > 0 {
			raw = append(raw, raw...)
		}
		text, lines := mcpserver.Cut(raw, n)
		if !utf8.ValidString(text) || strings.ContainsAny(text, "\x00\x07\x1b\r\x7f") {
			t.Fatalf("%q became %q", raw, text)
		}
		if len(text) > 3*(32<<10)+200 || len(lines) > 3 {
			t.Fatalf("%d bytes became %d, and %d lines", len(raw), len(text), len(lines))
		}
		encoded, err := json.Marshal(text)
		if err != nil {
			t.Fatal(err)
		}
		escaped := mcpserver.EscapeInvisible(encoded)
		var back string
		if err := json.Unmarshal(escaped, &back); err != nil || back != text {
			t.Fatalf("%q became %q, %v", encoded, escaped, err)
		}
		if strings.ContainsFunc(string(escaped), mcpserver.Invisible) {
			t.Fatalf("invisible characters are left in %q", escaped)
		}
		for at := int64(0); at < int64(len(text)); {
			from, to := mcpserver.PieceOf(text, at, 64)
			if int64(from) != at || to <= from || !utf8.ValidString(text[from:to]) {
				t.Fatalf("the piece of %q at %d is %d to %d", text, at, from, to)
			}
			at = int64(to)
		}
	})
}

// BenchmarkCall measures what the server adds to a call of the SDK: both read
// one status, through pipes and without.
func BenchmarkCall(b *testing.B) {
	client := newClient(b)
	s := connect(b, client, options(b))
	s.call("workspace_create", args{"name": "w"})
	b.Run("SDK", func(b *testing.B) {
		for b.Loop() {
			if _, err := client.Workspace(b.Context(), "w"); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("MCP", func(b *testing.B) {
		for b.Loop() {
			if res, err := s.raw(b.Context(), "workspace_status", args{"workspace_id": "w"}); err != nil || res.IsError {
				b.Fatal(res, err)
			}
		}
	})
}
