package network_test

import (
	"encoding/binary"
	"fmt"
	"io"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/dns/dnsmessage"

	"github.com/pyro-mcp/pyro/internal/network"
)

// public addresses that a host with a default route would send to, or none.
var (
	public = netip.MustParseAddr("93.184.216.34")
)

func question(t testing.TB, name string, kind dnsmessage.Type, edns bool) []byte {
	t.Helper()
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: 77, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: kind, Class: dnsmessage.ClassINET}},
	}
	if edns {
		m.Additionals = []dnsmessage.Resource{{Header: dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName("."), Type: dnsmessage.TypeOPT, Class: 1232}, Body: &dnsmessage.OPTResource{}}}
	}
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// ask sends a question over UDP and returns the answer.
func (g *guest) ask(t testing.TB, q []byte) dnsmessage.Message {
	t.Helper()
	c := g.datagrams(t, netip.AddrPortFrom(network.Gateway4, 53))
	if _, err := c.Write(q); err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
	buf := make([]byte, 1<<16)
	n, err := c.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	return unpack(t, buf[:n])
}

func unpack(t testing.TB, b []byte) dnsmessage.Message {
	t.Helper()
	var m dnsmessage.Message
	if err := m.Unpack(b); err != nil {
		t.Fatal(err)
	}
	if !m.Response || m.ID != 77 {
		t.Fatalf("the answer is %+v", m.Header)
	}
	return m
}

func answers(m dnsmessage.Message) (out []string) {
	for _, r := range m.Answers {
		switch b := r.Body.(type) {
		case *dnsmessage.AResource:
			out = append(out, netip.AddrFrom4(b.A).String())
		case *dnsmessage.AAAAResource:
			out = append(out, netip.AddrFrom16(b.AAAA).String())
		default:
			out = append(out, fmt.Sprintf("%T", b))
		}
	}
	return out
}

func TestNames(t *testing.T) {
	t.Parallel()
	if err := network.Check(public, nil); err != nil {
		t.Skipf("this host sends nothing to public addresses: %v", err)
	}
	var many []netip.Addr
	var manyText []string
	for i := range 32 {
		a := netip.AddrFrom4([4]byte{93, 184, 216, byte(i)})
		many, manyText = append(many, a), append(manyText, a.String())
	}
	g := newGuest(t, network.Config{Resolver: names{
		"one.test.":     {public},
		"rebound.test.": {netip.MustParseAddr("127.0.0.1"), public, netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("::ffff:10.0.0.1")},
		"inside.test.":  {netip.MustParseAddr("192.168.1.1")},
		"many.test.":    many,
		"six.test.":     {netip.MustParseAddr("fd00::1")},
	}})
	for _, test := range []struct {
		name, ask string
		kind      dnsmessage.Type
		edns      bool
		want      []string
		code      dnsmessage.RCode
		truncated bool
	}{
		{name: "One", ask: "one.test.", kind: dnsmessage.TypeA, want: []string{public.String()}},
		{name: "Letters", ask: "ONE.Test.", kind: dnsmessage.TypeA, want: []string{public.String()}},
		{name: "Rebound", ask: "rebound.test.", kind: dnsmessage.TypeA, want: []string{public.String()}},
		{name: "Inside", ask: "inside.test.", kind: dnsmessage.TypeA},
		{name: "OtherFamily", ask: "one.test.", kind: dnsmessage.TypeAAAA},
		{name: "OnlyOtherFamily", ask: "six.test.", kind: dnsmessage.TypeA},
		{name: "Unknown", ask: "unknown.test.", kind: dnsmessage.TypeA, code: dnsmessage.RCodeNameError},
		{name: "Broken", ask: "broken.test.", kind: dnsmessage.TypeA, code: dnsmessage.RCodeServerFailure},
		{name: "OtherType", ask: "one.test.", kind: dnsmessage.TypeMX},
		{name: "NoHostName", ask: "a b.test.", kind: dnsmessage.TypeA, code: dnsmessage.RCodeNameError},
		{name: "Address", ask: "2130706433.", kind: dnsmessage.TypeA, code: dnsmessage.RCodeNameError},
		{name: "Many", ask: "many.test.", kind: dnsmessage.TypeA, truncated: true},
		{name: "ManyWithEDNS", ask: "many.test.", kind: dnsmessage.TypeA, edns: true, want: manyText},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := g.ask(t, question(t, test.ask, test.kind, test.edns))
			if m.RCode != test.code || m.Truncated != test.truncated {
				t.Errorf("answers %v, truncated %v", m.RCode, m.Truncated)
			}
			if d := cmp.Diff(test.want, answers(m)); d != "" && !test.truncated {
				t.Error(d)
			}
		})
	}
	t.Run("TCP", func(t *testing.T) {
		c := g.mustDial(t, netip.AddrPortFrom(network.Gateway4, 53))
		for _, name := range []string{"many.test.", "one.test."} {
			q := question(t, name, dnsmessage.TypeA, false)
			if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(q))), q...)); err != nil {
				t.Fatal(err)
			}
			var size [2]byte
			if _, err := io.ReadFull(c, size[:]); err != nil {
				t.Fatal(err)
			}
			b := make([]byte, binary.BigEndian.Uint16(size[:]))
			if _, err := io.ReadFull(c, b); err != nil {
				t.Fatal(err)
			}
			if got := answers(unpack(t, b)); len(got) != map[string]int{"many.test.": 32, "one.test.": 1}[name] {
				t.Errorf("%s is %v", name, got)
			}
		}
	})
	t.Run("Garbage", func(t *testing.T) {
		c := g.datagrams(t, netip.AddrPortFrom(network.Gateway4, 53))
		for _, b := range [][]byte{{}, {1}, make([]byte, 12), make([]byte, 5000)} {
			_, _ = c.Write(b)
		}
		if got := answers(g.ask(t, question(t, "one.test.", dnsmessage.TypeA, false))); len(got) != 1 {
			t.Errorf("after garbage: %v", got)
		}
	})
	t.Run("OtherPorts", func(t *testing.T) {
		for _, port := range []uint16{1, 22, 80, 443, 853, 8080} {
			if _, err := g.dial(t.Context(), netip.AddrPortFrom(network.Gateway4, port)); err == nil {
				t.Errorf("the gateway answers on port %d", port)
			}
		}
	})
}
