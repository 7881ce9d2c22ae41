package hosthelper

import (
	"bytes"
	"encoding/json"

	"github.com/tailscale/hujson"

	"github.com/pyro-mcp/pyro/api"
)

// readLenient returns a file's object, nil if there is no file. It reads what
// hosts do: JSON with comments and trailing commas too, which pyro never writes
// into.
func readLenient(file string) (map[string]any, error) {
	text, err := readBounded(file)
	if notExist(err) || (err == nil && len(bytes.TrimSpace(text)) == 0) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	plain, err := hujson.Standardize(text)
	if err != nil {
		return nil, api.Errorf(api.ErrDamaged, "%s is not JSON: %v", file, err)
	}
	var doc map[string]any
	if err := json.Unmarshal(plain, &doc); err != nil {
		return nil, api.Errorf(api.ErrDamaged, "%s is not a JSON object: %v", file, err)
	}
	return doc, nil
}
