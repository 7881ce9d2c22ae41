package network

import (
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/rtnetlink"
)

// A refusal says why addresses are closed to guests.
type refusal struct {
	prefix netip.Prefix
	why    string
}

// metadataAddresses are those of cloud hosts' metadata services, some of which
// lie outside every range below.
var metadataAddresses = []netip.Addr{
	netip.MustParseAddr("169.254.169.254"),
	netip.MustParseAddr("169.254.170.2"),   // containers' credentials
	netip.MustParseAddr("100.100.100.200"), // within CGNAT's range
	netip.MustParseAddr("168.63.129.16"),   // a public address in all but name
	netip.MustParseAddr("192.0.0.192"),
	netip.MustParseAddr("fd00:ec2::254"),
}

// refusals are the ranges that are not the internet, after IANA's registries of
// special-purpose addresses (RFC 6890 and its updates).
var refusals = parseRefusals([][2]string{
	{"0.0.0.0/8", "it means this host"},
	{"10.0.0.0/8", "it is in a private network"},
	{"100.64.0.0/10", "it is in a provider's private network"},
	{"127.0.0.0/8", "it is a loopback address"},
	{"169.254.0.0/16", "it is link-local"},
	{"172.16.0.0/12", "it is in a private network"},
	{"192.0.0.0/24", "it is reserved"},
	{"192.0.2.0/24", "it is reserved for documentation"},
	{"192.88.99.0/24", "it leads into a tunnel"},
	{"192.168.0.0/16", "it is in a private network"},
	{"198.18.0.0/15", "it is reserved for benchmarks"},
	{"198.51.100.0/24", "it is reserved for documentation"},
	{"203.0.113.0/24", "it is reserved for documentation"},
	{"224.0.0.0/4", "it is a multicast address"},
	{"240.0.0.0/4", "it is reserved or a broadcast address"},
	{"2001::/23", "it is reserved or leads into a tunnel"},
	{"2001:db8::/32", "it is reserved for documentation"},
	{"2002::/16", "it leads into a tunnel"},
	{"3fff::/20", "it is reserved for documentation"},
	{"fc00::/7", "it is in a private network"},
	{"fe80::/10", "it is link-local"},
	{"ff00::/8", "it is a multicast address"},
})

// globalV6 is all of IPv6 that has been given out. What is outside it (loopback,
// IPv4 in other clothes, NAT64) is refused.
var globalV6 = netip.MustParsePrefix("2000::/3")

func parseRefusals(list [][2]string) []refusal {
	out := make([]refusal, len(list))
	for i, r := range list {
		out[i] = refusal{netip.MustParsePrefix(r[0]), r[1]}
	}
	return out
}

// check returns nil if a guest may reach addr, else ErrDenied with why. It asks
// the kernel, so the answer is of this moment. allow opens ranges to a test, but
// never the host's own addresses.
func check(addr netip.Addr, allow []netip.Prefix) error {
	if why := refuse(addr, allow); why != "" {
		return api.Errorf(api.ErrDenied, "the network policy refuses %s: %s", addr, why)
	}
	return nil
}

func refuse(addr netip.Addr, allow []netip.Prefix) string {
	if !addr.IsValid() || addr.Zone() != "" {
		return "it is no plain address"
	}
	// ::ffff:10.0.0.1 is 10.0.0.1 to the kernel, too.
	addr = addr.Unmap()
	if !slices.ContainsFunc(allow, func(p netip.Prefix) bool { return p.Contains(addr) }) {
		if why := refuseRange(addr); why != "" {
			return why
		}
	}
	// Only what the kernel would send out. That leaves nothing of this host's
	// own: addresses of its devices, whatever they are, ranges routed to itself
	// and the broadcast addresses of its networks.
	kind, err := rtnetlink.RouteType(addr)
	switch {
	case err != nil:
		return "no route leads there"
	case kind == unix.RTN_LOCAL:
		return "it is an address of this host"
	case kind == unix.RTN_BROADCAST:
		return "it is a broadcast address"
	case kind != unix.RTN_UNICAST:
		return "this host does not send there"
	}
	return ""
}

// refuseRange judges the address by itself.
func refuseRange(addr netip.Addr) string {
	if slices.Contains(metadataAddresses, addr) {
		return "it is a metadata service's"
	}
	for _, r := range refusals {
		if r.prefix.Contains(addr) {
			return r.why
		}
	}
	if addr.Is6() && !globalV6.Contains(addr) {
		return "it is no global address"
	}
	return ""
}
