package ext4image

import "github.com/pyro-mcp/pyro/api"

// Mode returns the file type and permissions of path, as in Entry.Mode, and
// whether it is there. Links in the parents are followed, a last one is not.
func (w *Writer) Mode(path string) (mode uint16, ok bool) {
	n := w.find(path)
	if n == nil {
		return 0, false
	}
	return n.mode, true
}

// Clear takes away everything in the directory at path, which stays as it is.
// A missing one is no error.
func (w *Writer) Clear(path string) error {
	n := w.find(path)
	if n == nil {
		return nil
	}
	if !n.isDir() {
		return api.Errorf(api.ErrInvalid, "%.200q is to be emptied and is no directory", path)
	}
	for _, name := range n.names() {
		if n.children[name] == w.lostFound {
			continue
		}
		if err := w.remove(n, name); err != nil {
			return err
		}
	}
	return nil
}
