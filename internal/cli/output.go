package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"

	"golang.org/x/term"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/boundedlog"
)

// printJSON prints v as the one document of --json: two spaces of indent and
// sorted keys.
func (a *app) printJSON(v any) error {
	b, err := sortedJSON(v)
	if err != nil {
		return err
	}
	_, err = a.Out.Write(b)
	return err
}

// sortedJSON goes through a map, whose keys encoding/json sorts.
func sortedJSON(v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	var generic any
	dec := json.NewDecoder(strings.NewReader(string(b)))
	dec.UseNumber()
	if err := dec.Decode(&generic); err != nil {
		return nil, err
	}
	var out strings.Builder
	enc := json.NewEncoder(&out)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(generic); err != nil {
		return nil, err
	}
	return []byte(out.String()), nil
}

// printError prints err on stderr: one line, the hint on its own, or the JSON
// form. Error texts may quote the guest and are made printable.
func (a *app) printError(err error) {
	if a.json {
		b, jsonErr := sortedJSON(map[string]any{"error": map[string]string{
			"code": api.Code(err), "message": err.Error(), "hint": api.Hint(err),
		}})
		if jsonErr == nil {
			_, _ = a.Err.Write(b)
			return
		}
	}
	fmt.Fprintf(a.Err, "pyro: %s\n", printableLines(err.Error()))
	if hint := api.Hint(err); hint != "" {
		fmt.Fprintf(a.Err, "hint: %s\n", printableLines(hint))
	}
}

// printableLines makes a text of several lines printable.
func printableLines(text string) string {
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		lines[i] = boundedlog.Printable(line)
	}
	return strings.Join(lines, "\n")
}

// nameText is a path of the guest for people: as it is or, where that cannot be
// printed on one line, quoted with escapes. Two names never look the same.
func nameText(path string) string {
	if quoted := strconv.Quote(path); quoted[1:len(quoted)-1] != path {
		return quoted
	}
	return path
}

// table prints rows aligned, under an upper-case header.
func (a *app) table(header []string, rows [][]string) error {
	w := tabwriter.NewWriter(a.Out, 0, 8, 2, ' ', 0)
	for _, row := range append([][]string{header}, rows...) {
		for i, cell := range row {
			sep := "\t"
			if i == len(row)-1 {
				sep = "\n"
			}
			if _, err := io.WriteString(w, boundedlog.Printable(cell)+sep); err != nil {
				return err
			}
		}
	}
	return w.Flush()
}

// terminalWidth returns how many columns w has, 80 where it is no terminal.
func terminalWidth(w io.Writer) int {
	if f, ok := w.(*os.File); ok {
		if cols, _, err := term.GetSize(int(f.Fd())); err == nil && cols > 20 {
			return cols
		}
	}
	return 80
}
