#!/usr/bin/env bash
# Sets pyro up on a Debian or Ubuntu machine: the host packages, Go if there is
# none new enough, and the programs in bin/. With "test" it also runs all tests,
# the fast ones and those on real guests; with "clients" those with MCP clients
# from npm. It changes nothing outside this
# directory but the packages it installs and the caches of Go and pyro.
set -euo pipefail
cd "$(dirname "$0")"

say() { printf 'setup: %s\n' "$*" >&2; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

as_root() {
	if [ "$(id -u)" = 0 ]; then "$@"
	elif command -v sudo >/dev/null; then sudo "$@"
	else die "installing packages needs root: run this as root, or install sudo"
	fi
}

# qemu-system-x86 and qemu-utils run the guests, seabios boots them, mmdebstrap
# (with gpg and mount) builds their images from Debian's packages, checked against
# debian-archive-keyring; uidmap lets it do so without root; e2fsprogs finishes
# the file systems. gcc and libc6-dev are for the race detector.
packages=(qemu-system-x86 qemu-utils seabios mmdebstrap gpg mount uidmap debian-archive-keyring
	e2fsprogs ca-certificates make git gcc libc6-dev)

install_packages() {
	command -v apt-get >/dev/null ||
		die "this script knows Debian and Ubuntu; elsewhere install the equivalents of: ${packages[*]}, Go, then run make build"
	local missing=()
	for p in "$@"; do
		dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null | grep -qx installed || missing+=("$p")
	done
	[ ${#missing[@]} = 0 ] && return
	say "installing ${missing[*]}"
	as_root apt-get update -qq
	as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# go.mod names the Go version. From 1.21 on the go command fetches that version
# by itself; an older one can at least fetch the toolchain as the module that it
# is, and then that is used.
ensure_go() {
	for dir in /usr/local/go/bin "$HOME/go/bin" /usr/lib/go/bin; do
		command -v go >/dev/null && break
		[ -x "$dir/go" ] && PATH=$dir:$PATH
	done
	command -v go >/dev/null || install_packages golang-go
	local want have
	want=$(awk '$1 == "go" {print $2}' go.mod)
	have=$(cd / && GOTOOLCHAIN=local go env GOVERSION)
	have=${have#go}
	case $have in
	1.1[0-9]|1.1[0-9].*|1.20|1.20.*)
		local arch toolchain root
		arch=$(go env GOARCH)
		toolchain=golang.org/toolchain@v0.0.1-go$want.linux-$arch
		root=$(cd / && go env GOMODCACHE)/$toolchain
		if [ ! -x "$root/bin/go" ]; then
			say "fetching Go $want"
			local mod
			mod=$(mktemp -d)
			(cd "$mod" && go mod init setup >/dev/null 2>&1 && go mod download "$toolchain")
			rm -rf "$mod"
			# Go before 1.21 unpacks modules without execute permission.
			chmod -R u+w "$root"
			chmod +x "$root"/bin/* "$root"/pkg/tool/*/*
		fi
		PATH=$root/bin:$PATH
		;;
	esac
	export PATH
	say "Go: $(go version)"
}

build() {
	say "building bin/pyro and bin/pyro-agent"
	make --no-print-directory build
}

install_packages "${packages[@]}"
ensure_go
case ${1:-build} in
build)
	build
	say "done: try  bin/pyro run debian:12 -- git --version"
	;;
test)
	build
	install_packages busybox-static
	make --no-print-directory test test-guests
	;;
clients)
	# Other people's MCP clients come from npm; a registry that cannot be reached
	# is no fault of pyro's. Node.js from elsewhere brings its own npm, and
	# Debian's package npm does not go beside it.
	command -v node >/dev/null && command -v npm >/dev/null || install_packages npm
	if ! timeout 120 npm view @modelcontextprotocol/inspector version >/dev/null 2>&1; then
		say "the npm registry cannot be reached: the tests with other people's MCP clients are left out"
		exit 0
	fi
	build
	PYRO_TEST_REQUIRE=npm go test -count=1 -timeout 20m -run 'TestConformance|TestInspector' ./test/mcp
	;;
lint)
	make --no-print-directory lint
	;;
*)
	die "unknown argument $1: use nothing, test, clients or lint"
	;;
esac
