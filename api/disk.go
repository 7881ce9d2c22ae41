package api

import (
	"encoding/base64"
	"strings"
)

// DiskEntry is one file, directory or symlink on a disk that was looked at
// without starting it. Special files (devices, pipes, sockets) have none.
type DiskEntry struct {
	ArtifactType string `json:"artifact_type"` // file, directory or symlink
	// LinkTarget is nil unless the entry is a symlink. A target that is not
	// UTF-8 appears here with replacement characters and in
	// LinkTargetBase64 as it is; the same holds for Path and PathBase64.
	LinkTarget       *string `json:"link_target"`
	LinkTargetBase64 string  `json:"link_target_base64,omitempty"`
	Path             string  `json:"path"` // absolute, inside the guest
	PathBase64       string  `json:"path_base64,omitempty"`
	// SizeBytes is 0 for a directory and the target's length for a symlink.
	SizeBytes int64 `json:"size_bytes"`
}

// NewDiskEntry makes an entry of a path and a link target of any bytes. The
// target counts for symlinks only.
func NewDiskEntry(path, artifactType string, size int64, target string) DiskEntry {
	e := DiskEntry{ArtifactType: artifactType, SizeBytes: size}
	e.Path, e.PathBase64 = asText(path)
	if artifactType == ArtifactSymlink {
		var text string
		text, e.LinkTargetBase64 = asText(target)
		e.LinkTarget = &text
	}
	return e
}

// asText returns bytes as text, and in base64 if that lost something.
func asText(s string) (text, encoded string) {
	text = strings.ToValidUTF8(s, "\uFFFD")
	if text != s {
		encoded = base64.StdEncoding.EncodeToString([]byte(s))
	}
	return text, encoded
}

// RawPath is the entry's path byte for byte, as other disk calls take it.
func (e DiskEntry) RawPath() (string, error) {
	if e.PathBase64 == "" {
		return e.Path, nil
	}
	raw, err := base64.StdEncoding.DecodeString(e.PathBase64)
	if err != nil {
		return "", Errorf(ErrInvalid, "decoding path_base64: %w", err)
	}
	return string(raw), nil
}

// The values of artifact_type.
const (
	ArtifactFile      = "file"
	ArtifactDirectory = "directory"
	ArtifactSymlink   = "symlink"
)

// DiskList is a listing, sorted by path, byte by byte.
type DiskList struct {
	Entries     []DiskEntry `json:"entries"`
	Path        string      `json:"path"`
	Recursive   bool        `json:"recursive"`
	WorkspaceID string      `json:"workspace_id,omitempty"`
}

// DiskRead is the beginning of one regular file.
type DiskRead struct {
	// Content holds the file's first bytes if they are UTF-8; else it is empty
	// and ContentBase64 holds them. A character that the bound would cut in
	// two is left out.
	Content       string `json:"content"`
	ContentBase64 string `json:"content_base64,omitempty"`
	MaxBytes      int64  `json:"max_bytes"`
	Path          string `json:"path"`
	SizeBytes     int64  `json:"size_bytes"` // of the whole file
	Truncated     bool   `json:"truncated"`
	WorkspaceID   string `json:"workspace_id,omitempty"`
}

// DiskExport says what an export wrote.
type DiskExport struct {
	BytesWritten int64  `json:"bytes_written"` // the image's size; it may be sparse
	DiskFormat   string `json:"disk_format"`   // "ext4"
	OutputPath   string `json:"output_path"`
	WorkspaceID  string `json:"workspace_id,omitempty"`
}

// DiskScrub says what a scrub took off a disk.
type DiskScrub struct {
	Path    string   `json:"path"`
	Removed []string `json:"removed"` // runtime paths that existed, sorted
}
