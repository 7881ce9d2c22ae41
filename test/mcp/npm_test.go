package mcp_test

import (
	"crypto/sha256"
	"encoding/hex"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/internal/testenv"
)

// The programs of others that pyro is held against, pinned. Newer versions of
// the first two want a newer Node.js than distributions have, so that comes
// along.
var npmClients = []string{
	nodePackage + "@22.23.3",
	"@modelcontextprotocol/conformance@0.1.16",
	"@modelcontextprotocol/inspector@1.0.3",
}

// npmHosts are the chat hosts, a gigabyte of them.
var npmHosts = []string{
	nodePackage + "@22.23.3",
	"@anthropic-ai/claude-code@2.1.330",
	"@openai/codex@0.169.0",
	"opencode-ai@1.18.33",
}

var nodePackage = "node-" + runtime.GOOS + "-" + map[string]string{"amd64": "x64", "arm64": "arm64"}[runtime.GOARCH]

// installNPM returns the directory with the packages' programs and Node.js. They
// are installed once, below the user's cache directory, which takes the network;
// and used only if PYRO_TEST_REQUIRE asks for npm.
func installNPM(t *testing.T, packages []string) (bin string) {
	t.Helper()
	testenv.Require(t, "npm", testenv.Wanted("npm"), "these clients take a minute, and the network the first time; "+testenv.Variable+"=npm runs them")
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256([]byte(strings.Join(packages, " ")))
	top := filepath.Join(cache, "pyro-test-npm", hex.EncodeToString(sum[:6]))
	done := filepath.Join(top, "done")
	if _, err := os.Stat(done); err != nil {
		testenv.RequireTools(t, "npm", "npm")
		if err := os.MkdirAll(top, 0o755); err != nil {
			t.Fatal(err)
		}
		lock, err := os.Create(filepath.Join(top, "lock"))
		if err != nil {
			t.Fatal(err)
		}
		defer lock.Close()
		if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(done); err != nil {
			run(t, exec.Command("npm", append([]string{"install", "--prefix", top, "--no-audit", "--no-fund", "--loglevel=error"}, packages...)...))
			write(t, done, "")
		}
	}
	bin = filepath.Join(t.TempDir(), "bin")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	found, err := filepath.Glob(filepath.Join(top, "node_modules", ".bin", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range append(found, filepath.Join(top, "node_modules", nodePackage, "bin", "node")) {
		if err := os.Symlink(f, filepath.Join(bin, filepath.Base(f))); err != nil && filepath.Base(f) != "node" {
			t.Fatal(err)
		}
	}
	return bin
}

// serveHTTP starts pyro mcp serve --http and returns its URL and token.
func (p *pyro) serveHTTP(t *testing.T, args ...string) (url, token string) {
	t.Helper()
	token = strings.Repeat("t", 40)
	cmd := p.command(append(append([]string{"mcp", "serve", "--http", "127.0.0.1:0", "--profile", "workspace-full"}, p.engine...), args...)...)
	cmd.Env = append(cmd.Env, "PYRO_MCP_TOKEN="+token)
	complaint, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Error(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("the server ended with %v", err)
		}
	})
	var said strings.Builder
	for buf := make([]byte, 4096); ; {
		n, err := complaint.Read(buf)
		said.Write(buf[:n])
		if _, after, ok := strings.Cut(said.String(), "url="); ok && strings.Contains(after, "\n") {
			url, _, _ = strings.Cut(after, " ")
			break
		}
		if err != nil {
			t.Fatalf("the server said %s, %v", said.String(), err)
		}
	}
	go func() {
		for buf := make([]byte, 4096); ; {
			if _, err := complaint.Read(buf); err != nil {
				return
			}
		}
	}()
	return strings.TrimSpace(url), token
}

// The conformance suite's scenarios that hold for every server. The others want
// a server with the suite's own tools.
func TestConformance(t *testing.T) {
	bin := installNPM(t, npmClients)
	p := newPyro(t)
	// The suite knows no token: something between adds it, and nothing else.
	var target *url.URL
	var token string
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		proxy := &httputil.ReverseProxy{FlushInterval: -1, ErrorLog: log.New(io.Discard, "", 0), Rewrite: func(pr *httputil.ProxyRequest) {
			pr.SetURL(target)
			pr.Out.URL.Path = target.Path
			pr.Out.Host = pr.In.Host
			pr.Out.Header.Set("Authorization", "Bearer "+token)
		}}
		proxy.ServeHTTP(w, r)
	}))
	defer front.Close()
	host := strings.TrimPrefix(front.URL, "http://")
	_, port, _ := strings.Cut(host, ":")
	address, given := p.serveHTTP(t, "--allowed-host", host, "--allowed-host", "localhost:"+port)
	token = given
	var err error
	if target, err = url.Parse(address); err != nil {
		t.Fatal(err)
	}
	for _, scenario := range []string{"server-initialize", "ping", "tools-list", "prompts-list", "dns-rebinding-protection", "server-sse-multiple-streams"} {
		t.Run(scenario, func(t *testing.T) {
			cmd := exec.Command(filepath.Join(bin, "conformance"), "server", "--url", "http://localhost:"+port+"/mcp", "--scenario", scenario)
			cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"))
			cmd.Dir = t.TempDir()
			out, err := cmd.CombinedOutput()
			if err != nil || strings.Contains(string(out), "FAILURE") {
				t.Errorf("%v\n%.4000s", err, out)
			}
		})
	}
}

