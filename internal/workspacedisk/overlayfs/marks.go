// Package overlayfs knows the marks that the kernel's overlayfs leaves in the
// files of a layer, from the kernel's fs/overlayfs/overlayfs.h and
// Documentation/filesystems/overlayfs.rst.
package overlayfs

import (
	"strings"

	"github.com/pyro-mcp/pyro/api"
)

// The prefixes of the extended attributes that hold the marks: that of a mount
// by root, and that of one with the option userxattr.
const (
	Trusted = "trusted.overlay."
	User    = "user.overlay."
)

// The names behind the prefix. Those not named here (origin, nlink, uuid,
// protattr) change nothing that a reader of files sees, and Impure changes only
// the inode numbers that listing a directory gives.
const (
	Opaque   = "opaque"
	Redirect = "redirect"
	Whiteout = "whiteout"
	Metacopy = "metacopy"
	Impure   = "impure"
)

// The bounds on the path of a redirect: PATH_MAX and NAME_MAX.
const (
	maxPath = 4096
	maxName = 255
)

// Marks is what overlayfs noted about a directory of a layer.
type Marks struct {
	Opaque bool // nothing shows through
	// Redirect is where in the layers below to look: another name or, Absolute,
	// a path from the root. "" is under its own name.
	Redirect string
	Absolute bool
}

// DecodeMarks reads a directory's marks from the values of its attributes,
// redirect being nil where it has none. A redirect that no kernel writes, or with
// a name that no directory has, is ErrDamaged. The value "x" of opaque only tells
// the kernel to look for whiteouts that are files.
func DecodeMarks(opaque, redirect []byte) (Marks, error) {
	if string(opaque) == "y" {
		return Marks{Opaque: true}, nil
	}
	if redirect == nil {
		return Marks{}, nil
	}
	if len(redirect) > maxPath {
		return Marks{}, api.Errorf(api.ErrDamaged, "an overlay redirect has %d bytes, the limit is %d", len(redirect), maxPath)
	}
	path, absolute := strings.CutPrefix(string(redirect), "/")
	names := strings.Split(path, "/")
	for _, name := range names {
		if name == "" || name == "." || name == ".." || len(name) > maxName || strings.IndexByte(name, 0) >= 0 {
			return Marks{}, api.Errorf(api.ErrDamaged, "the overlay redirect %.200q has an impossible name in it", redirect)
		}
	}
	if !absolute && len(names) > 1 {
		return Marks{}, api.Errorf(api.ErrDamaged, "the overlay redirect %.200q is neither a name nor absolute", redirect)
	}
	return Marks{Redirect: string(redirect), Absolute: absolute}, nil
}
