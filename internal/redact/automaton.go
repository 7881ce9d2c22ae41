package redact

// The values are searched for all at once with the automaton of Aho and
// Corasick ("Efficient string matching", CACM 18(6), 1975): a tree of all
// beginnings of values, and from each the way to its longest end that is a
// beginning too. It looks at every byte once, whatever the values are, and its
// state says what a filter must hold back.

// A state is one beginning of a value; number 0 is the empty one.
type state struct {
	label          byte  // its last byte
	child, sibling int32 // its longer beginnings: the first, and the next of the same length; 0 for none
	fail           int32 // its longest proper end that is a beginning as well
	length         int32
	match          int32 // length of the longest value that ends here, or 0
	open           int32 // length if a further byte may lengthen it, or 0
}

// A span is the bytes [start, end) of a stream.
type span struct{ start, end int }

func (s *Set) add(value string) {
	if len(value) < MinLength {
		return
	}
	n := int32(0)
	for i := range len(value) {
		b := value[i]
		next := s.child(n, b)
		if next == 0 {
			next = int32(len(s.states))
			s.states = append(s.states, state{label: b, sibling: s.states[n].child, length: int32(i + 1)})
			s.states[n].child = next
			if n == 0 {
				s.root[b] = next
			}
		}
		n = next
	}
	s.states[n].match = int32(len(value))
	s.longest = max(s.longest, len(value))
}

// link fills in what depends on shorter states, shortest first.
func (s *Set) link() {
	queue := []int32{0}
	for len(queue) > 0 {
		n := queue[0]
		queue = queue[1:]
		st := &s.states[n]
		if n != 0 {
			st.match = max(st.match, s.states[st.fail].match)
			if st.child != 0 { // or else it is a whole value, and covered
				st.open = st.length
			}
		}
		for c := st.child; c != 0; c = s.states[c].sibling {
			if n != 0 {
				s.states[c].fail = s.step(st.fail, s.states[c].label)
			}
			queue = append(queue, c)
		}
	}
}

// child returns the state one byte longer than n, or 0.
func (s *Set) child(n int32, b byte) int32 {
	if n == 0 {
		return s.root[b]
	}
	c := s.states[n].child
	for c != 0 && s.states[c].label != b {
		c = s.states[c].sibling
	}
	return c
}

// step returns the state after byte b in state n.
func (s *Set) step(n int32, b byte) int32 {
	for {
		if c := s.child(n, b); c != 0 || n == 0 {
			return c
		}
		n = s.states[n].fail
	}
}

// scan reads b, the bytes of a stream from offset on, in state n. It returns
// the state after them, and spans with those added that values found now cover.
// Spans are in order, and none overlaps another.
func (s *Set) scan(n int32, offset int, b []byte, spans []span) (int32, []span) {
	for i, c := range b {
		if n == 0 {
			if n = s.root[c]; n == 0 {
				continue
			}
		} else {
			n = s.step(n, c)
		}
		if match := int(s.states[n].match); match != 0 {
			end := offset + i + 1
			start := end - match
			for len(spans) > 0 && spans[len(spans)-1].end > start {
				start = min(start, spans[len(spans)-1].start)
				spans = spans[:len(spans)-1]
			}
			spans = append(spans, span{start, end})
		}
	}
	return n, spans
}
