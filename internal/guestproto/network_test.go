package guestproto_test

import (
	"bytes"
	"errors"
	"net/netip"
	"testing"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

func TestPacketWriter(t *testing.T) {
	var out bytes.Buffer
	w := guestproto.NewPacketWriter(&out)
	sizes := []int{1, 40, 1500, guestproto.MaxPacket, 60000, 5000, 1, guestproto.MaxPacket, 20}
	for i, n := range sizes {
		room := w.Room()
		if len(room) != guestproto.MaxPacket {
			t.Fatalf("there is room for %d bytes", len(room))
		}
		for j := range n {
			room[j] = byte(i + j)
		}
		if err := w.Commit(n); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range []int{0, -1, guestproto.MaxPacket + 1} {
		if err := w.Commit(n); !errors.Is(err, api.ErrInvalid) {
			t.Errorf("a packet of %d bytes: %v", n, err)
		}
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := w.Flush(); err != nil { // nothing to do
		t.Fatal(err)
	}
	frames := guestproto.NewFrameReader(&out)
	count, i := 0, 0
	for {
		kind, payload, err := frames.Next()
		if err != nil {
			break
		}
		count++
		if kind != guestproto.FramePackets {
			t.Errorf("a frame of type %d", kind)
		}
		if err := guestproto.Packets(payload, func(p []byte) error {
			if i >= len(sizes) || len(p) != sizes[i] {
				t.Fatalf("packet %d has %d bytes", i, len(p))
			}
			for j, b := range p {
				if b != byte(i+j) {
					t.Fatalf("packet %d differs at %d", i, j)
				}
			}
			i++
			return nil
		}); err != nil {
			t.Error(err)
		}
	}
	if i != len(sizes) || count >= len(sizes) {
		t.Errorf("%d packets came in %d frames", i, count)
	}
}

func TestPackets(t *testing.T) {
	for _, test := range []struct {
		name    string
		payload string
		packets int
		class   error
	}{
		{"None", "", 0, nil},
		{"One", "\x00\x01a", 1, nil},
		{"Two", "\x00\x01a\x00\x02bc", 2, nil},
		{"HalfLength", "\x00\x01a\x00", 1, api.ErrDamaged},
		{"Empty", "\x00\x00", 0, api.ErrDamaged},
		{"Long", "\x00\x01a\x00\x03bc", 1, api.ErrDamaged},
		{"Huge", "\xff\xffa", 0, api.ErrDamaged},
	} {
		t.Run(test.name, func(t *testing.T) {
			n := 0
			err := guestproto.Packets([]byte(test.payload), func([]byte) error { n++; return nil })
			if !errors.Is(err, test.class) || n != test.packets {
				t.Errorf("%d packets, %v", n, err)
			}
		})
	}
}

func TestAttachNetworkCheck(t *testing.T) {
	good := func() guestproto.AttachNetwork {
		return guestproto.AttachNetwork{MTU: 65520, Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.0.2/24")}, Gateways: []netip.Addr{netip.MustParseAddr("10.0.0.1")}}
	}
	for _, test := range []struct {
		name   string
		change func(*guestproto.AttachNetwork)
		ok     bool
	}{
		{"Good", func(*guestproto.AttachNetwork) {}, true},
		{"SmallMTU", func(a *guestproto.AttachNetwork) { a.MTU = 1279 }, false},
		{"LargeMTU", func(a *guestproto.AttachNetwork) { a.MTU = guestproto.MaxPacket + 1 }, false},
		{"NoAddress", func(a *guestproto.AttachNetwork) { a.Addresses = nil }, false},
		{"NoneAmongAddresses", func(a *guestproto.AttachNetwork) { a.Addresses = append(a.Addresses, netip.Prefix{}) }, false},
		{"NoneAmongGateways", func(a *guestproto.AttachNetwork) { a.Gateways = append(a.Gateways, netip.Addr{}) }, false},
		{"Zone", func(a *guestproto.AttachNetwork) { a.Resolvers = []netip.Addr{netip.MustParseAddr("fe80::1%eth0")} }, false},
		{"Many", func(a *guestproto.AttachNetwork) { a.Resolvers = make([]netip.Addr, 9) }, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			a := good()
			test.change(&a)
			if err := a.Check(); (err == nil) != test.ok || err != nil && !errors.Is(err, api.ErrInvalid) {
				t.Errorf("got %v", err)
			}
		})
	}
}

// FuzzPackets holds that packets lie within their frame and that what the writer
// makes of them is what was there.
func FuzzPackets(f *testing.F) {
	f.Add([]byte("\x00\x01a\x00\x02bc"))
	f.Add([]byte("\xff\xff"))
	f.Add(make([]byte, 70000))
	f.Fuzz(func(t *testing.T, payload []byte) {
		payload = payload[:min(len(payload), guestproto.MaxFrame)]
		var out bytes.Buffer
		w := guestproto.NewPacketWriter(&out)
		err := guestproto.Packets(payload, func(p []byte) error {
			if len(p) == 0 || len(p) > guestproto.MaxPacket || cap(p) != len(p) {
				t.Fatalf("a packet of %d bytes, capacity %d", len(p), cap(p))
			}
			return w.Commit(copy(w.Room(), p))
		})
		if err != nil && !errors.Is(err, api.ErrDamaged) {
			t.Fatal(err)
		}
		if err == nil && len(payload) > 0 {
			if err := w.Flush(); err != nil {
				t.Fatal(err)
			}
			_, again, err := guestproto.NewFrameReader(&out).Next()
			if err != nil || !bytes.Equal(again, payload) {
				t.Fatalf("%d bytes came back as %d, %v", len(payload), len(again), err)
			}
		}
	})
}
