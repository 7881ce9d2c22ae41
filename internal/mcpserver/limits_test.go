package mcpserver_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/mcpserver"
)

// What a model may not have it is told who could give it.
func TestLimits(t *testing.T) {
	o := options(t)
	o.Limits = mcpserver.Limits{Engine: "host", MaxVCPUs: 2, MaxMemMiB: 512, MaxDiskMiB: 4096, MaxTTL: 5 * time.Minute, MaxWorkspaces: 1}
	s := connect(t, newClient(t), o)
	for _, test := range []struct {
		name, tool string
		arguments  args
		flag       string
	}{
		{"VCPUs", "workspace_create", args{"vcpu_count": 3}, "--max-vcpus"},
		{"RunVCPUs", "vm_run", args{"command": "true", "vcpu_count": 3}, "--max-vcpus"},
		{"Memory", "workspace_create", args{"mem_mib": 513}, "--max-mem-mib"},
		{"Disk", "workspace_create", args{"disk_mib": 4097}, "--max-disk-mib"},
		{"TTL", "workspace_create", args{"ttl_seconds": 301}, "--max-ttl-seconds"},
		{"ForEver", "workspace_create", args{"ttl_seconds": 0}, "--max-ttl-seconds"},
		{"RunTTL", "vm_run", args{"command": "true", "ttl_seconds": 0}, "--max-ttl-seconds"},
		{"Prolong", "workspace_update", args{"workspace_id": "w", "ttl_seconds": 3600}, "--max-ttl-seconds"},
		{"Network", "workspace_create", args{"network_policy": "egress"}, "--network-policy"},
		{"RunNetwork", "vm_run", args{"command": "true", "network": true}, "--network-policy"},
		{"HostCompat", "workspace_create", args{"allow_host_compat": true}, "--allow-host-compat"},
		{"RunHostCompat", "vm_run", args{"command": "true", "allow_host_compat": true}, "--allow-host-compat"},
		{"Engine", "workspace_create", args{"engine": "host"}, "--engine"},
		{"Require", "vm_run", args{"command": "true", "require": "vm"}, "--require"},
		{"Export", "workspace_export", args{"workspace_id": "w", "path": "x", "output_path": "/tmp/x"}, "--allow-export"},
		{"DiskExport", "workspace_disk_export", args{"workspace_id": "w", "output_path": "/tmp/x"}, "--allow-export"},
		{"SeedPath", "workspace_create", args{"seed_path": "/etc"}, "--allow-path"},
		{"RelativeSeedPath", "workspace_create", args{"seed_path": "x"}, "--allow-path"},
		{"Sync", "workspace_sync_push", args{"workspace_id": "w", "source_path": "/etc"}, "--allow-path"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if e := s.fails(test.tool, test.arguments); e.Code != "denied" || !strings.Contains(e.Hint, test.flag) {
				t.Errorf("got %+v, want denied and a hint at %s", e, test.flag)
			}
		})
	}
	// Within the limits it fails for what engine host is, not for them.
	if e := s.fails("workspace_create", args{}); strings.Contains(e.Hint, "--max") {
		t.Errorf("the defaults are above the limits: %+v", e)
	}
}

func TestNarrowProfileSaysWhereTheParameterIs(t *testing.T) {
	o := options(t)
	o.Profile = mcpserver.ProfileCore
	s := connect(t, newClient(t), o)
	e := s.fails("workspace_create", args{"network_policy": "egress"})
	if e.Code != "denied" || !strings.Contains(e.Hint, "--profile workspace-full") {
		t.Errorf("got %+v", e)
	}
}

func TestMaxWorkspaces(t *testing.T) {
	o := options(t)
	o.Limits.MaxWorkspaces = 2
	s := connect(t, newClient(t), o)
	made := make(chan bool, 8)
	for range cap(made) {
		go func() {
			res, err := s.raw(t.Context(), "workspace_create", args{})
			made <- err == nil && !res.IsError
		}()
	}
	n := 0
	for range cap(made) {
		if <-made {
			n++
		}
	}
	if n != 2 {
		t.Errorf("%d were made at once", n)
	}
	for tool, a := range map[string]args{"workspace_create": {}, "vm_run": {"command": "true"}, "workspace_fork": {"workspace_id": "w"}} {
		if e := s.fails(tool, a); e.Code != "exhausted" || !strings.Contains(e.Hint, "--max-workspaces") {
			t.Errorf("%s: %+v", tool, e)
		}
	}
}

