package redact

import "io"

// pieceSize is how much of one Write is looked at at a time: what io.Copy
// hands over at once.
const pieceSize = 32 << 10

// A Writer redacts a stream. It passes on at once what it is given, but for an
// end that may be the beginning of a value: that waits for the next Write or
// for [Writer.Flush]. It keeps 64 KiB and a few times the longest value in
// memory. Its methods must not be called concurrently.
type Writer struct {
	set    *Set
	w      io.Writer
	err    error  // of w; nothing is written after it
	state  int32  // of set, after all that came
	held   []byte // what came and is neither passed on nor replaced
	base   int    // offset of held in the stream
	spans  []span // found, and not replaced yet
	output []byte // memory to use again
}

// Writer returns a filter in front of w. The caller flushes it at the end;
// there is nothing to close.
func (s *Set) Writer(w io.Writer) *Writer { return &Writer{set: s, w: w} }

// Write takes all of p, or returns the error of the writer behind, now and ever
// after. It returns when that writer has what can be passed on.
func (w *Writer) Write(p []byte) (int, error) {
	if w.err != nil {
		return 0, w.err
	}
	if w.set.Empty() {
		n, err := w.w.Write(p)
		w.err = err
		return n, err
	}
	for taken := 0; taken < len(p); {
		piece := p[taken:min(taken+pieceSize, len(p))]
		w.state, w.spans = w.set.scan(w.state, w.base+len(w.held), piece, w.spans)
		w.held = append(w.held, piece...)
		if err := w.pass(w.base + len(w.held) - int(w.set.states[w.state].open)); err != nil {
			return taken, err
		}
		taken += len(piece)
	}
	return len(p), nil
}

// Flush passes on what is held back, because the stream ends, or pauses where a
// person waits for what may be the beginning of a value. If it is one, its rest
// is no longer recognised: a second Flush without a Write does nothing.
func (w *Writer) Flush() error {
	if w.err != nil || w.set.Empty() {
		return w.err
	}
	w.state = 0
	return w.pass(w.base + len(w.held))
}

// pass writes everything below the offset frontier, before which no value can
// begin any more that is not found. A value that begins at the frontier or
// before it is replaced as a whole at once: whatever comes, none of its bytes
// will be shown.
func (w *Writer) pass(frontier int) error {
	at, done := w.base, 0
	out := w.output[:0]
	for _, f := range w.spans {
		if f.start > frontier {
			break
		}
		done++
		if f.start >= at {
			out = append(out, w.held[at-w.base:f.start-w.base]...)
			out = append(out, Mark...)
		} // else it overlaps one replaced earlier, whose mark stands for both
		at = max(at, f.end)
	}
	if at < frontier {
		out = append(out, w.held[at-w.base:frontier-w.base]...)
		at = frontier
	}
	w.spans = append(w.spans[:0], w.spans[done:]...)
	w.held = append(w.held[:0], w.held[at-w.base:]...)
	w.base, w.output = at, out
	if len(out) == 0 {
		return nil
	}
	_, w.err = w.w.Write(out)
	return w.err
}
