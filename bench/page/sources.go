package main

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// A topic is one file of benchmarks.
type topic struct {
	order      int
	title      string
	text       string // Markdown
	benchmarks []benchmark
}

// A benchmark is one function.
type benchmark struct {
	name string // without the word Benchmark
	row  string // its name on the page
	text string
	aims []aim
}

// An aim is what one of a benchmark's figures should be at most, or at least.
type aim struct {
	unit    string
	atLeast bool
	bound   float64
}

func (a aim) met(v float64) bool {
	if a.atLeast {
		return v >= a.bound
	}
	return v <= a.bound
}

func (a aim) String() string {
	bound := strconv.FormatFloat(a.bound, 'g', -1, 64)
	if a.atLeast {
		return "at least " + bound
	}
	return "at most " + bound
}

const (
	topicDirective = "//page:topic "
	rowDirective   = "//page:row "
	aimDirective   = "//page:aim "
)

// readTopics reads the sources in a directory, in the order that they give
// themselves.
func readTopics(dir string) ([]topic, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	if err != nil {
		return nil, err
	}
	slices.Sort(files)
	var out []topic
	for _, path := range files {
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments)
		if err != nil {
			return nil, err
		}
		t, err := readTopic(f)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		if len(t.benchmarks) > 0 {
			out = append(out, t)
		}
	}
	slices.SortStableFunc(out, func(a, b topic) int { return cmp.Compare(a.order, b.order) })
	return out, nil
}

func readTopic(f *ast.File) (topic, error) {
	var t topic
	for _, group := range f.Comments {
		if head, ok := strings.CutPrefix(group.List[0].Text, topicDirective); ok {
			order, title, _ := strings.Cut(head, " ")
			n, err := strconv.Atoi(order)
			if err != nil || title == "" {
				return t, fmt.Errorf("%q is not a number and a title", head)
			}
			t.order, t.title, t.text = n, title, text(group)
		}
	}
	for _, d := range f.Decls {
		fn, ok := d.(*ast.FuncDecl)
		if !ok || !strings.HasPrefix(fn.Name.Name, "Benchmark") {
			continue
		}
		b := benchmark{name: strings.TrimPrefix(fn.Name.Name, "Benchmark")}
		if fn.Doc != nil {
			b.text = strings.TrimPrefix(text(fn.Doc), fn.Name.Name+" ")
			for _, c := range fn.Doc.List {
				if row, ok := strings.CutPrefix(c.Text, rowDirective); ok {
					b.row = row
				}
				if s, ok := strings.CutPrefix(c.Text, aimDirective); ok {
					a, err := parseAim(s)
					if err != nil {
						return t, err
					}
					b.aims = append(b.aims, a)
				}
			}
		}
		if b.row == "" || b.text == "" {
			return t, fmt.Errorf("%s has no doc comment with a %q", fn.Name.Name, strings.TrimSpace(rowDirective))
		}
		t.benchmarks = append(t.benchmarks, b)
	}
	if t.title == "" && len(t.benchmarks) > 0 {
		return t, fmt.Errorf("it has benchmarks and no comment that begins with %q", strings.TrimSpace(topicDirective))
	}
	return t, nil
}

// text is a comment without its markers and directives.
func text(group *ast.CommentGroup) string { return strings.TrimSpace(group.Text()) }

// parseAim reads "UNIT <= BOUND" or "UNIT >= BOUND".
func parseAim(s string) (aim, error) {
	f := strings.Fields(s)
	if len(f) == 3 && (f[1] == "<=" || f[1] == ">=") {
		if bound, err := strconv.ParseFloat(f[2], 64); err == nil {
			return aim{f[0], f[1] == ">=", bound}, nil
		}
	}
	return aim{}, fmt.Errorf("the aim %q is not of the form UNIT <= BOUND", s)
}
