package mcpserver

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/google/jsonschema-go/jsonschema"
)

// inputSchema describes a struct of parameters, without the hidden ones.
func inputSchema(t reflect.Type, hidden []string) (*jsonschema.Schema, error) {
	s, err := jsonschema.ForType(t, &jsonschema.ForOptions{})
	if err != nil {
		return nil, err
	}
	for _, f := range reflect.VisibleFields(t) {
		if f.Anonymous {
			continue
		}
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		p := s.Properties[name]
		if p == nil {
			return nil, fmt.Errorf("field %s has no property", f.Name)
		}
		if err := bound(p, f.Tag); err != nil {
			return nil, fmt.Errorf("field %s: %w", f.Name, err)
		}
	}
	plain(s)
	drop := func(n string) bool { return slices.Contains(hidden, n) }
	for _, name := range hidden {
		delete(s.Properties, name)
	}
	s.PropertyOrder = slices.DeleteFunc(s.PropertyOrder, drop)
	s.Required = slices.DeleteFunc(s.Required, drop)
	return s, nil
}

// bound applies the tags of a parameter.
func bound(p *jsonschema.Schema, tag reflect.StructTag) error {
	if d, ok := tag.Lookup("default"); ok {
		p.Default = json.RawMessage(d)
		if p.Type == "string" {
			p.Default = mustJSON(d)
		}
	}
	for name, to := range map[string]**float64{"min": &p.Minimum, "max": &p.Maximum} {
		if v, ok := tag.Lookup(name); ok {
			n, err := strconv.ParseFloat(v, 64)
			if err != nil {
				return err
			}
			*to = &n
		}
	}
	if e, ok := tag.Lookup("enum"); ok {
		for _, v := range strings.Split(e, "|") {
			p.Enum = append(p.Enum, v)
		}
	}
	if n, ok := tag.Lookup("maxlen"); ok {
		length, err := strconv.Atoi(n)
		if err != nil {
			return err
		}
		p.MaxLength = &length
	}
	return nil
}

// plain leaves null out of the types of parameters: absent says it, and the
// schema is shorter.
func plain(s *jsonschema.Schema) {
	for _, p := range s.Properties {
		if len(p.Types) == 2 && p.Types[0] == "null" {
			p.Type, p.Types = p.Types[1], nil
		}
	}
}

// outputSchema describes a result. Fields may be added to results later, so it
// forbids none.
func outputSchema(t reflect.Type) (*jsonschema.Schema, error) {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	s, err := jsonschema.ForType(t, &jsonschema.ForOptions{})
	if err != nil {
		return nil, err
	}
	open(s)
	return s, nil
}

func open(s *jsonschema.Schema) {
	if s == nil {
		return
	}
	if s.Properties != nil {
		s.AdditionalProperties = nil
	}
	for _, p := range s.Properties {
		open(p)
	}
	open(s.Items)
	open(s.AdditionalProperties)
}

func mustJSON(s string) json.RawMessage {
	b, err := json.Marshal(s)
	if err != nil {
		panic(err) // a string always has JSON
	}
	return b
}

// encode writes a result as JSON in which nothing is invisible: characters that
// a reader cannot see, or that change the order of what it sees, are escaped. It
// is the same JSON value all the same.
func encode(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	return escapeInvisible(bytes.TrimSuffix(b.Bytes(), []byte("\n"))), nil
}
