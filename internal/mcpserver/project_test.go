package mcpserver_test

import (
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/mcpserver"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

// repository makes one with two commits, a tag and a branch, and returns it with
// its first commit.
func repository(t *testing.T) (dir, first string) {
	t.Helper()
	testenv.RequireTools(t, "git", "git")
	dir = t.TempDir()
	git(t, dir, "init", "--quiet", "--initial-branch=main")
	writeFile(t, filepath.Join(dir, "file"), "one\n")
	writeFile(t, filepath.Join(dir, ".gitignore"), "ignored\n")
	git(t, dir, "add", ".")
	git(t, dir, "commit", "--quiet", "-m", "one")
	git(t, dir, "tag", "v1")
	first = git(t, dir, "rev-parse", "HEAD")
	writeFile(t, filepath.Join(dir, "file"), "two\n")
	git(t, dir, "commit", "--quiet", "-a", "-m", "two")
	git(t, dir, "branch", "topic")
	writeFile(t, filepath.Join(dir, "ignored"), "x")
	return dir, first
}

func git(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.Command("git", append([]string{"-c", "user.name=t", "-c", "user.email=t@example.org", "-C", dir}, args...)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("git %q: %v: %s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

func TestProjectIsFound(t *testing.T) {
	dir, _ := repository(t)
	sub := filepath.Join(dir, "a", "b")
	if err := os.MkdirAll(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	home := t.TempDir()
	git(t, home, "init", "--quiet")
	writeFile(t, filepath.Join(home, "dotfile"), "x")
	t.Setenv("HOME", home)
	for _, test := range []struct {
		name    string
		project mcpserver.ProjectOptions
		files   []string // nil for an empty workspace
	}{
		{"Checkout", mcpserver.ProjectOptions{Dir: dir}, []string{".gitignore", "file"}},
		{"Below", mcpserver.ProjectOptions{Dir: sub}, []string{".gitignore", "file"}},
		{"Ignored", mcpserver.ProjectOptions{Dir: dir, IncludeIgnored: true}, []string{".gitignore", "file", "ignored"}},
		{"Path", mcpserver.ProjectOptions{Path: sub, Dir: dir}, nil},
		{"Home", mcpserver.ProjectOptions{Dir: home}, nil},
		{"HomeByName", mcpserver.ProjectOptions{Path: home}, []string{"dotfile"}},
		{"NoCheckout", mcpserver.ProjectOptions{Dir: t.TempDir()}, nil},
		{"Gone", mcpserver.ProjectOptions{Dir: filepath.Join(dir, "gone")}, nil},
		{"None", mcpserver.ProjectOptions{None: true, Dir: dir}, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			o := options(t)
			o.Project = test.project
			s := connect(t, newClient(t), o)
			ws := s.call("workspace_create", args{"name": "w"})
			list := s.call("workspace_file_list", args{"workspace_id": "w"})
			var got []string
			for _, e := range list["entries"].([]any) {
				if name := strings.TrimPrefix(e.(map[string]any)["path"].(string), "/workspace/"); name != ".git" && name != "a" {
					got = append(got, name)
				}
			}
			if strings.Join(got, " ") != strings.Join(test.files, " ") {
				t.Errorf("the workspace has %q, want %q; seed %v", got, test.files, ws["workspace_seed"])
			}
			if seed := ws["workspace_seed"].(map[string]any); test.files != nil && seed["origin_kind"] != "git" {
				t.Errorf("origin %v", seed)
			}
			if d := s.description("workspace_create"); test.files != nil && !strings.Contains(d, dir) && !strings.Contains(d, home) {
				t.Errorf("the description does not name the project: %s", d)
			}
		})
	}
}

func (s *session) description(name string) string {
	s.t.Helper()
	for tool, err := range s.Tools(s.t.Context(), nil) {
		if err != nil {
			s.t.Fatal(err)
		}
		if tool.Name == name {
			return tool.Description
		}
	}
	s.t.Fatalf("there is no tool %s", name)
	return ""
}

func TestClone(t *testing.T) {
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	dir, first := repository(t)
	// None of this may run: the repository is somebody else's.
	pwned := filepath.Join(t.TempDir(), "pwned")
	writeFile(t, filepath.Join(dir, ".git", "hooks", "post-checkout"), "#!/bin/sh\ntouch "+pwned)
	if err := os.Chmod(filepath.Join(dir, ".git", "hooks", "post-checkout"), 0o755); err != nil {
		t.Fatal(err)
	}
	git(t, dir, "config", "core.fsmonitor", "touch "+pwned)
	git(t, dir, "config", "uploadpack.packObjectsHook", "touch "+pwned)
	writeFile(t, filepath.Join(dir, "file"), "dirty\n")
	for _, test := range []struct{ name, url, ref, content string }{
		{"Path", dir, "", "two\n"}, {"File", "file://" + dir, "", "two\n"}, {"Tag", dir, "v1", "one\n"},
		{"Branch", dir, "topic", "two\n"}, {"Commit", dir, first, "one\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			o := options(t)
			o.Project = mcpserver.ProjectOptions{RepoURL: test.url, RepoRef: test.ref}
			s := connect(t, newClient(t), o)
			seed := s.call("workspace_create", args{"name": "w"})["workspace_seed"].(map[string]any)
			if seed["origin_kind"] != "git" || seed["origin_ref"] == nil || strings.HasSuffix(seed["origin_ref"].(string), "+dirty") {
				t.Errorf("seed %v", seed)
			}
			if got := s.call("workspace_file_read", args{"workspace_id": "w", "path": "file"})["content"]; got != test.content {
				t.Errorf("file is %q", got)
			}
		})
	}
	for _, test := range []struct{ name, url, ref, code string }{
		{"NoSuchRef", dir, "nope", "not_found"},
		{"NoRepository", t.TempDir(), "", "unavailable"},
	} {
		t.Run(test.name, func(t *testing.T) {
			o := options(t)
			o.Project = mcpserver.ProjectOptions{RepoURL: test.url, RepoRef: test.ref}
			s := connect(t, newClient(t), o)
			if e := s.fails("workspace_create", args{}); e.Code != test.code {
				t.Errorf("got %+v", e)
			}
			s.call("workspace_create", args{"empty": true})
		})
	}
	for name, o := range map[string]mcpserver.ProjectOptions{
		"Option": {RepoURL: "--upload-pack=touch " + pwned}, "RefOption": {RepoURL: dir, RepoRef: "--upload-pack=x"},
		"Ext": {RepoURL: "ext::touch " + pwned}, "NewLine": {RepoURL: "https://x\ny"}, "Missing": {RepoURL: "no/such/directory"},
	} {
		opts := options(t)
		opts.Project = o
		if s, err := mcpserver.New(newClient(t), opts); err == nil {
			t.Errorf("%s was taken", name)
			s.Close()
		} else if api.Code(err) == "internal" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := os.Stat(pwned); err == nil {
		t.Error("something of the repository ran")
	}
	if left, _ := filepath.Glob(filepath.Join(tmp, "pyro-clone-*")); len(left) != 0 {
		t.Errorf("left behind: %q", left)
	}
}

// What a killed server left goes, what a living one has stays.
func TestClonesOfTheDead(t *testing.T) {
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	dir, _ := repository(t)
	dead := filepath.Join(tmp, "pyro-clone-dead")
	if err := os.Mkdir(dead, 0o700); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(dead, "lock"), "")
	client := newClient(t)
	o := options(t)
	o.Project = mcpserver.ProjectOptions{RepoURL: dir}
	first := must(mcpserver.New(client, o))(t)
	defer first.Close()
	second := must(mcpserver.New(client, o))(t)
	defer second.Close()
	if left, _ := filepath.Glob(filepath.Join(tmp, "pyro-clone-*")); len(left) != 2 || left[0] == dead || left[1] == dead {
		t.Errorf("there are %q", left)
	}
}

// The credentials of an address fetch the clone and do not get into it, which
// goes into guests.
func TestCloneKeepsCredentialsOut(t *testing.T) {
	dir, _ := repository(t)
	git(t, dir, "update-server-info")
	var asked atomic.Bool // git asks on several connections
	files := http.FileServer(http.Dir(filepath.Join(dir, ".git")))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		user, password, ok := r.BasicAuth()
		if !ok {
			w.Header().Set("WWW-Authenticate", "Basic")
			http.Error(w, "", http.StatusUnauthorized)
			return
		}
		asked.Store(user == "me" && password == "hunter2")
		files.ServeHTTP(w, r)
	}))
	defer server.Close()
	o := options(t)
	o.Project = mcpserver.ProjectOptions{RepoURL: strings.Replace(server.URL, "://", "://me:hunter2@", 1)}
	s := connect(t, newClient(t), o)
	s.call("workspace_create", args{"name": "w"})
	config := s.call("workspace_file_read", args{"workspace_id": "w", "path": ".git/config"})["content"].(string)
	if !asked.Load() || strings.Contains(config, "hunter2") || !strings.Contains(config, server.URL) {
		t.Errorf("asked %v; the clone's configuration is %s", asked.Load(), config)
	}
	if got := s.call("workspace_exec", args{"workspace_id": "w", "command": "grep -r hunter2 .; cat file"})["stdout"]; got != "two\n" {
		t.Errorf("the workspace has %q", got)
	}
	if d := s.description("workspace_create"); strings.Contains(d, "hunter2") {
		t.Errorf("the description has them: %s", d)
	}
}

// Nothing of an address that lets somebody in gets into the clone.
func TestWithoutCredentials(t *testing.T) {
	for given, want := range map[string]string{
		"https://me:secret@example.org/a.git": "https://example.org/a.git", "https://token@example.org/a": "https://example.org/a",
		"ssh://git:x@example.org/a": "ssh://git@example.org/a", "git@example.org:a": "git@example.org:a",
		"/a/b@c": "/a/b@c", "https://example.org/a": "https://example.org/a",
	} {
		if got := mcpserver.WithoutCredentials(given); got != want {
			t.Errorf("%s became %s, want %s", given, got, want)
		}
	}
}
