// Command page turns the output of this project's benchmarks into its page of
// figures. It reads what go test -bench prints, passes it on, and writes the page
// when all of it has come:
//
//	go test -run '^$' -bench . -benchtime 1x ./bench/ | go run ./bench/page -o docs/performance.md
//
// What the page says about a table stands beside the benchmarks, in the comments
// of their sources, which page reads too: a comment that begins with
// //page:topic, a number and a title gives a file's benchmarks their place, their
// heading and an introduction, and a benchmark's doc comment explains its row, with //page:row for the row's name
// and //page:aim for the bound that is wanted, as in "ratio <= 2".
package main

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"
)

func main() {
	out := flag.String("o", "", "file to write the page to")
	sources := flag.String("sources", "bench", "directory of the benchmarks' sources")
	flag.Parse()
	if *out == "" || flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	if err := run(*out, *sources); err != nil {
		fmt.Fprintf(os.Stderr, "page: %v\n", err)
		os.Exit(1)
	}
}

func run(out, sources string) error {
	topics, err := readTopics(sources)
	if err != nil {
		return err
	}
	var seen bytes.Buffer
	if _, err := io.Copy(os.Stdout, io.TeeReader(os.Stdin, &seen)); err != nil {
		return err
	}
	results, err := readResults(&seen)
	if err != nil {
		return fmt.Errorf("%w; %s stays as it is", err, out)
	}
	var page bytes.Buffer
	writePage(&page, topics, results, here(results))
	temporary := out + ".new"
	if err := os.WriteFile(temporary, page.Bytes(), 0o644); err != nil {
		return err
	}
	return os.Rename(temporary, out)
}

// A machine is where the benchmarks ran, and what of.
type machine struct {
	CPU, Kernel, Memory string
	Cores               int
	Date, Commit        string
	Versions            []string
}

// here describes this machine. It names no host.
func here(results []result) machine {
	m := machine{Cores: runtime.NumCPU(), CPU: "unknown", Date: time.Now().UTC().Format("2 January 2006"), Commit: "unknown"}
	for _, r := range results {
		if r.cpu != "" {
			m.CPU = r.cpu
		}
	}
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		m.Kernel = unix.ByteSliceToString(uts.Sysname[:]) + " " + unix.ByteSliceToString(uts.Release[:])
	}
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		m.Memory = humanize.IBytes(uint64(info.Totalram) * uint64(info.Unit))
	}
	if b, err := exec.Command("git", "describe", "--always", "--dirty", "--exclude", "*").Output(); err == nil {
		m.Commit = strings.TrimSpace(string(b))
	}
	m.Versions = append(m.Versions, runtime.Version())
	for _, command := range [][]string{{filepath.Join("bin", "pyro-runsc"), "--version"}, {"qemu-system-x86_64", "--version"}} {
		if b, err := exec.Command(command[0], command[1:]...).Output(); err == nil {
			line, _, _ := strings.Cut(string(b), "\n")
			m.Versions = append(m.Versions, strings.TrimSpace(line))
		}
	}
	return m
}
