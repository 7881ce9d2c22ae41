package engines_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/engine/enginetest"
	"github.com/pyro-mcp/pyro/internal/engine/gvisor"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/testenv"
	"github.com/pyro-mcp/pyro/internal/workspacedisk"
)

// guestRearranges changes what came with the environment, and prints what it
// then is: every file outside of /workspace by type, size and name.
const guestRearranges = `set -e
mv /usr/share/doc /workspace/docs
mv /usr/share/man /usr/share/manuals
rm -r /usr/share/locale; mkdir /usr/share/locale; echo new > /usr/share/locale/new
rm /etc/issue; echo changed >> /etc/hostname-of-old; ln /etc/debian_version /etc/linked
mkdir -p /srv/a/b; mv /srv/a /opt/a; chmod 600 /etc/profile; chown 5:6 /etc/profile
sync
find /usr /etc /srv /opt /var -xdev ! -path /etc/machine-id \( -type f -o -type l \) -printf '%y %s %p\n' -o -type d -printf 'd 0 %p\n' | LC_ALL=C sort -k3`

// TestDiskOfAStoppedSandbox reads the disk of a stopped gVisor machine, which
// is its environment's image and a layer: what the guest saw is there.
func TestDiskOfAStoppedSandbox(t *testing.T) {
	if os.Getenv("PYRO_TEST_ENGINE") != gvisor.Name {
		t.Skip("runs with PYRO_TEST_ENGINE=gvisor")
	}
	t.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin")
	testenv.RequireTools(t, "e2fsprogs", "e2fsck")
	e := gvisor.New(gvisor.Options{Runtime: filepath.Join(programs, "pyro-runsc")})
	caps := e.Probe(t.Context())
	testenv.Require(t, "gvisor", caps.Available, caps.Detail)
	spec := bootable(t)
	dir := t.TempDir()
	g := enginetest.Boot(t, enginetest.Subject{Engine: e, Spec: spec}, func(s *engine.MachineSpec) { s.Dir, s.DiskMiB = dir, 3000 })
	if workspacedisk.LayerDir != gvisor.UpperDir {
		t.Fatalf("the disk tools look into %q, the engine writes to %q", workspacedisk.LayerDir, gvisor.UpperDir)
	}
	src := workspacedisk.Source{
		Path: spec.RootImage, Format: workspacedisk.FormatRaw,
		Layers: []workspacedisk.Source{{Path: filepath.Join(dir, gvisor.LayerFile), Format: workspacedisk.FormatRaw}},
	}
	if _, err := os.Stat(filepath.Join(dir, gvisor.LayerDir)); err == nil { // without root
		src.Layers[0].Path = filepath.Join(dir, gvisor.LayerDir)
		if _, err := workspacedisk.Open(t.Context(), src, workspacedisk.Options{}); !errors.Is(err, api.ErrUnsupported) {
			t.Errorf("opening a disk that is a directory: %v", err)
		}
		return
	}
	want := manifest(t, g)
	wantRest := rearranged(t, g)

	if d, err := workspacedisk.Open(t.Context(), src, workspacedisk.Options{}); !errors.Is(err, api.ErrBusy) || !strings.Contains(err.Error(), "must be stopped") {
		if err == nil {
			d.Close()
		}
		t.Errorf("opening the disk of a running machine: %v", err)
	}
	if err := g.Stop(t.Context(), 5*time.Second); err != nil {
		t.Fatal(err)
	}

	d, err := workspacedisk.Open(t.Context(), src, workspacedisk.Options{HideRuntime: true, DiskBytes: 3000 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	out := filepath.Join(t.TempDir(), "out.ext4")
	if _, err := d.Export(t.Context(), out); err != nil {
		t.Fatal(err)
	}
	exported, err := workspacedisk.Open(t.Context(), workspacedisk.Source{Path: out, Format: workspacedisk.FormatRaw}, workspacedisk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer exported.Close()
	for name, d := range map[string]*workspacedisk.Disk{"layered": d, "exported": exported} {
		got := digests(t, d)
		for p := range got { // moved there later
			if strings.HasPrefix(p, "/workspace/docs/") {
				delete(got, p)
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s files (-guest +disk):\n%s", name, diff)
		}
		if diff := cmp.Diff(wantRest, listed(t, d)); diff != "" {
			t.Errorf("%s environment (-guest +disk):\n%s", name, diff)
		}
		if r, err := d.Read(t.Context(), "/workspace/src/sparse", 5); err != nil || r.SizeBytes != 5<<30+4 {
			t.Errorf("%s sparse file: %+v, %v", name, r, err)
		}
		if _, err := d.Read(t.Context(), "/workspace/gone", 5); !errors.Is(err, api.ErrNotFound) {
			t.Errorf("reading the file that the guest removed: %v", err)
		}
		if r, err := d.Read(t.Context(), "/workspace/docs/bash/copyright", 1000); err != nil || !strings.Contains(r.Content, "bash") {
			t.Errorf("%s, a file of a directory that was moved: %+v, %v", name, r, err)
		}
	}
	if msg, err := exec.Command("e2fsck", "-fn", out).CombinedOutput(); err != nil {
		t.Errorf("e2fsck of the export: %v\n%s", err, msg)
	}
}

// rearranged lets the guest change its environment and returns what it shows.
func rearranged(t *testing.T, g *enginetest.Guest) []string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	var out, errOut bytes.Buffer
	reply, err := g.Client.Exec(ctx, guestproto.ExecRequest{Argv: []string{"bash", "-c", guestRearranges}, TimeoutSeconds: 240},
		guestclient.ExecIO{Stdout: &out, Stderr: &errOut})
	if err != nil || reply.ExitCode != 0 {
		t.Fatalf("rearranging the guest: exit code %d, %v\n%s", reply.ExitCode, err, errOut.String())
	}
	return strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
}

// listed is what rearranged returns, from a disk.
func listed(t *testing.T, d *workspacedisk.Disk) []string {
	t.Helper()
	list, err := d.List(t.Context(), "/", true)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range list.Entries {
		top, rest, _ := strings.Cut(e.Path[1:], "/")
		if top == "etc" && rest == "machine-id" { // a mount covered it in the guest
			continue
		}
		switch top {
		case "usr", "etc", "srv", "opt", "var":
			kind := map[string]string{api.ArtifactDirectory: "d", api.ArtifactFile: "f", api.ArtifactSymlink: "l"}[e.ArtifactType]
			out = append(out, kind+" "+strconv.FormatInt(e.SizeBytes, 10)+" "+e.Path)
		}
	}
	return out
}
