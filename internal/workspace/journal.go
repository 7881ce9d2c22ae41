package workspace

import (
	"errors"
	"io"
	"os"

	"github.com/pyro-mcp/pyro/internal/statedir"
)

// The streams of a command whose output the journal keeps.
const (
	streamStdout = "stdout"
	streamStderr = "stderr"
)

// A journalFile takes one output of one command. It comes to be with the first
// byte: most commands do not write to stderr. A nil journalFile takes nothing.
type journalFile struct {
	path string
	f    *os.File
	err  error
}

func newJournalFile(dir statedir.Workspace, sequence int64, stream string) *journalFile {
	return &journalFile{path: dir.Output(sequence, stream)}
}

func (j *journalFile) write(p []byte) {
	if j == nil || j.err != nil || len(p) == 0 {
		return
	}
	if j.f == nil {
		if j.f, j.err = os.OpenFile(j.path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600); j.err != nil {
			return
		}
	}
	_, j.err = j.f.Write(p)
}

func (j *journalFile) close() error {
	if j == nil || j.f == nil {
		return nil
	}
	return errors.Join(j.err, j.f.Close())
}

// readJournal returns what is kept of one output; "" if there was none.
func readJournal(dir statedir.Workspace, sequence int64, stream string) (string, error) {
	f, err := os.Open(dir.Output(sequence, stream))
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer f.Close()
	// Both halves and the mark between them, however it was cut off.
	b, err := io.ReadAll(io.LimitReader(f, 2*keptHalf+256))
	return validText(b), err
}
