package api

// Environment describes one entry of the catalog and its state on this host.
type Environment struct {
	Name                string   `json:"name"`
	Version             string   `json:"version"`
	Description         string   `json:"description"`
	Source              string   `json:"source"`
	Digest              string   `json:"digest"` // of the installed image, "" if none
	DefaultPackages     []string `json:"default_packages"`
	Distribution        string   `json:"distribution"`
	DistributionVersion string   `json:"distribution_version"`
	Platform            string   `json:"platform"`
	Installed           bool     `json:"installed"`
	SizeBytes           int64    `json:"size_bytes"` // space the image takes on the host's disk
	InstallDir          string   `json:"install_dir"`

	// Of environments that were pulled from an OCI image: the reference in
	// full, the digest of the image's manifest, and the image's settings.
	ImageReference string       `json:"image_reference,omitempty"`
	ImageDigest    string       `json:"image_digest,omitempty"`
	Config         *ImageConfig `json:"config,omitempty"`
}

// Progress is one step of long work. Phase is a short stable name; Message is
// for people. Done and Total are in bytes or items and zero where unknown.
type Progress struct {
	Phase   string `json:"phase"`
	Message string `json:"message"`
	Done    int64  `json:"done,omitempty"`
	Total   int64  `json:"total,omitempty"`
}

// PruneResult says what a prune removed.
type PruneResult struct {
	Removed    []string `json:"removed"`
	FreedBytes int64    `json:"freed_bytes"`
}
