package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// portName is the name that the host gives the guest's channel.
const portName = "agent"

// OpenPort finds the virtio-serial port named "agent" by sysfs and opens it,
// waiting a little for its driver. It can be open once only: a second open is
// refused until the first is really closed.
func OpenPort() (*os.File, error) {
	deadline := time.Now().Add(10 * time.Second)
	for {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, file := range names {
			data, err := os.ReadFile(file)
			if err != nil || strings.TrimSpace(string(data)) != portName {
				continue
			}
			dev := "/dev/" + filepath.Base(filepath.Dir(file))
			f, err := os.OpenFile(dev, os.O_RDWR|unix.O_NONBLOCK, 0)
			if err == nil {
				return f, nil
			}
			if !errors.Is(err, os.ErrNotExist) {
				return nil, fmt.Errorf("opening the virtio port %q: %w", portName, err)
			}
		}
		if len(names) == 0 || time.Now().After(deadline) {
			return nil, fmt.Errorf("there is no virtio port named %q", portName)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
