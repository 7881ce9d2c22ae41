package oci

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"sync"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
)

// A guard connects to one registry and to where that one sends its clients: for
// a token, or for a layer in some storage. The registry is who the user named,
// wherever it is. Where it redirects to is its own choice, and must not become
// a way to reach the services of this host and its network: a public registry
// leads to public addresses only, one in a private network to that network too,
// and none to this host or to the link, where clouds keep their credentials.
type guard struct {
	transport *http.Transport

	mu      sync.Mutex
	named   map[string]bool // HOST:PORT of the registry and of the user's proxies
	private bool            // the registry is in a private network, or here
}

var errForbiddenAddress = errors.New("the registry leads to an address that it has no business with")

func newGuard(registry name.Registry) *guard {
	g := &guard{named: map[string]bool{}}
	// The library tries both schemes where plain text is allowed.
	g.name(&url.URL{Scheme: "https", Host: registry.RegistryStr()})
	g.name(&url.URL{Scheme: registry.Scheme(), Host: registry.RegistryStr()})
	g.transport = &http.Transport{
		Proxy: func(req *http.Request) (*url.URL, error) {
			proxy, err := http.ProxyFromEnvironment(req)
			if proxy != nil {
				g.name(proxy)
			}
			return proxy, err
		},
		DialContext:            g.dial,
		ForceAttemptHTTP2:      true,
		MaxIdleConnsPerHost:    parallel + 1,
		IdleConnTimeout:        30 * time.Second,
		TLSHandshakeTimeout:    10 * time.Second,
		ResponseHeaderTimeout:  time.Minute,
		ExpectContinueTimeout:  time.Second,
		MaxResponseHeaderBytes: 64 << 10,
	}
	return g
}

// name adds what the user has named.
func (g *guard) name(u *url.URL) {
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443", "socks5": "1080", "socks5h": "1080"}[u.Scheme]
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.named[net.JoinHostPort(u.Hostname(), port)] = true
}

// dial connects to addr, unless what its name resolves to is forbidden.
func (g *guard) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	g.mu.Lock()
	named := g.named[addr]
	g.mu.Unlock()
	d := net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second, Control: func(_, resolved string, _ syscall.RawConn) error {
		to, err := netip.ParseAddrPort(resolved)
		if err != nil {
			return err
		}
		ip := to.Addr().Unmap()
		g.mu.Lock()
		defer g.mu.Unlock()
		if named {
			g.private = g.private || ip.IsPrivate() || ip.IsLoopback()
			return nil
		}
		if public(ip) || ip.IsPrivate() && g.private {
			return nil
		}
		return fmt.Errorf("%w: %s", errForbiddenAddress, ip)
	}}
	return d.DialContext(ctx, network, addr)
}

// notPublic are the networks that are not for everyone and that package netip
// has no word for: this network and shared addresses (RFC 6890), benchmarks (RFC
// 2544), the reserved rest, and IPv4 in the clothes of IPv6 (Teredo, RFC 4380,
// and 6to4, RFC 3056), which leads anywhere.
var notPublic = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("100.64.0.0/10"),
	netip.MustParsePrefix("192.0.0.0/24"),
	netip.MustParsePrefix("198.18.0.0/15"),
	netip.MustParsePrefix("240.0.0.0/4"),
	netip.MustParsePrefix("2001::/32"),
	netip.MustParsePrefix("2002::/16"),
}

// globalIPv6 is all of IPv6 that is given out (RFC 4291 section 2.4 and IANA's
// registry).
var globalIPv6 = netip.MustParsePrefix("2000::/3")

func public(ip netip.Addr) bool {
	if !ip.IsGlobalUnicast() || ip.IsPrivate() || ip.Is6() && !globalIPv6.Contains(ip) {
		return false
	}
	for _, p := range notPublic {
		if p.Contains(ip) {
			return false
		}
	}
	return true
}
