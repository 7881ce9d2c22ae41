package guestkernel

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/pyro-mcp/pyro/api"
)

// needed are the modules that a guest needs: the bus, the disk, the channel,
// randomness, vsock, the TUN device of the network, and overlays for what runs
// inside. What a kernel has built in is no file and is passed over.
var needed = []string{
	"virtio_pci", "virtio_mmio", "virtio_blk", "virtio_console", "virtio_rng",
	"vmw_vsock_virtio_transport", "ext4", "tun", "overlay",
}

// maxModule bounds one module; the largest of a distribution have about 10 MB
// and none of those are needed.
const maxModule = 64 << 20

// moduleName is the name that a module's file stands for: the kernel takes
// dashes and underscores as the same. "" means it is no module.
func moduleName(path string) string {
	name := filepath.Base(path)
	for _, suffix := range []string{".gz", ".xz", ".zst"} {
		name = strings.TrimSuffix(name, suffix)
	}
	name, ok := strings.CutSuffix(name, ".ko")
	if !ok {
		return ""
	}
	return strings.ReplaceAll(name, "-", "_")
}

// readModule returns a module's content, decompressed.
func readModule(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, api.Errorf(api.ErrInvalid, "%s is not a regular file", path)
	}
	var r io.Reader = f
	if filepath.Ext(path) != ".ko" {
		if r, err = decompress(io.NewSectionReader(f, 0, fi.Size()), fi.Size()); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
	b, err := io.ReadAll(io.LimitReader(r, maxModule+1))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	if len(b) > maxModule {
		return nil, api.Errorf(api.ErrExhausted, "%s has more than %d bytes", path, maxModule)
	}
	return b, nil
}

// dependencies returns the names of the modules that have to be loaded before
// this one, as the module itself says in its .modinfo section. (modules.dep
// says the same, but is made by depmod when a package is installed and is not
// in it.)
func dependencies(module []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(module))
	if err != nil {
		return nil, api.Errorf(api.ErrDamaged, "reading a module: %w", err)
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, api.Errorf(api.ErrDamaged, "a module has no .modinfo section")
	}
	info, err := section.Data()
	if err != nil {
		return nil, api.Errorf(api.ErrDamaged, "reading a module: %w", err)
	}
	var out []string
	for _, entry := range strings.Split(string(info), "\x00") {
		list, ok := strings.CutPrefix(entry, "depends=")
		if !ok {
			continue
		}
		for _, name := range strings.Split(list, ",") {
			if name != "" {
				out = append(out, strings.ReplaceAll(name, "-", "_"))
			}
		}
	}
	return out, nil
}

// A module is one that goes into the guest.
type module struct {
	name    string
	content []byte
}

// closure returns the named modules and all that they need, in load order.
// files finds a module's file by its name; what is not there counts as built
// in.
func closure(files map[string]string, names []string) ([]module, error) {
	var out []module
	const (
		visiting = 1
		done     = 2
	)
	state := map[string]int{}
	var visit func(name string) error
	visit = func(name string) error {
		path, ok := files[name]
		switch {
		case !ok || state[name] == done:
			return nil
		case state[name] == visiting:
			return api.Errorf(api.ErrDamaged, "module %s needs itself", name)
		}
		state[name] = visiting
		content, err := readModule(path)
		if err != nil {
			return err
		}
		deps, err := dependencies(content)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		for _, dep := range deps {
			if err := visit(dep); err != nil {
				return err
			}
		}
		state[name] = done
		out = append(out, module{name, content})
		return nil
	}
	for _, name := range names {
		if err := visit(name); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// findModules maps the names of all modules below dir to their files.
func findModules(dir string) (map[string]string, error) {
	files := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		// Links such as "build" lead to the kernel's source, not to modules.
		if name := moduleName(path); name != "" && d.Type().IsRegular() {
			files[name] = path
		}
		return nil
	})
	return files, err
}

// writeModules puts the modules and their order into an artifact.
func writeModules(out string, modules []module) error {
	order := ""
	for i, m := range modules {
		name := fmt.Sprintf("%02d-%s.ko", i, m.name)
		if err := os.WriteFile(filepath.Join(out, name), m.content, 0o600); err != nil {
			return err
		}
		order += name + "\n"
	}
	return os.WriteFile(filepath.Join(out, orderFile), []byte(order), 0o600)
}
