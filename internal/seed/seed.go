// Package seed keeps what workspaces begin with: the copy of a directory, a Git
// checkout or a tar archive, made once, never changed, and named by its content.
//
// A seed is an ext4 image in which the files lie at upper/workspace, written
// without an unpacked copy or any privilege, and a manifest of them. The image
// can be a layer of a gVisor machine's disk as it is; for other guests the
// files are streamed out of it as a tar. The image is also what a diff compares
// a workspace with.
//
// Below the store's directory:
//
//	objects/HEX/seed.ext4    the files
//	objects/HEX/manifest     what they are (package manifest)
//	objects/HEX/seed.json    the record, written last
//	locks/HEX                shared by those who hold a seed
//	build/RANDOM/            what is being built
//	build/RANDOM.lock        held by its builder
//
// What is taken of a directory: files, directories (empty ones too) and links
// as they are, wherever these point; permission bits without set-id, and
// modification times; everything belongs to one user, mostly root. Hard links become copies.
// Devices, pipes, sockets and what cannot be read is left out and reported.
//
// A directory that is, or lies in, a Git checkout is taken without what Git
// ignores there (Source.IncludeIgnored takes that too). Directories that Git
// does not track because they are empty are taken. The top of a checkout
// brings its .git along, so that history and status are there in the guest;
// with it comes whatever a person has written into .git/config. A worktree's or
// submodule's .git file that leads out of the seed is replaced by the Git
// directory that it means. Repositories in a repository have rules of their
// own. Objects that a repository borrows from another one (alternates) are not
// copied. Without git on the host all is taken, and the report says so.
package seed

import (
	"os"

	"github.com/pyro-mcp/pyro/api"
)

// A Source says what to take.
type Source struct {
	// Path is a directory or a tar archive (plain, gzip or zstd, told apart by
	// content) on this host; "" is the empty source. Links in the path itself
	// are followed.
	Path string
	// IncludeIgnored also takes what a Git checkout ignores.
	IncludeIgnored bool
	// UID and GID are whom everything belongs to, as numbers of the guest.
	UID, GID uint32
}

// A Seed is an installed seed, checked and not to be removed until Close.
type Seed struct {
	// Digest is "sha256:" and hexadecimal digits. Equal trees, modification
	// times and owner included, have equal digests.
	Digest string
	// ImagePath is the raw ext4 image. It must not be written.
	ImagePath string
	// Info says what Build took. Get, which knows no source, leaves only
	// EntryCount and BytesWritten.
	Info api.WorkspaceSeed
	// Lock holds the seed. A child process that inherits it holds the seed
	// too, also after Close here.
	Lock *os.File

	dir string
}

// Close gives up this process's hold. Safe to call twice and on nil.
func (s *Seed) Close() error {
	if s == nil || s.Lock == nil {
		return nil
	}
	err := s.Lock.Close()
	s.Lock = nil
	return err
}
