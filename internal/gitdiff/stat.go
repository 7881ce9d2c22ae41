package gitdiff

import (
	"bufio"
	"fmt"
	"io"
	"strings"
)

// WriteStat renders stats as git diff --stat does, in lines of at most width
// characters: each path with its number of changed lines and a bar.
func WriteStat(w io.Writer, stats []Stat, width int) error {
	bw := bufio.NewWriter(w)
	var most, added, deleted int64
	names, digits := 0, 1
	for _, s := range stats {
		most = max(most, s.Added+s.Deleted)
		added += s.Added
		deleted += s.Deleted
		names = max(names, len(Quote(s.Path)))
		if s.Binary {
			digits = 3
		}
	}
	digits = max(digits, len(fmt.Sprint(most)))
	width = max(width, 40)
	// As Git: the names get what the bars do not need, at least half.
	names = min(names, max(width/2, width-digits-5-int(min(most, int64(width)))))
	bar := max(width-names-digits-5, 6)
	for _, s := range stats {
		name := Quote(s.Path)
		if len(name) > names {
			name = "..." + name[len(name)-names+3:]
		}
		fmt.Fprintf(bw, " %-*s | ", names, name)
		if s.Binary {
			fmt.Fprintf(bw, "%*s %d -> %d bytes\n", digits, "Bin", s.OldSize, s.NewSize)
			continue
		}
		plus, minus := scale(s.Added, most, bar), scale(s.Deleted, most, bar)
		if plus+minus > bar {
			plus = bar - minus
		}
		line := fmt.Sprintf("%*d %s%s", digits, s.Added+s.Deleted, strings.Repeat("+", plus), strings.Repeat("-", minus))
		fmt.Fprintln(bw, strings.TrimRight(line, " "))
	}
	if len(stats) > 0 {
		fmt.Fprintf(bw, " %d %s changed", len(stats), plural(int64(len(stats)), "file", "files"))
		if added > 0 {
			fmt.Fprintf(bw, ", %d %s(+)", added, plural(added, "insertion", "insertions"))
		}
		if deleted > 0 {
			fmt.Fprintf(bw, ", %d %s(-)", deleted, plural(deleted, "deletion", "deletions"))
		}
		fmt.Fprintln(bw)
	}
	return bw.Flush()
}

// scale returns the length of a bar for n where most may take all of width;
// what is not nothing is seen.
func scale(n, most int64, width int) int {
	if n == 0 || most <= int64(width) {
		return int(n)
	}
	return 1 + int(float64(n)*float64(width-1)/float64(most))
}

func plural(n int64, one, many string) string {
	if n == 1 {
		return one
	}
	return many
}

// WriteNames renders the changed paths as git diff --name-only does.
func WriteNames(w io.Writer, stats []Stat) error {
	bw := bufio.NewWriter(w)
	for _, s := range stats {
		fmt.Fprintln(bw, Quote(s.Path))
	}
	return bw.Flush()
}
