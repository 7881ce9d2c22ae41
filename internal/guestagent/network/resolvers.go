package network

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// The resolver's file lies in memory and is mounted over the one of the disk,
// so that a snapshot, or a later start without a network, finds the latter
// unchanged.
const (
	resolvConf = "/etc/resolv.conf"
	ourConf    = "/run/pyro/resolv.conf"
)

// useResolvers makes the guest ask these name servers.
func useResolvers(resolvers []netip.Addr) error {
	if len(resolvers) == 0 {
		return nil
	}
	var b strings.Builder
	for _, r := range resolvers {
		fmt.Fprintf(&b, "nameserver %s\n", r)
	}
	if err := os.MkdirAll(filepath.Dir(ourConf), 0o755); err != nil {
		return fmt.Errorf("naming the resolvers: %w", err)
	}
	if err := os.WriteFile(ourConf, []byte(b.String()), 0o644); err != nil {
		return fmt.Errorf("naming the resolvers: %w", err)
	}
	if mounted() {
		return nil
	}
	// A link is followed by mount(2); one that leads nowhere gives way. The
	// boot has seen to it that there is a file, so this is rarely needed.
	if _, err := os.Stat(resolvConf); err != nil {
		_ = os.Remove(resolvConf)
		if err := os.WriteFile(resolvConf, nil, 0o644); err != nil {
			return fmt.Errorf("naming the resolvers: %w", err)
		}
	}
	if err := unix.Mount(ourConf, resolvConf, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mounting %s: %w", resolvConf, err)
	}
	return nil
}

// forgetResolvers uncovers the disk's file.
func forgetResolvers() {
	if mounted() {
		_ = unix.Unmount(resolvConf, unix.MNT_DETACH)
	}
}

func mounted() bool {
	a, err := os.Stat(ourConf)
	if err != nil {
		return false
	}
	b, err := os.Stat(resolvConf)
	return err == nil && os.SameFile(a, b)
}