// A path is what it leads to.
func TestHostPaths(t *testing.T) {
	top := t.TempDir()
	project, further, exports, secret := filepath.Join(top, "project"), filepath.Join(top, "further"), filepath.Join(top, "exports"), filepath.Join(top, "secret")
	for _, d := range []string{filepath.Join(project, "sub"), further, filepath.Join(exports, "sub"), secret, project + "-sibling"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	writeFile(t, filepath.Join(secret, "key"), "secret")
	writeFile(t, filepath.Join(project, "sub", "file"), "file")
	for from, to := range map[string]string{
		filepath.Join(project, "out"): secret, filepath.Join(project, "in"): "sub", filepath.Join(exports, "out"): secret,
		filepath.Join(project, "loop"): "loop", filepath.Join(project, "gone"): "nowhere", filepath.Join(exports, "dangling"): filepath.Join(secret, "new"),
	} {
		if err := os.Symlink(to, from); err != nil {
			t.Fatal(err)
		}
	}
	o := options(t)
	o.Project = mcpserver.ProjectOptions{Path: project}
	o.Limits.AllowPaths, o.Limits.AllowExports = []string{further}, []string{exports}
	s := connect(t, newClient(t), o)
	s.call("workspace_create", args{"name": "w", "empty": true})
	s.call("workspace_file_write", args{"workspace_id": "w", "path": "f", "text": "x"})
	for _, test := range []struct{ name, path, code string }{
		{"Project", project, ""}, {"Relative", "sub", ""}, {"Dot", ".", ""}, {"Link", "in", ""}, {"Further", further, ""},
		{"Parent", "..", "denied"}, {"UpAndDown", "sub/../../secret", "denied"}, {"Absolute", secret, "denied"}, {"Root", "/", "denied"},
		{"LinkOut", "out", "denied"}, {"BelowLinkOut", "out/key", "denied"}, {"Sibling", project + "-sibling", "denied"},
		{"MissingOutside", filepath.Join(secret, "missing"), "denied"}, {"Missing", "missing", "not_found"}, {"Loop", "loop", "invalid"}, {"Gone", "gone", "not_found"},
		{"Empty", "", "invalid"}, {"NUL", "sub\x00", "invalid"}, {"Option", "--help", "not_found"},
	} {
		t.Run("Read/"+test.name, func(t *testing.T) {
			s := *s
			s.t = t
			a := args{"workspace_id": "w", "source_path": test.path, "dest": "/workspace/in"}
			if test.code == "" {
				s.call("workspace_sync_push", a)
			} else if e := s.fails("workspace_sync_push", a); e.Code != test.code {
				t.Errorf("got %+v, want %s", e, test.code)
			}
		})
	}
	for _, test := range []struct{ name, path, code string }{
		{"Relative", "a", ""}, {"Absolute", filepath.Join(exports, "sub", "b"), ""}, {"UpAndDown", "sub/../c", ""},
		{"Parent", "../d", "denied"}, {"Elsewhere", filepath.Join(project, "d"), "denied"}, {"Root", "/", "denied"}, {"LinkOut", "out/d", "denied"},
		{"DanglingLink", "dangling", "exists"}, {"Taken", "sub", "exists"}, {"Top", exports, "denied"}, {"NoDirectory", "x/y", "not_found"}, {"Empty", "", "invalid"},
	} {
		t.Run("Export/"+test.name, func(t *testing.T) {
			s := *s
			s.t = t
			a := args{"workspace_id": "w", "path": "f", "output_path": test.path}
			if test.code == "" {
				s.call("workspace_export", a)
			} else if e := s.fails("workspace_export", a); e.Code != test.code {
				t.Errorf("got %+v, want %s", e, test.code)
			}
		})
	}
	if left, err := os.ReadDir(secret); err != nil || len(left) != 1 {
		t.Errorf("outside there is now %v, %v", left, err)
	}
}

// Whatever is passed is answered as a tool answers, and never runs as an option
// or a command of the host.
func TestHostileArguments(t *testing.T) {
	s := connect(t, newClient(t), options(t))
	for name := range s.schemas {
		properties := s.parameters(name)
		for _, evil := range []string{"-x", "--help", ";id", "$(id)", "a\nb", "a\x00b", "../../x", strings.Repeat("A", 64<<10), "\u202e", "{{.}}"} {
			a := args{"workspace_id": evil, "environment": evil, "path": evil, "output_path": evil, "source_path": evil, "snapshot_name": evil, "patch": evil, "text": evil}
			for k := range a {
				if !properties[k] {
					delete(a, k)
				}
			}
			if properties["command"] && name == "vm_run" {
				a["command"] = "true"
			} else if properties["command"] {
				a["command"] = "exit 7"
			}
			if len(a) == 0 {
				continue
			}
			if e := s.fails(name, a); e.Code == "internal" {
				t.Errorf("%s %.30q: %+v", name, evil, e)
			}
		}
	}
}

func (s *session) parameters(name string) map[string]bool {
	s.t.Helper()
	out := map[string]bool{}
	for tool, err := range s.Tools(s.t.Context(), nil) {
		if err != nil {
			s.t.Fatal(err)
		}
		if tool.Name == name {
			properties, _ := tool.InputSchema.(map[string]any)["properties"].(map[string]any)
			for p := range properties {
				out[p] = true
			}
		}
	}
	return out
}

func TestOptionsThatDoNotGoTogether(t *testing.T) {
	client := newClient(t)
	for name, change := range map[string]func(*mcpserver.Options){
		"ProfileAndMode": func(o *mcpserver.Options) { o.Mode = mcpserver.ModeInspect },
		"NoSuchProfile":  func(o *mcpserver.Options) { o.Profile = "x" },
		"NoSuchMode":     func(o *mcpserver.Options) { o.Profile, o.Mode = "", "x" },
		"Negative":       func(o *mcpserver.Options) { o.Limits.MaxVCPUs = -1 },
		"NoSuchPolicy":   func(o *mcpserver.Options) { o.Limits.Network = "all" },
		"NoSuchFloor":    func(o *mcpserver.Options) { o.Limits.Require = api.Require("x") },
		"TwoProjects":    func(o *mcpserver.Options) { o.Project.Path = "/" },
		"RefAlone":       func(o *mcpserver.Options) { o.Project = mcpserver.ProjectOptions{RepoRef: "main"} },
	} {
		o := options(t)
		change(&o)
		if s, err := mcpserver.New(client, o); api.Code(err) != "invalid" {
			t.Errorf("%s: %v", name, err)
			if s != nil {
				s.Close()
			}
		}
	}
}