// The inspector's command line, which is built on the TypeScript library, over
// both transports.
func TestInspector(t *testing.T) {
	bin := installNPM(t, npmClients)
	p := newPyro(t)
	wrapper := filepath.Join(t.TempDir(), "serve")
	write(t, wrapper, "#!/bin/sh\nexec "+p.path+" mcp serve --profile workspace-full "+strings.Join(p.engine, " ")+"\n")
	if err := os.Chmod(wrapper, 0o755); err != nil {
		t.Fatal(err)
	}
	address, token := p.serveHTTP(t)
	for name, how := range map[string][]string{
		"Stdio": {wrapper},
		"HTTP":  {address, "--transport", "http", "--header", "Authorization: Bearer " + token},
	} {
		t.Run(name, func(t *testing.T) {
			inspect := func(args ...string) string {
				cmd := exec.Command(filepath.Join(bin, "mcp-inspector"), append(append([]string{"--cli"}, how...), args...)...)
				cmd.Env = append(p.env, "PATH="+bin+":"+os.Getenv("PATH"))
				cmd.Dir = t.TempDir()
				return run(t, cmd)
			}
			if out := inspect("--method", "tools/list"); !strings.Contains(out, `"workspace_create"`) {
				t.Errorf("tools/list: %.2000s", out)
			}
			if out := inspect("--method", "prompts/list"); !strings.Contains(out, `"repro-fix"`) {
				t.Errorf("prompts/list: %.2000s", out)
			}
			if out := inspect("--method", "tools/call", "--tool-name", "vm_run", "--tool-arg", "command=echo hello", "--tool-arg", "timeout_seconds=60"); !strings.Contains(out, `"stdout": "hello\n"`) {
				t.Errorf("tools/call: %.2000s", out)
			}
		})
	}
}

// The chat hosts themselves, each with a home directory of the test's own: their
// word decides whether pyro is there.
func TestChatHosts(t *testing.T) {
	bin := installNPM(t, npmHosts)
	p := newPyro(t)
	home := t.TempDir()
	path := programs + ":" + bin + ":/usr/bin:/bin"
	in := func(name string, args ...string) *exec.Cmd {
		cmd := exec.Command(name, args...)
		// Later ones win: everything of this person's stays out.
		cmd.Env = append(p.env, "HOME="+home, "PATH="+path, "XDG_CONFIG_HOME=", "XDG_CACHE_HOME=", "XDG_STATE_HOME=", "XDG_DATA_HOME=",
			"CLAUDE_CONFIG_DIR=", "CODEX_HOME=", "DISABLE_AUTOUPDATER=1", "OPENCODE_DISABLE_AUTOUPDATE=1", "NO_COLOR=1")
		cmd.Dir = home
		cmd.WaitDelay = 10 * time.Second
		return cmd
	}
	host := func(args ...string) string {
		t.Helper()
		return run(t, in(p.path, append([]string{"host"}, args...)...))
	}
	doctor := func(name string) string {
		out, _ := in(p.path, "host", "doctor", name).Output() // exit status 1 where it has drifted
		return string(out)
	}
	for _, test := range []struct {
		name    string
		connect []string
		says    func() string
		good    string
		drift   func()
	}{
		{"claude-code", []string{"connect", "claude-code", "--mode", "repro-fix"},
			func() string { return run(t, in(filepath.Join(bin, "claude"), "mcp", "list")) }, "Connected",
			func() {
				run(t, in(filepath.Join(bin, "claude"), "mcp", "remove", "-s", "user", "pyro"))
				run(t, in(filepath.Join(bin, "claude"), "mcp", "add", "-s", "user", "pyro", "--", "/nowhere/pyro", "mcp", "serve", "--mode", "repro-fix"))
			}},
		{"codex", []string{"connect", "codex", "--mode", "repro-fix"},
			func() string { return run(t, in(filepath.Join(bin, "codex"), "mcp", "list")) }, "enabled",
			func() {
				file := filepath.Join(home, ".codex", "config.toml")
				text, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				write(t, file, "# mine\n"+strings.Replace(string(text), p.path, "/nowhere/pyro", 1))
			}},
		{"opencode", []string{"print-config", "opencode", "--merge", "--mode", "repro-fix"},
			func() string { return run(t, in(filepath.Join(bin, "opencode"), "mcp", "list")) }, "connected",
			func() {
				for _, name := range []string{"opencode.json", "opencode.jsonc"} {
					file := filepath.Join(home, ".config", "opencode", name)
					if text, err := os.ReadFile(file); err == nil {
						write(t, file, strings.Replace(string(text), p.path, "/nowhere/pyro", 1))
					}
				}
			}},
	} {
		t.Run(test.name, func(t *testing.T) {
			before := doctor(test.name)
			dry := host(append(test.connect, "--dry-run")...)
			if !strings.Contains(dry, "would") || !strings.Contains(dry, p.path) || doctor(test.name) != before {
				t.Errorf("dry run: %s\nbefore: %s\nafter: %s", dry, before, doctor(test.name))
			}
			host(test.connect...)
			check := func(when string) {
				t.Helper()
				if said := test.says(); !strings.Contains(said, p.path) || !strings.Contains(said, "repro-fix") || !strings.Contains(said, test.good) {
					t.Errorf("%s the host says %s", when, said)
				}
				if out := doctor(test.name); !strings.Contains(out, "configured") {
					t.Errorf("%s the doctor says %s", when, out)
				}
			}
			check("after connect")
			if out := host(test.connect...); !strings.Contains(out, "nothing to do") {
				t.Errorf("a second time: %s", out)
			}
			test.drift()
			if out := doctor(test.name); !strings.Contains(out, "drifted") {
				t.Errorf("after the drift the doctor says %s", out)
			}
			host("repair", test.name)
			check("after repair")
		})
	}
}
