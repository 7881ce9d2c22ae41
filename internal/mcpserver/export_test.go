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

// everything is a server with the full profile's parameters of some tools.
func everything(tools ...string) *Server {
	s := &Server{profile: profiles()[2], environment: DefaultEnvironment, log: slog.New(slog.DiscardHandler), project: &project{}}
	s.paths = &hostPaths{project: s.project}
	for _, tool := range tools {
		o, err := s.offer(findTool(tool), false)
		if err != nil {
			panic(err)
		}
		s.offered = append(s.offered, o)
	}
	return s
}

// Arguments checks a call's arguments as a server with every tool does.
func Arguments(tool string, raw []byte) ([]byte, error) {
	return everything(tool).offered[0].arguments(json.RawMessage(raw))
}

// ForModel is what a server with these tools makes of a hint.
func ForModel(hint string, tools ...string) string { return everything(tools...).forModel(hint) }

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
