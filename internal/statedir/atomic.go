package statedir

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// WriteJSON replaces path by the JSON of v in one step: a reader, also one
// after a crash, sees the old content or the new. The file has mode 0600.
func WriteJSON(path string, v any) error {
	return writeLastingJSON(path, v, temporary)
}

func writeLastingJSON(path string, v any, create func(path string) (*os.File, error)) error {
	if err := writeJSON(path, v, create, (*os.File).Sync); err != nil {
		return err
	}
	if err := SyncDir(filepath.Dir(path)); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}

// Reserve takes size bytes of the disk for a later [WriteReservedJSON] to path,
// in a file beside it.
func Reserve(path string, size int) error {
	return os.WriteFile(spare(path), make([]byte, size), 0o600)
}

// WriteReservedJSON is [WriteJSON] in the room that [Reserve] took, so that it
// succeeds on a full disk, too. What is longer needs more, and so does all of it
// if nothing was reserved.
func WriteReservedJSON(path string, v any) error {
	return writeLastingJSON(path, v, func(path string) (*os.File, error) {
		f, err := os.OpenFile(spare(path), os.O_WRONLY, 0)
		if errors.Is(err, fs.ErrNotExist) {
			return temporary(path)
		}
		return f, err
	})
}

func spare(path string) string { return path + ".spare" }

// WriteVolatileJSON is WriteJSON for what means nothing any more once the host
// has crashed: then path may hold anything. It does not wait for the disk.
func WriteVolatileJSON(path string, v any) error {
	return writeJSON(path, v, temporary, func(*os.File) error { return nil })
}

// temporary makes a file that is to take the place of path.
func temporary(path string) (*os.File, error) {
	return os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
}

func writeJSON(path string, v any, create func(path string) (*os.File, error), sync func(*os.File) error) (err error) {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	b = append(b, '\n')
	f, err := create(path)
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
			err = fmt.Errorf("writing %s: %w", path, err)
		}
	}()
	if _, err := f.Write(b); err != nil {
		return err
	}
	if err := f.Truncate(int64(len(b))); err != nil {
		return err
	}
	if err := sync(f); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// SyncDir puts the names in a directory on the disk, as a rename needs to last.
func SyncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// ReadJSON decodes the file at path into v.
func ReadJSON(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("reading %s: %w", path, err)
	}
	return nil
}
