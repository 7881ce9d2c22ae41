package mmdebstrap

import (
	"bufio"
	"fmt"
	"io"
	"log/slog"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/pyro-mcp/pyro/api"
)

// keptLines is how much of the tool's output is kept to explain a failure.
const keptLines = 40

// A log follows what mmdebstrap, apt and dpkg say on standard error.
type log struct {
	progress func(api.Progress)
	logger   *slog.Logger
	lines    []string // the last ones
	last     api.Progress

	packages int64 // to be installed by the current step
	fetched  int64
	unpacked int64
	setUp    int64
}

func newLog(progress func(api.Progress), logger *slog.Logger) *log {
	if progress == nil {
		progress = func(api.Progress) {}
	}
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	return &log{progress: progress, logger: logger}
}

// read follows r to its end.
func (l *log) read(r io.Reader) {
	sc := bufio.NewScanner(r)
	// A longer line would end the scan and block the tool: split it.
	sc.Split(func(data []byte, atEOF bool) (int, []byte, error) {
		n, token, err := bufio.ScanLines(data, atEOF)
		if n == 0 && token == nil && err == nil && len(data) >= 32<<10 {
			return len(data), data, nil
		}
		return n, token, err
	})
	for sc.Scan() {
		l.line(strings.TrimRight(sc.Text(), "\r "))
	}
}

var (
	newPackages = regexp.MustCompile(`^\d+ upgraded, (\d+) newly installed`)
	getPackage  = regexp.MustCompile(`^Get:\d+ \S+ \S+ \S+ (\S+) `)
	unpack      = regexp.MustCompile(`^Unpacking (\S+)`)
	setUp       = regexp.MustCompile(`^Setting up (\S+)`)
)

func (l *log) line(s string) {
	if s == "" {
		return
	}
	l.logger.Debug("mmdebstrap", "line", s)
	if l.lines = append(l.lines, s); len(l.lines) > keptLines {
		l.lines = l.lines[1:]
	}
	switch {
	case strings.HasPrefix(s, "I: running apt-get update"):
		l.report(api.Progress{Phase: "lists", Message: "reading Debian's package lists"})
	case strings.HasPrefix(s, "I: creating tarball"):
		l.report(api.Progress{Phase: "writing", Message: "writing the image"})
	case strings.HasPrefix(s, "I: extracting archives"):
		l.report(api.Progress{Phase: "installing", Message: "unpacking the first packages", Total: l.packages})
	case newPackages.MatchString(s):
		l.packages, _ = strconv.ParseInt(newPackages.FindStringSubmatch(s)[1], 10, 64)
		l.fetched, l.unpacked, l.setUp = 0, 0, 0
	case getPackage.MatchString(s) && l.packages > 0:
		l.fetched = min(l.fetched+1, l.packages)
		l.report(api.Progress{
			Phase: "downloading", Done: l.fetched, Total: l.packages,
			Message: fmt.Sprintf("downloading package %d of %d: %s", l.fetched, l.packages, getPackage.FindStringSubmatch(s)[1]),
		})
	case l.packages == 0: // a hook's work
	case unpack.MatchString(s):
		l.unpacked++
		l.installing("unpacking", unpack.FindStringSubmatch(s)[1])
	case setUp.MatchString(s):
		l.setUp++
		l.installing("setting up", setUp.FindStringSubmatch(s)[1])
	}
}

// installing counts unpacking and setting up as half a package each.
func (l *log) installing(verb, name string) {
	total := l.packages
	done := min((l.unpacked+l.setUp)/2, total)
	name, _, _ = strings.Cut(name, ":")
	l.report(api.Progress{
		Phase: "installing", Done: done, Total: total,
		Message: fmt.Sprintf("installing packages: %s %s", verb, name),
	})
}

func (l *log) report(p api.Progress) {
	if p != l.last {
		l.last = p
		l.progress(p)
	}
}

// causes are failures that people can do something about, told by what the
// tools say. The first that fits is taken: a full disk makes downloads fail too.
var causes = []struct {
	says  string // a regular expression
	class error
	text  string
	hint  string
}{
	{
		`(?i)no space left on device|don't have enough free space|disk quota exceeded`,
		api.ErrExhausted, "the disk is full",
		"free some space there, or set TMPDIR to a directory on a larger disk",
	},
	{
		`(?i)no_pubkey|is not signed|keyring`,
		api.ErrDenied, "Debian's signatures cannot be checked",
		"run apt-get install debian-archive-keyring as root",
	},
	{
		`(?i)subuid|subgid|newuidmap|newgidmap|unprivileged_userns|unshare\(\) failed|unprivileged user`,
		api.ErrUnavailable, "user namespaces are not usable for this user",
		"install the package uidmap and give the user a range in /etc/subuid and /etc/subgid (usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER), or run as root",
	},
	{
		`(?i)failed resolving|failure resolving|could not resolve|could not connect|unable to connect|cannot initiate the connection|network is unreachable|connection (failed|refused|timed out|reset)|failed to fetch|no route to host`,
		api.ErrUnavailable, "Debian's packages cannot be downloaded",
		"check the network (http_proxy is honoured) and try again: what was downloaded is kept",
	},
	{
		`(?i)permission denied|operation not permitted`,
		api.ErrDenied, "mmdebstrap was not allowed to do its work",
		"set TMPDIR to a directory that other users can pass through and that is mounted without noexec, nodev and nosuid",
	},
}

// explain turns the tool's failure into one sentence.
func (l *log) explain(err error) error {
	// What it says after the failure is about cleaning up.
	said := l.problems()
	all := strings.Join(said, "\n")
	for _, c := range causes {
		if m := regexp.MustCompile(c.says).FindStringIndex(all); m != nil {
			line := lineAt(all, m[0])
			return api.WithHint(api.Errorf(c.class, "%s: %s", c.text, line), "%s", c.hint)
		}
	}
	detail := "it said nothing"
	if len(said) > 0 {
		detail = strings.Join(said[max(0, len(said)-3):], "; ")
	}
	return api.Errorf(api.ErrUnavailable, "mmdebstrap failed (%w): %s", err, detail)
}

// problems returns the kept lines that tell of errors, else all kept lines.
func (l *log) problems() []string {
	var out []string
	for _, s := range l.lines {
		low := strings.ToLower(s)
		if strings.HasPrefix(s, "E:") || strings.HasPrefix(s, "Err:") || strings.HasPrefix(s, "W:") || strings.HasPrefix(s, "dpkg:") ||
			strings.Contains(low, "error") || strings.Contains(low, "failed") || strings.Contains(low, "cannot") || strings.Contains(low, "no space") {
			out = append(out, s)
		}
	}
	if len(out) == 0 {
		return slices.Clone(l.lines)
	}
	return out
}

// lineAt returns the line of s that offset is in, bounded for a message.
func lineAt(s string, offset int) string {
	start := strings.LastIndexByte(s[:offset], '\n') + 1
	line, _, _ := strings.Cut(s[start:], "\n")
	line = strings.TrimSpace(strings.TrimPrefix(line, "E:"))
	if len(line) > 300 {
		line = line[:300] + "…"
	}
	return line
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return lineAt(s, len(s))
}
