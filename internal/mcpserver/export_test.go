package mcpserver

import (
	"encoding/json"
	"log/slog"
)

// What the fuzz targets reach into.
var (
	CleanOutput     = cleanOutput
	EscapeInvisible = escapeInvisible
	Invisible       = invisible
	PieceOf         = pieceOf
	// WithoutCredentials is tested by itself: a clone over https takes a network.
	WithoutCredentials = withoutCredentials
)

// Arguments checks a call's arguments as a server with every tool does.
func Arguments(tool string, raw []byte) ([]byte, error) {
	s := &Server{profile: profiles()[2], environment: DefaultEnvironment, log: slog.New(slog.DiscardHandler), project: &project{}}
	s.paths = &hostPaths{project: s.project}
	o, err := s.offer(findTool(tool), false)
	if err != nil {
		panic(err)
	}
	return o.arguments(json.RawMessage(raw))
}

// Cut puts text through a capture in pieces of n bytes.
func Cut(text []byte, n int) (out string, lines []string) {
	c := &capture{}
	for len(text) > 0 {
		k := min(max(n, 1), len(text))
		_, _ = c.Write(text[:k])
		text = text[k:]
	}
	return c.text(), c.lastLines()
}
