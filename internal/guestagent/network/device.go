package network

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/rtnetlink"
)

const (
	deviceName = "eth0"
	clonePath  = "/dev/net/tun"
)

// A Device is a running network device. It ends with Close.
type Device struct {
	f    *os.File
	raw  syscall.RawConn
	name string
	once sync.Once
	// headed says that each packet has a header in front, which saves summing
	// it up, see noSum.
	headed bool
}

// The header in front of packets, virtio 1.2 section 5.1.6: flags, and fields of
// offloads that are not asked for.
const (
	headerLen = 10
	dataValid = 2 // VIRTIO_NET_HDR_F_DATA_VALID
)

// noSum is the header of a packet whose checksum the kernel need not look at.
var noSum = []byte{headerLen - 1: 0, 0: dataValid}

// Open makes the device with its addresses and routes and names its resolvers.
// There is one at a time.
func Open(req guestproto.AttachNetwork) (*Device, error) {
	if err := req.Check(); err != nil {
		return nil, err
	}
	d, err := openTUN(deviceName)
	if err != nil {
		return nil, err
	}
	if err := d.configure(req); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

func openTUN(name string) (*Device, error) {
	fd, err := unix.Open(clonePath, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		if err = makeClone(); err == nil {
			fd, err = unix.Open(clonePath, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		}
	}
	if err != nil {
		return nil, api.Errorf(api.ErrUnsupported, "opening %s: %w", clonePath, err)
	}
	// Nothing is damaged between this kernel and the host's stack, so neither
	// sums up what it sends and gets: under emulation that is dear. gVisor's
	// device does not know of it. IFF_TUN_EXCL is not asked for, nor known there.
	d := &Device{name: name, headed: true}
	err = setInterface(fd, name, unix.IFF_TUN|unix.IFF_NO_PI|unix.IFF_VNET_HDR)
	if err == nil {
		_ = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM)
	} else {
		d.headed = false
		err = setInterface(fd, name, unix.IFF_TUN|unix.IFF_NO_PI)
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, api.Errorf(api.ErrUnsupported, "making the network device %s: %w", name, err)
	}
	// Only now: a device file without a device cannot be waited for.
	d.f = os.NewFile(uintptr(fd), clonePath)
	if d.raw, err = d.f.SyscallConn(); err != nil {
		d.Close()
		return nil, fmt.Errorf("making the network device %s: %w", name, err)
	}
	return d, nil
}

func setInterface(fd int, name string, flags uint16) error {
	req, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	req.SetUint16(flags)
	return unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
}

// makeClone makes the device file, which a sandbox's /dev may lack. Its number is
// from Linux's admin-guide/devices.txt.
func makeClone() error {
	if err := os.MkdirAll(filepath.Dir(clonePath), 0o755); err != nil {
		return err
	}
	return unix.Mknod(clonePath, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 200)))
}

func (d *Device) configure(req guestproto.AttachNetwork) error {
	device, err := net.InterfaceByName(d.name)
	if err != nil {
		return fmt.Errorf("looking for the network device: %w", err)
	}
	if err := rtnetlink.SetUp(device.Index, req.MTU); err != nil {
		return err
	}
	// A kernel may lack IPv6, or have it turned off; the guest then has IPv4
	// alone.
	for _, a := range req.Addresses {
		if err := rtnetlink.AddAddress(device.Index, a); err != nil && a.Addr().Is4() {
			return err
		}
	}
	for _, a := range req.Gateways {
		if err := rtnetlink.AddDefaultRoute(device.Index, a); err != nil && a.Is4() {
			return err
		}
	}
	return useResolvers(req.Resolvers)
}

// Name is the device's name.
func (d *Device) Name() string { return d.name }

// Send writes what the guest sends to w as frames, until the device or w fails.
func (d *Device) Send(w io.Writer) error {
	frames := guestproto.NewPacketWriter(w)
	var failed error
	err := d.raw.Read(func(fd uintptr) bool {
		for {
			n, err := d.read(int(fd), frames.Room())
			switch {
			case err == unix.EINTR:
				continue
			case err == unix.EAGAIN:
				// Nothing more is waiting, so those that wait with us go.
				failed = frames.Flush()
				return failed != nil
			case err != nil:
				failed = err
			case n > 0:
				failed = frames.Commit(n)
			}
			if failed != nil {
				return true
			}
		}
	})
	if err == nil {
		err = failed
	}
	return fmt.Errorf("reading the guest's packets: %w", err)
}

// read reads one packet without its header.
func (d *Device) read(fd int, packet []byte) (int, error) {
	if !d.headed {
		return unix.Read(fd, packet)
	}
	var header [headerLen]byte
	n, err := unix.Readv(fd, [][]byte{header[:], packet})
	return n - headerLen, err
}

// Receive gives the guest the packets of frames, until their end or the device's.
func (d *Device) Receive(frames *guestproto.FrameReader) error {
	for {
		kind, payload, err := frames.Next()
		if err != nil {
			return err
		}
		if kind != guestproto.FramePackets {
			return api.Errorf(api.ErrInvalid, "a frame of type %d came where packets belong", kind)
		}
		if err := guestproto.Packets(payload, d.write); err != nil {
			return err
		}
	}
}

// write gives the guest one packet. One that the kernel does not take is lost.
func (d *Device) write(packet []byte) error {
	var failed error
	err := d.raw.Control(func(fd uintptr) {
		for {
			if d.headed {
				_, failed = unix.Writev(int(fd), [][]byte{noSum, packet})
			} else {
				_, failed = unix.Write(int(fd), packet)
			}
			if failed != unix.EINTR {
				return
			}
		}
	})
	if err != nil {
		return err
	}
	if failed == unix.EBADFD || failed == unix.ENODEV {
		return failed
	}
	return nil
}

// Close removes the device, with its addresses and routes. Safe to call twice.
func (d *Device) Close() {
	d.once.Do(func() {
		if d.raw != nil {
			forgetResolvers()
		}
		_ = d.f.Close()
	})
}
