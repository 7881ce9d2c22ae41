package statedir

import (
	"path/filepath"
	"strconv"
	"strings"
)

// Database is the state of all workspaces (SQLite). Two more files may lie
// beside it, with "-wal" and "-shm" behind its name: they are part of it.
func (d *Dir) Database() string { return filepath.Join(d.path, "state.db") }

// WorkspacesDir holds one directory for every workspace.
func (d *Dir) WorkspacesDir() string { return filepath.Join(d.path, "workspaces") }

// Ballast is a file that only takes room, to be given up where a full disk would
// keep even the database from being read.
func (d *Dir) Ballast() string { return filepath.Join(d.path, "ballast") }

// LayersDir holds the layers of workspaces' disks, one file or directory each.
func (d *Dir) LayersDir() string { return filepath.Join(d.path, "layers") }

// Layer is the path of the disk layer with that name.
func (d *Dir) Layer(name string) string { return filepath.Join(d.LayersDir(), name) }

// ProofFile remembers that an engine is proven to work with the image of that
// digest, "" for none.
func (d *Dir) ProofFile(engine, digest string) string {
	return filepath.Join(d.path, "proofs", engine+"-"+strings.TrimPrefix(digest, "sha256:")+".json")
}

// SecretsKey is the key with which this state directory's secrets are sealed.
func (d *Dir) SecretsKey() string { return filepath.Join(d.path, "secrets.key") }

// SeedsDir holds what workspaces were seeded with, by digest.
func (d *Dir) SeedsDir() string { return filepath.Join(d.path, "seeds") }

// Workspace names the directory of the workspace with that id.
func (d *Dir) Workspace(id string) Workspace {
	return Workspace(filepath.Join(d.WorkspacesDir(), id))
}

// Workspace is the path of one workspace's directory.
type Workspace string

// ID is the workspace's id.
func (w Workspace) ID() string { return filepath.Base(string(w)) }

// Path returns the directory itself.
func (w Workspace) Path() string { return string(w) }

// LockFile is locked by whoever changes the workspace.
func (w Workspace) LockFile() string { return filepath.Join(string(w), "lock") }

// RecordFile repeats the database's record of the workspace and its snapshots,
// so that the database can be made again from these files.
func (w Workspace) RecordFile() string { return filepath.Join(string(w), "workspace.json") }

// SecretsFile holds the workspace's secrets, sealed with the key in
// [Dir.SecretsKey].
func (w Workspace) SecretsFile() string { return filepath.Join(string(w), "secrets.sealed") }

// CommandsDir holds what the workspace's commands wrote.
func (w Workspace) CommandsDir() string { return filepath.Join(string(w), "commands") }

// Output is the file with what the command of that sequence number wrote to
// stream ("stdout", "stderr").
func (w Workspace) Output(sequence int64, stream string) string {
	return filepath.Join(w.CommandsDir(), strconv.FormatInt(sequence, 10)+"."+stream)
}
