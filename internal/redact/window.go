package redact

import "bytes"

// Overlap returns how many bytes before a chunk [Set.Window] wants to see: one
// less than the longest value has.
func (s *Set) Overlap() int {
	if s.Empty() {
		return 0
	}
	return s.longest - 1
}

// Window redacts chunk, a piece out of the middle of a stream, and returns the
// clean form of its first used bytes; the next piece begins after these. Before
// is what comes before chunk, the last [Set.Overlap] bytes of it or more, or as
// much as there is.
//
// A value that begins in before and ends in chunk has a mark in clean for its
// part in chunk. Unless final, an end of chunk that may be the beginning of a
// value is left out: used is then less than len(chunk) by at most
// [Set.Overlap], and 0 if a shorter chunk is nothing else. Pieces read one after
// the other give together what [Set.String] gives for all, but for values that
// overlap, which may have a mark in each of two pieces.
//
// Nobody can recognise a value whose beginning is in neither: where a log has
// lost its beginning, the end of a value may remain.
func (s *Set) Window(before, chunk []byte, final bool) (clean []byte, used int) {
	if s.Empty() {
		return bytes.Clone(chunk), len(chunk)
	}
	state, spans := s.scan(0, 0, before, nil)
	state, spans = s.scan(state, len(before), chunk, spans)
	from, to := len(before), len(before)+len(chunk)
	if !final {
		to -= int(s.states[state].open)
	}
	if to <= from {
		return nil, 0
	}
	at := from
	clean = make([]byte, 0, to-from)
	for _, f := range spans {
		if f.end <= from {
			continue
		}
		if f.start >= to {
			break
		}
		if f.start > at {
			clean = append(clean, chunk[at-from:f.start-from]...)
		}
		clean = append(clean, Mark...)
		at = f.end
	}
	if at < to {
		clean = append(clean, chunk[at-from:to-from]...)
		at = to
	}
	return clean, at - from
}
