package boot

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// late are the drivers whose devices are another machine's after the wait: the
// disk has another size and content, the vsock another address. So they are let
// go before it and probed afresh after.
var late = []string{"virtio_blk", "vmw_vsock_virtio_transport"}

const virtioBus = "/sys/bus/virtio"

// releaseDevices takes the late drivers' devices from them.
func releaseDevices() error {
	for _, driver := range late {
		devices, _ := filepath.Glob(filepath.Join(virtioBus, "drivers", driver, "virtio*"))
		for _, device := range devices {
			if err := writeSysfs(filepath.Join(virtioBus, "drivers", driver, "unbind"), filepath.Base(device)); err != nil {
				return fmt.Errorf("letting go of %s: %w", filepath.Base(device), err)
			}
		}
	}
	return nil
}

// probeDevices looks for a driver for every device that has none.
func probeDevices() error {
	devices, err := filepath.Glob(filepath.Join(virtioBus, "devices", "virtio*"))
	if err != nil {
		return err
	}
	for _, device := range devices {
		if _, err := os.Lstat(filepath.Join(device, "driver")); !errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := writeSysfs(filepath.Join(virtioBus, "drivers_probe"), filepath.Base(device)); err != nil {
			return fmt.Errorf("looking for a driver for %s: %w", filepath.Base(device), err)
		}
	}
	return nil
}

func writeSysfs(path, word string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(word)
	return errors.Join(err, f.Close())
}

// awaitHost says on the port that the guest waits and returns what the host
// answers, when it does: maybe days later, and in a copy of this machine. The
// next to write on the port is the guest, with [answer].
func awaitHost(port *os.File) (guestproto.Resume, error) {
	var r guestproto.Resume
	if _, err := io.WriteString(port, guestproto.WaitingLine); err != nil {
		return r, fmt.Errorf("telling the host that the guest waits: %w", err)
	}
	line, err := guestproto.ReadResumeLine(port, api.ErrInvalid)
	if err != nil {
		return r, fmt.Errorf("waiting for the host: %w", err)
	}
	if err := guestproto.Decode(line, &r, "action", "time_ns", "entropy"); err != nil {
		return r, fmt.Errorf("reading what the host says: %w", err)
	}
	if r.Action != guestproto.ActionResume {
		return r, api.Errorf(api.ErrInvalid, "the host says %q to a guest that waits for %q", r.Action, guestproto.ActionResume)
	}
	return r, r.Check()
}

// answer tells the host how the resume went.
func answer(port io.Writer, err error) error {
	var reply any = guestproto.ResumeReply{OK: true}
	if err != nil {
		w := api.ToWire(err)
		reply = guestproto.ErrorReply{Error: w.Message, Code: w.Code, Hint: w.Hint}
	}
	line, err := guestproto.Encode(reply)
	if err == nil {
		_, err = port.Write(line)
	}
	return err
}
