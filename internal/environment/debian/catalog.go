package debian

// A Recipe is one curated environment.
type Recipe struct {
	Name        string
	Version     string // of the recipe: a change makes installed ones stale
	Description string
	Suite       string // Debian's code name
	Release     string // Debian's number
	Packages    []string
	DiskMiB     int
	// NeedBytes is the room that a build takes at most: the packages, their
	// unpacked files and the image.
	NeedBytes int64
}

// recipeVersion is counted up whenever what a recipe makes changes other than
// by its package list.
const recipeVersion = "1"

// diskMiB is the size of every environment's disk. The image is sparse: unused
// room costs nothing on the host.
const diskMiB = 8192

var basePackages = []string{
	"ca-certificates", "less", "procps", "iproute2",
}

var defaultPackages = append([]string{
	"bzip2", "curl", "diffutils", "file", "git", "htop", "jq", "lsof", "mount", "nano", "netcat-openbsd", "openssh-client",
	"patch", "psmisc", "python3", "ripgrep", "rsync", "sqlite3", "tmux", "tree", "unzip", "vim-tiny", "wget",
	"xz-utils", "zip",
}, basePackages...)

var buildPackages = append([]string{
	"autoconf", "automake", "bison", "cmake", "flex", "g++", "gcc", "gdb", "libc6-dev", "libffi-dev",
	"libssl-dev", "libtool", "make", "ninja-build", "nodejs", "npm", "pkg-config", "python-is-python3",
	"python3-dev", "python3-pip", "python3-venv", "strace", "zlib1g-dev",
}, defaultPackages...)

// Catalog is every curated environment, by name.
var Catalog = []Recipe{
	{
		Name:        "debian:12",
		Version:     recipeVersion,
		Description: "Debian 12 with Git, Python 3, curl, ripgrep and what an agent reaches for",
		Suite:       "bookworm", Release: "12",
		Packages: defaultPackages, DiskMiB: diskMiB, NeedBytes: 2 << 30,
	},
	{
		Name:        "debian:12-base",
		Version:     recipeVersion,
		Description: "Debian 12 with a shell and the core tools",
		Suite:       "bookworm", Release: "12",
		Packages: basePackages, DiskMiB: diskMiB, NeedBytes: 1 << 30,
	},
	{
		Name:        "debian:12-build",
		Version:     recipeVersion,
		Description: "Debian 12 with compilers, make, CMake, Python with pip and venv, and Node.js with npm",
		Suite:       "bookworm", Release: "12",
		Packages: buildPackages, DiskMiB: diskMiB, NeedBytes: 5 << 30,
	},
}
