// Package rtnetlink speaks the few words of rtnetlink(7) that pyro needs: on the
// host to ask where an address leads, in a guest to set up its one device.
//
// It builds the messages itself because gVisor's rtnetlink refuses every message
// with an attribute that it does not know, and libraries send several of those.
package rtnetlink

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
)

// answerTimeout bounds the wait for the kernel, which answers within the call.
const answerTimeout = 5 // seconds

// RouteType returns how this host's kernel would deliver a packet to addr:
// unix.RTN_UNICAST for sending it out, unix.RTN_LOCAL for keeping it, among
// others, rtnetlink(7). An address that no route leads to is an error.
func RouteType(addr netip.Addr) (uint8, error) {
	addr = addr.Unmap()
	body := make([]byte, unix.SizeofRtMsg)
	body[0], body[1] = family(addr), uint8(addr.BitLen())
	reply, err := do(unix.RTM_GETROUTE, 0, attribute(body, unix.RTA_DST, addr.AsSlice()))
	if err != nil {
		return 0, fmt.Errorf("looking for the route to %s: %w", addr, err)
	}
	if len(reply) < unix.SizeofRtMsg {
		return 0, api.Errorf(api.ErrInternal, "looking for the route to %s: the kernel answers %d bytes", addr, len(reply))
	}
	return reply[7], nil // rtm_type
}

// SetUp starts the device with that index, with an MTU.
func SetUp(index, mtu int) error {
	body := make([]byte, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(body[4:], uint32(index))
	binary.NativeEndian.PutUint32(body[8:], unix.IFF_UP)  // ifi_flags
	binary.NativeEndian.PutUint32(body[12:], unix.IFF_UP) // ifi_change
	body = attribute(body, unix.IFLA_MTU, binary.NativeEndian.AppendUint32(nil, uint32(mtu)))
	if _, err := do(unix.RTM_NEWLINK, unix.NLM_F_ACK, body); err != nil {
		return fmt.Errorf("starting the device with an MTU of %d: %w", mtu, err)
	}
	return nil
}

// AddAddress gives the device an address, and with it a route to its network.
func AddAddress(index int, p netip.Prefix) error {
	body := make([]byte, unix.SizeofIfAddrmsg)
	body[0], body[1] = family(p.Addr()), uint8(p.Bits())
	if p.Addr().Is6() {
		body[2] = unix.IFA_F_NODAD // there is nobody else on the device
	}
	binary.NativeEndian.PutUint32(body[4:], uint32(index))
	body = attribute(body, unix.IFA_LOCAL, p.Addr().AsSlice())
	if _, err := do(unix.RTM_NEWADDR, unix.NLM_F_ACK|unix.NLM_F_CREATE|unix.NLM_F_REPLACE, body); err != nil {
		return fmt.Errorf("adding the address %s: %w", p, err)
	}
	return nil
}

// AddDefaultRoute sends everything else to the gateway on the device.
func AddDefaultRoute(index int, gateway netip.Addr) error {
	body := make([]byte, unix.SizeofRtMsg)
	body[0] = family(gateway)
	body[4] = unix.RT_TABLE_MAIN
	body[5] = unix.RTPROT_STATIC
	body[6] = unix.RT_SCOPE_UNIVERSE
	body[7] = unix.RTN_UNICAST
	body = attribute(body, unix.RTA_GATEWAY, gateway.AsSlice())
	body = attribute(body, unix.RTA_OIF, binary.NativeEndian.AppendUint32(nil, uint32(index)))
	if _, err := do(unix.RTM_NEWROUTE, unix.NLM_F_ACK|unix.NLM_F_CREATE|unix.NLM_F_REPLACE, body); err != nil {
		return fmt.Errorf("adding the route by %s: %w", gateway, err)
	}
	return nil
}

func family(addr netip.Addr) uint8 {
	if addr.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// attribute appends one, padded, rtnetlink(7).
func attribute(b []byte, kind uint16, value []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(unix.SizeofRtAttr+len(value)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, value...)
	for len(b)%unix.NLMSG_ALIGNTO != 0 {
		b = append(b, 0)
	}
	return b
}

// do sends one message and returns the body of the kernel's one answer, nil for
// an acknowledgement.
func do(kind uint16, flags uint16, body []byte) ([]byte, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("opening a netlink socket: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: answerTimeout}); err != nil {
		return nil, fmt.Errorf("bounding the wait for netlink: %w", err)
	}
	const sequence = 1
	msg := make([]byte, unix.SizeofNlMsghdr, unix.SizeofNlMsghdr+len(body))
	binary.NativeEndian.PutUint32(msg, uint32(unix.SizeofNlMsghdr+len(body)))
	binary.NativeEndian.PutUint16(msg[4:], kind)
	binary.NativeEndian.PutUint16(msg[6:], unix.NLM_F_REQUEST|flags)
	binary.NativeEndian.PutUint32(msg[8:], sequence)
	if err := unix.Sendto(fd, append(msg, body...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, fmt.Errorf("asking netlink: %w", err)
	}
	answer := make([]byte, 8<<10)
	var n int
	for {
		if n, _, err = unix.Recvfrom(fd, answer, 0); err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("reading netlink's answer: %w", err)
	}
	answer = answer[:n]
	if n < unix.SizeofNlMsghdr || binary.NativeEndian.Uint32(answer[8:]) != sequence {
		return nil, api.Errorf(api.ErrInternal, "netlink's answer of %d bytes belongs to no question", n)
	}
	length := int(binary.NativeEndian.Uint32(answer))
	if length < unix.SizeofNlMsghdr || length > n {
		return nil, api.Errorf(api.ErrInternal, "netlink's answer has %d bytes and says %d", n, length)
	}
	reply := answer[unix.SizeofNlMsghdr:length]
	if binary.NativeEndian.Uint16(answer[4:]) != unix.NLMSG_ERROR {
		return reply, nil
	}
	if len(reply) < 4 {
		return nil, api.Errorf(api.ErrInternal, "netlink's error has %d bytes", len(reply))
	}
	if code := int32(binary.NativeEndian.Uint32(reply)); code != 0 {
		return nil, unix.Errno(-code)
	}
	return nil, nil
}
