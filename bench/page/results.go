package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"

	"golang.org/x/perf/benchfmt"
)

// A result is one line of a benchmark's output.
type result struct {
	name   string   // the function, without the word Benchmark
	sub    []string // what b.Run called its parts
	values []value
	cpu    string
}

type value struct {
	unit string
	v    float64
}

func (r result) value(unit string) (float64, bool) {
	for _, v := range r.values {
		if v.unit == unit {
			return v.v, true
		}
	}
	return 0, false
}

// readResults reads what go test -bench has printed. A run that failed, or that
// did not come to its end, is an error.
func readResults(output io.Reader) ([]result, error) {
	b, err := io.ReadAll(output)
	if err != nil {
		return nil, err
	}
	ended := false
	lines := bufio.NewScanner(bytes.NewReader(b))
	lines.Buffer(nil, len(b)+1)
	for lines.Scan() {
		line := lines.Text()
		if strings.HasPrefix(line, "--- FAIL") || line == "FAIL" || strings.HasPrefix(line, "FAIL\t") {
			return nil, fmt.Errorf("the benchmarks failed (%s)", line)
		}
		ended = ended || strings.HasPrefix(line, "ok ")
	}
	if !ended {
		return nil, errors.New("the benchmarks did not come to an end")
	}
	var out []result
	r := benchfmt.NewReader(bytes.NewReader(b), "standard input")
	for r.Scan() {
		switch rec := r.Result().(type) {
		case *benchfmt.Result:
			out = append(out, newResult(rec))
		case *benchfmt.SyntaxError:
			return nil, rec
		}
	}
	if err := r.Err(); err != nil {
		return nil, err
	}
	if len(out) == 0 {
		return nil, errors.New("no benchmark printed a result")
	}
	return out, nil
}

func newResult(rec *benchfmt.Result) result {
	base, parts := rec.Name.Parts()
	out := result{name: string(base), cpu: rec.GetConfig("cpu")}
	for _, p := range parts {
		if part, ok := bytes.CutPrefix(p, []byte("/")); ok { // else "-N", how many processors Go used
			out.sub = append(out.sub, strings.ReplaceAll(string(part), "_", " "))
		}
	}
	for _, v := range rec.Values {
		if !strings.HasSuffix(v.Unit, "/op") { // the loop's own time and memory mean nothing here
			out.values = append(out.values, value{v.Unit, v.Value})
		}
	}
	return out
}
