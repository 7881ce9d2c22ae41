package network_test

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/network"
)

func TestRefuseRange(t *testing.T) {
	for _, test := range []struct{ name, addr, why string }{
		{"Zero", "0.0.0.0", "this host"},
		{"ZeroNetwork", "0.1.2.3", "this host"},
		{"Ten", "10.255.255.255", "private"},
		{"CGNAT", "100.64.0.1", "private"},
		{"AboveCGNAT", "100.128.0.1", ""},
		{"Loopback", "127.0.0.1", "loopback"},
		{"LoopbackElsewhere", "127.1.2.3", "loopback"},
		{"LinkLocal", "169.254.0.1", "link-local"},
		{"Metadata", "169.254.169.254", "metadata"},
		{"TaskMetadata", "169.254.170.2", "metadata"},
		{"MetadataInCGNAT", "100.100.100.200", "metadata"},
		{"MetadataInPublic", "168.63.129.16", "metadata"},
		{"BesideMetadataInPublic", "168.63.129.17", ""},
		{"Metadata6", "fd00:ec2::254", "metadata"},
		{"OneSevenTwo", "172.31.255.255", "private"},
		{"AboveOneSevenTwo", "172.32.0.1", ""},
		{"OneNineTwo", "192.168.0.1", "private"},
		{"Benchmark", "198.19.255.255", "benchmarks"},
		{"Multicast", "224.0.0.251", "multicast"},
		{"Reserved", "240.0.0.1", "reserved"},
		{"Broadcast", "255.255.255.255", "broadcast"},
		{"Public", "93.184.216.34", ""},
		{"Public6", "2606:2800:220:1::1", ""},
		{"Loopback6", "::1", "no global"},
		{"Unspecified6", "::", "no global"},
		{"Compatible", "::169.254.169.254", "no global"},
		{"CompatiblePublic", "::93.184.216.34", "no global"},
		{"NAT64", "64:ff9b::a9fe:a9fe", "no global"},
		{"NAT64Local", "64:ff9b:1::a00:1", "no global"},
		{"Discard", "100::1", "no global"},
		{"SixToFour", "2002:a9fe:a9fe::1", "tunnel"},
		{"Teredo", "2001:0:a9fe:a9fe::1", "tunnel"},
		{"Documentation6", "2001:db8::1", "documentation"},
		{"Private6", "fc00::1", "private"},
		{"LinkLocal6", "fe80::1", "link-local"},
		{"SiteLocal6", "fec0::1", "no global"},
		{"Multicast6", "ff02::1", "multicast"},
		{"SRv6", "5f00::1", "no global"},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := network.RefuseRange(netip.MustParseAddr(test.addr))
			if (got == "") != (test.why == "") || !strings.Contains(got, test.why) {
				t.Errorf("%s is refused because %q, want %q", test.addr, got, test.why)
			}
		})
	}
}

func TestCheck(t *testing.T) {
	all := []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
	refused := func(t *testing.T, a netip.Addr, allow []netip.Prefix) {
		t.Helper()
		if err := network.Check(a, allow); !errors.Is(err, api.ErrDenied) {
			t.Errorf("%s: %v", a, err)
		}
	}
	t.Run("Mapped", func(t *testing.T) {
		for _, s := range []string{"::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:10.0.0.1", "::ffff:168.63.129.16"} {
			refused(t, netip.MustParseAddr(s), nil)
		}
	})
	t.Run("Zone", func(t *testing.T) { refused(t, netip.MustParseAddr("fe80::1%lo"), all) })
	t.Run("None", func(t *testing.T) { refused(t, netip.Addr{}, all) })
	// What belongs to the host stays closed whatever is opened for a test.
	t.Run("Loopback", func(t *testing.T) {
		for _, s := range []string{"127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"} {
			refused(t, netip.MustParseAddr(s), all)
		}
	})
	t.Run("OwnAddresses", func(t *testing.T) {
		addrs, err := net.InterfaceAddrs()
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range addrs {
			p, err := netip.ParsePrefix(a.String())
			if err != nil {
				t.Fatal(err)
			}
			refused(t, p.Addr(), all)
		}
	})
}

func TestHostName(t *testing.T) {
	for _, test := range []struct {
		name, in, want string
		ok             bool
	}{
		{"Plain", "Example.COM.", "example.com", true},
		{"Underscore", "_dmarc.example.com", "_dmarc.example.com", true},
		{"DigitsFirst", "3com.example", "3com.example", true},
		{"Empty", "", "", false},
		{"Root", ".", "", false},
		{"EmptyLabel", "a..b", "", false},
		{"Null", "a\x00.example.com", "", false},
		{"Space", "a b.example", "", false},
		{"Slash", "a/b.example", "", false},
		{"At", "a@b.example", "", false},
		{"LongLabel", strings.Repeat("a", 64) + ".example", "", false},
		{"Long", strings.Repeat("a.", 130) + "example", "", false},
		{"Address", "127.0.0.1", "", false},
		{"Number", "2130706433", "", false},
		{"Hex", "0x7f000001", "", false},
		{"ShortHex", "0xA9.0xFE.0xA9.0xFE", "", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, ok := network.HostName(test.in)
			if ok != test.ok || got != test.want {
				t.Errorf("%q is %q, %v", test.in, got, ok)
			}
		})
	}
}
