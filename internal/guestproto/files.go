package guestproto

import (
	"strings"

	"github.com/pyro-mcp/pyro/api"
)

// Messages of the file tools, since protocol version 2. Every path that a
// request names lies in the workspace, see [WorkspacePath].

// The limits of the file tools.
const (
	// MaxPath bounds a path and a link's target, and MaxName one part of a
	// path: Linux's PATH_MAX and NAME_MAX, limits.h.
	MaxPath = 4096
	MaxName = 255
	// MaxDepth bounds how many parts a relative path has.
	MaxDepth = 255
	// MaxFileEntries bounds the entries of a manifest, a listing, a sync and
	// the paths of an export.
	MaxFileEntries = 1_000_000
	// MaxEntryLine bounds one JSON line of a manifest or listing, newline
	// included: a path and a target in the worst JSON escaping of six bytes for
	// one, and an error.
	MaxEntryLine = 64 << 10
	// MaxExportList bounds the bytes of the list that export_files is sent.
	MaxExportList = 128 << 20
	// MaxDigestedFile bounds the file of which a manifest has the digest; a
	// larger one is an entry with an error.
	MaxDigestedFile = 16 << 30
)

// The types of entries, as the product's JSON names them.
const (
	TypeFile      = "file"
	TypeDirectory = "directory"
	TypeSymlink   = "symlink"
)

// FlushReply answers ActionFlush, which takes no parameters: what was written
// before is on the guest's disks.
type FlushReply struct{}

// ManifestRequest asks for every entry below a directory. The answer is
// FrameData with one ManifestEntry as JSON on each line, FrameDataEnd, and a
// ManifestResult. The entries are sorted by the bytes of the
// names within a directory, each directory right before its content.
type ManifestRequest struct {
	Envelope
	Path Path `json:"path,omitzero"` // default /workspace
}

// ManifestEntry is one file, directory or symbolic link.
type ManifestEntry struct {
	Path Path   `json:"path"` // relative to the directory asked for
	Type string `json:"type"`
	Mode uint32 `json:"mode"` // permission bits, at most 0777; of a symlink always 0777
	// Size is the number of digested bytes of a file and the length of a
	// symlink's target; 0 for a directory.
	Size int64 `json:"size"`
	// SHA256 is the digest of a file's first Size bytes as lower-case hex; ""
	// where Error is set.
	SHA256 string `json:"sha256,omitzero"`
	Target Path   `json:"target,omitzero"` // of a symlink
	// Error says why a file could not be read or a directory not be looked
	// into. Such a directory may lack entries.
	Error string `json:"error,omitzero"`
}

// ManifestResult ends a manifest.
type ManifestResult struct {
	EntryCount int64 `json:"entry_count"`
	ByteCount  int64 `json:"byte_count"` // digested
	// SkippedCount counts the devices, FIFOs, sockets and entries with a path
	// longer than MaxPath, which are left out, and ErrorCount the entries with
	// an Error.
	SkippedCount int64 `json:"skipped_count"`
	ErrorCount   int64 `json:"error_count"`
}

// ListFilesRequest asks for the entries of a directory, or below it, or for
// the one entry of a file or symlink. The answer is FrameData with one
// FileEntry as JSON on each line, sorted by the bytes of their paths,
// FrameDataEnd, and a ListFilesResult.
type ListFilesRequest struct {
	Envelope
	Path      Path `json:"path"`
	Recursive bool `json:"recursive,omitzero"`
}

// FileEntry is one entry of a listing.
type FileEntry struct {
	Path         Path   `json:"path"` // absolute
	ArtifactType string `json:"artifact_type"`
	// SizeBytes is 0 for a directory and the target's length for a symlink.
	SizeBytes  int64 `json:"size_bytes"`
	LinkTarget Path  `json:"link_target,omitzero"` // of a symlink
}

// ListFilesResult ends a listing.
type ListFilesResult struct {
	EntryCount   int64 `json:"entry_count"`
	SkippedCount int64 `json:"skipped_count"` // neither file, directory nor symlink
}

// ReadFileRequest asks for at most MaxBytes bytes of a regular file from
// Offset on. The answer is FrameHeader with a FileHeader, FrameData,
// FrameDataEnd, and a ReadFileReply. A link that stays in the workspace is
// followed.
type ReadFileRequest struct {
	Envelope
	Path     Path  `json:"path"`
	Offset   int64 `json:"offset,omitzero"`
	MaxBytes int64 `json:"max_bytes"`
}

// FileHeader comes before a file's content.
type FileHeader struct {
	Path      Path  `json:"path"` // absolute
	SizeBytes int64 `json:"size_bytes"`
}

// ReadFileReply ends a file's content.
type ReadFileReply struct {
	SizeBytes int64 `json:"size_bytes"` // of the whole file
	Truncated bool  `json:"truncated"`  // there is more behind what was sent
}

// WriteFileRequest asks for a file with the content that FrameData up to
// FrameDataEnd brings. It appears whole or not at all; its parents are made.
type WriteFileRequest struct {
	Envelope
	Path Path `json:"path"`
	// Mode is the permission bits of a new file, 0644 if zero; one that exists
	// keeps its own.
	Mode uint32 `json:"mode,omitzero"`
}

// WriteFileReply answers WriteFileRequest.
type WriteFileReply struct {
	Path         Path  `json:"path"` // absolute
	BytesWritten int64 `json:"bytes_written"`
	Created      bool  `json:"created"` // there was no such file before
}

