package engines_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/engine/enginetest"
	"github.com/pyro-mcp/pyro/internal/engine/qemu"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/hostproc"
	"github.com/pyro-mcp/pyro/internal/testenv"
	"github.com/pyro-mcp/pyro/internal/workspacedisk"
)

// guestWrites fills /workspace with what guests write, and syncs it; the rest
// reaches the journal only. It prints "DIGEST  PATH NUL" for each file.
const guestWrites = `set -e
cd /workspace
mkdir -p src/deep many
for ((i = 1; i <= 2000; i++)); do echo $i > many/some-file-with-a-name-$i; done
seq 200000 > src/large
truncate -s 5G src/sparse; echo end >> src/sparse
printf x > "$(printf 'odd \n"\\\377 name')"
ln -s src/large link; ln src/large src/deep/hard
echo gone > gone; echo old > changed
sync
echo new > changed; echo fresh > fresh; rm gone
sync changed fresh .
find . -type f ! -name sparse -print0 | xargs -0 sha256sum -z`

// TestDiskOfAKilledMachine reads the disk of a virtual machine that was killed
// right after it wrote: every file that it had synced is there with the bytes
// that the guest saw, and nothing stale is.
func TestDiskOfAKilledMachine(t *testing.T) {
	if os.Getenv("PYRO_TEST_ENGINE") != "qemu" {
		t.Skip("runs with PYRO_TEST_ENGINE=qemu")
	}
	t.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin")
	testenv.RequireTools(t, "e2fsprogs", "e2fsck", "debugfs")
	e := qemu.New(qemu.Options{Accel: os.Getenv("PYRO_QEMU_ACCEL")})
	caps := e.Probe(t.Context())
	testenv.Require(t, "qemu", caps.Available, caps.Detail)
	spec := bootable(t)
	dir := t.TempDir()
	g := enginetest.Boot(t, enginetest.Subject{Engine: e, Spec: spec}, func(s *engine.MachineSpec) { s.Dir = dir })
	src := workspacedisk.Source{
		Path: filepath.Join(dir, "disk.qcow2"), Format: workspacedisk.FormatQcow2,
		Backing: &workspacedisk.Source{Path: spec.RootImage, Format: workspacedisk.FormatRaw},
	}
	want := manifest(t, g)

	if d, err := workspacedisk.Open(t.Context(), src, workspacedisk.Options{}); !errors.Is(err, api.ErrBusy) || !strings.Contains(err.Error(), "must be stopped") {
		if err == nil {
			d.Close()
		}
		t.Errorf("opening the disk of a running machine: %v", err)
	}
	id, err := hostproc.Identify(g.PIDs()[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := id.Kill(9); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}

	d, err := workspacedisk.Open(t.Context(), src, workspacedisk.Options{HideRuntime: true})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if !d.Replayed() {
		t.Error("the journal needed no recovery")
	}
	if diff := cmp.Diff(want, digests(t, d)); diff != "" {
		t.Errorf("files (-guest +disk):\n%s", diff)
	}
	if r, err := d.Read(t.Context(), "/workspace/src/sparse", 5); err != nil || r.SizeBytes != 5<<30+4 {
		t.Errorf("the sparse file: %+v, %v", r, err)
	}
	if _, err := d.Read(t.Context(), "/workspace/gone", 5); !errors.Is(err, api.ErrNotFound) {
		t.Errorf("reading the file that the guest removed: %v", err)
	}

	out := filepath.Join(t.TempDir(), "out.ext4")
	if _, err := d.Export(t.Context(), out); err != nil {
		t.Fatal(err)
	}
	exported, err := workspacedisk.Open(t.Context(), workspacedisk.Source{Path: out, Format: workspacedisk.FormatRaw}, workspacedisk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer exported.Close()
	if diff := cmp.Diff(want, digests(t, exported)); diff != "" || exported.Replayed() {
		t.Errorf("exported files, needs recovery %v (-guest +disk):\n%s", exported.Replayed(), diff)
	}
	if msg, err := exec.Command("e2fsck", "-fp", out).CombinedOutput(); err != nil && !strings.Contains(err.Error(), "exit status 1") {
		t.Errorf("e2fsck of the export: %v\n%s", err, msg)
	}
}

// manifest lets the guest write and returns the digest of each file.
func manifest(t *testing.T, g *enginetest.Guest) map[string]string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	var out, errOut bytes.Buffer
	reply, err := g.Client.Exec(ctx, guestproto.ExecRequest{Argv: []string{"bash", "-c", guestWrites}, TimeoutSeconds: 240},
		guestclient.ExecIO{Stdout: &out, Stderr: &errOut})
	if err != nil || reply.ExitCode != 0 {
		t.Fatalf("writing in the guest: exit code %d, %v\n%s", reply.ExitCode, err, errOut.String())
	}
	files := map[string]string{}
	for line := range strings.SplitSeq(strings.TrimSuffix(out.String(), "\x00"), "\x00") {
		digest, p, _ := strings.Cut(line, "  ./")
		files["/workspace/"+p] = digest
	}
	if len(files) < 2005 {
		t.Fatalf("the guest lists %d files only", len(files))
	}
	return files
}

// digests reads all files of /workspace on a disk, the huge one apart.
func digests(t *testing.T, d *workspacedisk.Disk) map[string]string {
	t.Helper()
	list, err := d.List(t.Context(), "/workspace", true)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for _, e := range list.Entries {
		if e.ArtifactType != api.ArtifactFile || filepath.Base(e.Path) == "sparse" {
			continue
		}
		p, err := e.RawPath()
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.New()
		if _, _, err := d.CopyFile(t.Context(), sum, p, 1<<40); err != nil {
			t.Fatal(err)
		}
		files[p] = hex.EncodeToString(sum.Sum(nil))
	}
	return files
}
