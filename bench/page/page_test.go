package main

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite the expected page")

func TestPage(t *testing.T) {
	topics, err := readTopics("testdata")
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(filepath.Join("testdata", "output.txt"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	results, err := readResults(f)
	if err != nil {
		t.Fatal(err)
	}
	var page bytes.Buffer
	writePage(&page, topics, results, machine{
		CPU: results[0].cpu, Kernel: "Linux 6.1", Memory: "8.0 GiB", Cores: 2, Date: "1 May 2026", Commit: "abc1234", Versions: []string{"go1.26"},
	})
	golden := filepath.Join("testdata", "page.md")
	if *update {
		if err := os.WriteFile(golden, page.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), page.String()); diff != "" {
		t.Errorf("the page differs (-want +got):\n%s", diff)
	}
}

// A run that broke off must not become a page.
func TestBrokenRun(t *testing.T) {
	const line = "BenchmarkX-2 \t 1\t 2.000 pyro-ms\n"
	for name, output := range map[string]string{
		"failed":        line + "--- FAIL: BenchmarkY\nFAIL\nexit status 1\nFAIL\tpackage\t1.0s\n",
		"killed":        line,
		"did not build": "FAIL\tpackage [build failed]\n",
		"empty":         "PASS\nok  \tpackage\t1.0s\n",
	} {
		t.Run(name, func(t *testing.T) {
			if results, err := readResults(strings.NewReader(output)); err == nil {
				t.Errorf("readResults = %v", results)
			}
		})
	}
}

// Every benchmark of the project has a place on the page.
func TestSources(t *testing.T) {
	topics, err := readTopics("..")
	if err != nil {
		t.Fatal(err)
	}
	if len(topics) < 5 {
		t.Errorf("only %d topics", len(topics))
	}
}