// SyncRequest asks to unpack the tar or tar.gz that FrameData up to
// FrameDataEnd brings over Destination and to take the paths of Remove away,
// all of it or nothing. Directories merge; files and links replace files and
// links. A request line holds some ten thousand paths of Remove (MaxLine).
type SyncRequest struct {
	Envelope
	Destination Path `json:"destination"`
	// Remove are relative to Destination; of a directory all of it goes. What
	// is not there is passed over. Removing comes before unpacking.
	Remove []Path `json:"remove,omitzero"`
	// ReplaceKinds lets a file or link take the place of a directory with all
	// of its content, and a directory that of a file or link.
	ReplaceKinds bool `json:"replace_kinds,omitzero"`
}

// SyncReply answers SyncRequest. What it reports survives a crash of the guest.
type SyncReply struct {
	Destination  Path  `json:"destination"` // absolute
	EntryCount   int64 `json:"entry_count"`
	BytesWritten int64 `json:"bytes_written"`
	RemovedCount int64 `json:"removed_count"` // paths of Remove that were there
}

// ExportFilesRequest asks for a tar of some entries below Path. FrameData up
// to FrameDataEnd brings their paths relative to Path, each with a NUL behind
// it. The answer is the tar in FrameData, FrameDataEnd, and an
// ExportFilesReply. Links are kept as links; a directory is one entry without
// its content.
type ExportFilesRequest struct {
	Envelope
	Path Path `json:"path"`
}

// ExportFilesReply ends an export of files.
type ExportFilesReply struct {
	ArchiveSize  int64 `json:"archive_size"`
	EntryCount   int64 `json:"entry_count"`
	BytesWritten int64 `json:"bytes_written"`
	// MissingCount counts the paths that are not in the archive: there is
	// nothing, or neither a file, a directory nor a symlink, or it could not be
	// read.
	MissingCount int64 `json:"missing_count"`
}

// Check bounds an entry's fields by themselves; its place among the others is
// the reader's to check.
func (e *ManifestEntry) Check() error {
	if err := e.Path.checkRelative(); err != nil {
		return err
	}
	fits := false
	switch e.Type {
	case TypeFile:
		fits = e.Target == "" && (e.Error != "" && e.SHA256 == "" || e.Error == "" && isSHA256(e.SHA256))
	case TypeDirectory:
		fits = e.Target == "" && e.SHA256 == "" && e.Size == 0
	case TypeSymlink:
		fits = e.SHA256 == "" && (e.Target != "" || e.Error != "") && e.Size == int64(len(e.Target))
	}
	if !fits || e.Size < 0 {
		return api.Errorf(api.ErrDamaged, "the guest reports %q as a %q with a digest of %d characters, a target of %d bytes and %d bytes of content",
			cut(string(e.Path), 200), cut(e.Type, 40), len(e.SHA256), len(e.Target), e.Size)
	}
	e.Mode &= 0o777
	e.Error = cut(e.Error, 300)
	return nil
}

func isSHA256(s string) bool {
	return len(s) == 64 && strings.Trim(s, "0123456789abcdef") == ""
}

// Check bounds an entry of a listing of dir, which is absolute and clean.
func (e *FileEntry) Check(dir Path, recursive bool) error {
	if e.Path != dir {
		prefix := dir + "/"
		rel, below := strings.CutPrefix(string(e.Path), string(prefix))
		if !below {
			return api.Errorf(api.ErrDamaged, "the guest lists %q, which is not below %q", cut(string(e.Path), 200), cut(string(dir), 200))
		}
		if err := Path(rel).checkRelative(); err != nil {
			return err
		}
		if !recursive && strings.Contains(rel, "/") {
			return api.Errorf(api.ErrDamaged, "the guest lists %q, which is below a directory of %q", cut(string(e.Path), 200), cut(string(dir), 200))
		}
	}
	fits := false
	switch e.ArtifactType {
	case TypeFile:
		fits = e.LinkTarget == "" && e.SizeBytes >= 0
	case TypeDirectory:
		fits = e.LinkTarget == "" && e.SizeBytes == 0 && e.Path != dir
	case TypeSymlink:
		fits = e.LinkTarget != "" && e.SizeBytes == int64(len(e.LinkTarget))
	}
	if !fits {
		return api.Errorf(api.ErrDamaged, "the guest lists %q as a %q of %d bytes", cut(string(e.Path), 200), cut(e.ArtifactType, 40), e.SizeBytes)
	}
	return nil
}

// Check bounds what the guest claims about a sync.
func (r *SyncReply) Check() error {
	return claims("a sync", r.EntryCount, r.BytesWritten, r.RemovedCount)
}

// Check bounds what the guest claims about a file that it wrote.
func (r *WriteFileReply) Check() error { return claims("a written file", r.BytesWritten) }

// Check bounds what the guest claims about an export.
func (r *ExportFilesReply) Check() error {
	return claims("an export", r.ArchiveSize, r.EntryCount, r.BytesWritten, r.MissingCount)
}

// claims refuses negative counts.
func claims(what string, counts ...int64) error {
	for _, n := range counts {
		if n < 0 {
			return api.Errorf(api.ErrDamaged, "the guest reports %s with the counts %d", what, counts)
		}
	}
	return nil
}
