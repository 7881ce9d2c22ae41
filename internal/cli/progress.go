package cli

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/dustin/go-humanize"
	"golang.org/x/term"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/boundedlog"
)

// progress shows long work on stderr: one line that is rewritten on a terminal,
// plain lines elsewhere. Plain lines begin only when the work has taken a
// while: who runs a hundred commands does not want to hear of every guest that
// started in a second.
type progress struct {
	mu       sync.Mutex
	w        io.Writer
	off      bool
	terminal bool
	drawn    bool // a line stands on the terminal

	began   time.Time
	pending string           // the newest plain line that came too early
	timer   *time.Timer      // prints it
	last    map[string]shown // by phase
}

type shown struct {
	at      time.Time
	percent int64
}

const (
	// plainAfter is how long work must take to be worth a plain line.
	plainAfter = 4 * time.Second
	// plainEvery is how often a phase gets another plain line.
	plainEvery = 5 * time.Second
)

func (a *app) newProgress() *progress {
	return &progress{w: a.Err, off: a.quiet, terminal: isTerminal(a.Err), began: time.Now(), last: map[string]shown{}}
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
	if percent >= 0 {
		text = fmt.Sprintf("%s  %d%%", text, percent)
	}
	if s.Phase == "note" {
		p.plain(text)
		return
	}
	if early := plainAfter - time.Since(p.began); early > 0 {
		if p.pending = text; p.timer == nil {
			p.timer = time.AfterFunc(early, p.late)
		}
		return
	}
	was, known := p.last[s.Phase]
	now := time.Now()
	if known && (now.Sub(was.at) < plainEvery || was.percent == percent && percent >= 0) {
		return
	}
	p.last[s.Phase] = shown{now, percent}
	p.plain(text)
}

// late prints what was held back, now that the work does take a while.
func (p *progress) late() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pending != "" && !p.off {
		p.plain(p.pending)
	}
	p.pending = ""
}

func (p *progress) plain(text string) {
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

// clear takes the line off the terminal and forgets what was held back.
func (p *progress) clear() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pending = ""
	p.erase()
}

// before returns a writer that clears the line before anything else is written.
func (p *progress) before(w io.Writer) io.Writer {
	return writerFunc(func(b []byte) (int, error) {
		p.clear()
		return w.Write(b)
	})
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
