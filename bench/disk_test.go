package bench

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/internal/testenv"
	"github.com/pyro-mcp/pyro/internal/workspacedisk"
	"github.com/pyro-mcp/pyro/test/build"
)

//page:topic 7 Looking into a disk without running or mounting it

// The tree of BenchmarkDiskList: 10,000 files in 250 directories, with one
// symlink in each.
const (
	listDirs        = 250
	listFilesPerDir = 40
)

// bestOf returns the shortest of n runs, which is what a busy machine disturbs
// least.
func bestOf(b *testing.B, n int, run func()) time.Duration {
	b.Helper()
	best := time.Duration(1<<63 - 1)
	for range n {
		start := time.Now()
		run()
		best = min(best, time.Since(start))
	}
	return best
}

func needDiskTools(b *testing.B) {
	b.Helper()
	b.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin")
	testenv.RequireTools(b, "e2fsprogs", "mke2fs", "debugfs")
}

func mustRun(b *testing.B, stdin string, name string, args ...string) []byte {
	b.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.Output()
	if err != nil {
		b.Fatalf("%s %s: %v", name, strings.Join(args, " "), err)
	}
	return out
}

// BenchmarkDiskList lists 10,000 files. The references are one debugfs process
// per directory and one per symlink, and a single debugfs process that walks the
// same tree. pyro is measured as a process of its own, like debugfs, and called by
// a program in its own process. These are not medians but the best of a few.
//
//page:row listing 10,000 files
//page:aim pyro/one-debugfs <= 1
//page:aim in-process/debugfs-per-directory <= 0.02
func BenchmarkDiskList(b *testing.B) {
	needDiskTools(b)
	img, dirs, links := listImage(b)
	want := listDirs * (listFilesPerDir + 2)
	programs := b.TempDir()
	if err := build.Programs(programs, false); err != nil {
		b.Fatal(err)
	}
	pyro := filepath.Join(programs, "pyro")
	for range b.N {
		inProcess := bestOf(b, 10, func() {
			d, err := workspacedisk.Open(context.Background(), workspacedisk.Source{Path: img, Format: workspacedisk.FormatRaw}, workspacedisk.Options{})
			if err != nil {
				b.Fatal(err)
			}
			defer d.Close()
			list, err := d.List(context.Background(), "/workspace", true)
			if err != nil || len(list.Entries) != want {
				b.Fatalf("%d entries, want %d: %v", len(list.Entries), want, err)
			}
		})
		process := bestOf(b, 10, func() {
			out := mustRun(b, "", pyro, "disk", "list", img, "/workspace", "--recursive", "--json")
			if n := strings.Count(string(out), `"path": "/workspace/`); n != want {
				b.Fatalf("pyro lists %d entries, want %d", n, want)
			}
		})
		var script strings.Builder
		for _, d := range dirs {
			fmt.Fprintf(&script, "ls -l %s\n", d)
		}
		for _, l := range links {
			fmt.Fprintf(&script, "stat %s\n", l)
		}
		single := bestOf(b, 10, func() {
			out := mustRun(b, script.String(), "debugfs", "-f", "-", img)
			if n := strings.Count(string(out), "file-"); n < listDirs*listFilesPerDir {
				b.Fatalf("debugfs lists %d files", n)
			}
		})
		many := bestOf(b, 2, func() {
			for _, d := range dirs {
				mustRun(b, "", "debugfs", "-R", "ls -p "+d, img)
			}
			for _, l := range links {
				mustRun(b, "", "debugfs", "-R", "stat "+l, img)
			}
		})
		b.ReportMetric(0, "ns/op")
		b.ReportMetric(ms(inProcess), "in-process-ms")
		b.ReportMetric(ms(process), "pyro-ms")
		b.ReportMetric(ms(single), "one-debugfs-ms")
		b.ReportMetric(ms(many), "debugfs-per-directory-ms")
		b.ReportMetric(float64(process)/float64(single), "pyro/one-debugfs")
		b.ReportMetric(float64(inProcess)/float64(many), "in-process/debugfs-per-directory")
		// A program that lists a disk calls the SDK in one case and starts a
		// debugfs for every directory in the other.
		if many < 50*inProcess {
			b.Errorf("listing is %.1f times as fast as one debugfs per directory and symlink, want 50", float64(many)/float64(inProcess))
		}
		if single < process {
			b.Errorf("listing takes %v, one debugfs process %v", process, single)
		}
	}
}

// listImage makes the image and returns the paths of its directories and
// symlinks.
func listImage(b *testing.B) (img string, dirs, links []string) {
	b.Helper()
	tree := b.TempDir()
	dirs = append(dirs, "/workspace")
	for i := range listDirs {
		dir := fmt.Sprintf("/workspace/dir-%03d", i)
		dirs = append(dirs, dir)
		links = append(links, dir+"/link")
		if err := os.MkdirAll(tree+dir, 0o755); err != nil {
			b.Fatal(err)
		}
		for j := range listFilesPerDir {
			if err := os.WriteFile(fmt.Sprintf("%s%s/file-%02d.txt", tree, dir, j), []byte("x"), 0o644); err != nil {
				b.Fatal(err)
			}
		}
		if err := os.Symlink("file-00.txt", tree+dir+"/link"); err != nil {
			b.Fatal(err)
		}
	}
	img = filepath.Join(b.TempDir(), "list.ext4")
	mustRun(b, "", "mke2fs", "-q", "-t", "ext4", "-d", tree, img, "256M")
	return img, dirs, links
}

// BenchmarkDiskRead reads a file of 256 MiB out of an image. The reference is
// debugfs cat; both are processes whose output goes to a pipe.
//
//page:row reading 256 MiB
//page:aim ratio <= 1
func BenchmarkDiskRead(b *testing.B) {
	needDiskTools(b)
	const size = 256 << 20
	tree := b.TempDir()
	f, err := os.Create(filepath.Join(tree, "large"))
	if err != nil {
		b.Fatal(err)
	}
	piece := make([]byte, 1<<20)
	for i := range piece {
		piece[i] = byte(i * 7)
	}
	for range size / len(piece) {
		if _, err := f.Write(piece); err != nil {
			b.Fatal(err)
		}
	}
	if err := f.Close(); err != nil {
		b.Fatal(err)
	}
	img := filepath.Join(b.TempDir(), "read.ext4")
	mustRun(b, "", "mke2fs", "-q", "-t", "ext4", "-d", tree, img, "320M")
	programs := b.TempDir()
	if err := build.Programs(programs, false); err != nil {
		b.Fatal(err)
	}
	for range b.N {
		ours := bestOf(b, 3, func() {
			drain(b, size, filepath.Join(programs, "pyro"), "disk", "read", img, "/large", "--content-only", "--max-bytes", fmt.Sprint(size))
		})
		theirs := bestOf(b, 3, func() { drain(b, size, "debugfs", "-R", "cat /large", img) })
		report(b, ours, theirs)
		if ours > theirs {
			b.Errorf("reading takes %v, debugfs cat %v", ours, theirs)
		}
	}
}

// drain runs a program and reads its output, which must be size bytes.
func drain(b *testing.B, size int64, name string, args ...string) {
	b.Helper()
	cmd := exec.Command(name, args...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, out, make([]byte, 1<<20))
	if werr := cmd.Wait(); err != nil || werr != nil || n != size {
		b.Fatalf("%s gave %d bytes: %v, %v", name, n, err, werr)
	}
}
