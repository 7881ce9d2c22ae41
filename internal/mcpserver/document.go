package mcpserver

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
)

// Document writes what docs/mcp.md says about every profile, mode and tool: a
// table of each. A test holds the page to it.
func Document() (string, error) {
	var b strings.Builder
	all := profiles()
	b.WriteString("### Profiles and modes\n\n| name | what it is for | tools |\n|---|---|---|\n")
	for _, p := range all {
		names := "`" + strings.Join(p.tools, "`, `") + "`"
		if len(p.tools) == len(allTools) {
			names = fmt.Sprintf("all %d", len(allTools))
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", p.name, cell(p.purpose), names)
	}
	b.WriteString("\n### Tools\n")
	for i := range allTools {
		t := &allTools[i]
		fmt.Fprintf(&b, "\n#### `%s`\n\n%s\n\n", t.name, tidy(t.description))
		var in []string
		for _, p := range all {
			if slices.Contains(p.tools, t.name) {
				in = append(in, "`"+p.name+"`")
			}
		}
		fmt.Fprintf(&b, "%s. Offered by %s.\n", t.effectText(), strings.Join(in, ", "))
		if err := t.parameters(&b); err != nil {
			return "", err
		}
		if t.example != "" {
			fmt.Fprintf(&b, "\nExample: `%s`\n", t.example)
		}
	}
	return b.String(), nil
}

func (t *tool) effectText() string {
	text := map[effect]string{reads: "Changes nothing", changes: "Changes or adds, and loses nothing", destroys: "May lose something"}[t.effect]
	if t.idempotent {
		text += "; repeating it changes nothing more"
	}
	return text
}

func (t *tool) parameters(b *strings.Builder) error {
	s, err := inputSchema(t.in, nil)
	if err != nil {
		return fmt.Errorf("describing the parameters of %s: %w", t.name, err)
	}
	if len(s.PropertyOrder) == 0 {
		return nil
	}
	b.WriteString("\n| parameter | type | default | |\n|---|---|---|---|\n")
	for _, name := range s.PropertyOrder {
		p := s.Properties[name]
		byDefault := string(p.Default)
		switch {
		case name == "environment":
			byDefault = "`" + DefaultEnvironment + "`, or `--environment`"
		case slices.Contains(s.Required, name):
			byDefault = "required"
		case byDefault != "":
			byDefault = "`" + strings.Trim(byDefault, `"`) + "`"
		}
		what := p.Description
		if len(p.Enum) > 0 {
			what += ": " + strings.Trim(fmt.Sprint(p.Enum), "[]")
		}
		if slices.Contains(t.wide, name) {
			what += " (only `" + ProfileFull + "`)"
		}
		fmt.Fprintf(b, "| `%s` | %s | %s | %s |\n", name, p.Type, byDefault, cell(what))
	}
	results := t.resultFields()
	if len(results) > 0 {
		fmt.Fprintf(b, "\nReturns `%s`.\n", strings.Join(results, "`, `"))
	}
	return nil
}

func (t *tool) resultFields() []string {
	s, err := outputSchema(t.out)
	if err != nil || t.out.Kind() == reflect.Invalid {
		return nil
	}
	return s.PropertyOrder
}

func cell(text string) string {
	return strings.ReplaceAll(strings.ReplaceAll(text, "|", `\|`), "\n", " ")
}

// tidy leaves out of a description what only a server that runs can fill in.
func tidy(description string) string {
	var lines []string
	for l := range strings.Lines(description) {
		l = strings.TrimSpace(strings.NewReplacer("{project}", "", "{paths}", "", "{exports}", "").Replace(l))
		if l != "" {
			lines = append(lines, strings.Join(strings.Fields(l), " "))
		}
	}
	return strings.Join(lines, "\n")
}
