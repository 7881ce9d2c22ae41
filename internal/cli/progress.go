package cli

import (
	"fmt"
	"io"
	"sync"
	"time"

	"golang.org/x/term"
	"os"

	"github.com/dustin/go-humanize"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/boundedlog"
)

// progress shows long work on stderr: one line that is rewritten on a terminal,
// plain lines elsewhere. On a fast path (a guest that is up at once) a plain
// stderr stays clean: the phases of a second's work are not worth a line.
type progress struct {
	mu       sync.Mutex
	w        io.Writer
	off      bool
	terminal bool
	drawn    bool
	last     map[string]shown // by phase
}

type shown struct {
	message string
	at      time.Time
	percent int64
}

// plainEvery is how often a phase that only counts gets a plain line.
const plainEvery = 5 * time.Second

func (a *app) newProgress() *progress {
	return &progress{w: a.Err, off: a.quiet, terminal: isTerminal(a.Err), last: map[string]shown{}}
}

func (p *progress) show(s api.Progress) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.off {
		return
	}
	text := boundedlog.Printable(s.Message)
	percent := int64(-1)
	if s.Total > 0 {
		percent = min(100, max(0, s.Done*100/s.Total))
	}
	if p.terminal && s.Phase != "note" {
		if percent >= 0 {
			text = fmt.Sprintf("%s  %d%%", text, percent)
		} else if s.Done > 0 {
			text = fmt.Sprintf("%s  %s", text, humanize.IBytes(uint64(s.Done)))
		}
		p.draw(text)
		return
	}
	was, known := p.last[s.Phase]
	now := time.Now()
	if known && was.message == text && (now.Sub(was.at) < plainEvery || was.percent == percent) {
		return
	}
	p.last[s.Phase] = shown{text, now, percent}
	if percent > 0 {
		text = fmt.Sprintf("%s  %d%%", text, percent)
	}
	p.erase()
	fmt.Fprintf(p.w, "pyro: %s\n", text)
}

// draw replaces the line on the terminal, cut to its width.
func (p *progress) draw(text string) {
	width := 80
	if f, ok := p.w.(*os.File); ok {
		if w, _, err := term.GetSize(int(f.Fd())); err == nil && w > 10 {
			width = w
		}
	}
	if r := []rune("pyro: " + text); len(r) >= width {
		text = string(r[:width-1])
	} else {
		text = string(r)
	}
	fmt.Fprintf(p.w, "\r\x1b[K%s", text)
	p.drawn = true
}

func (p *progress) erase() {
	if p.drawn {
		fmt.Fprint(p.w, "\r\x1b[K")
		p.drawn = false
	}
}

// clear takes the line off the terminal.
func (p *progress) clear() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.erase()
}

// before returns a writer that clears the line before anything else is written.
func (p *progress) before(w io.Writer) io.Writer {
	if !p.terminal {
		return w
	}
	return writerFunc(func(b []byte) (int, error) {
		p.clear()
		return w.Write(b)
	})
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
