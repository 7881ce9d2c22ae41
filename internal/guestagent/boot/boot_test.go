package boot

import (
	"encoding/binary"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseCmdline(t *testing.T) {
	got := parseCmdline("console=ttyS0 quiet pyro.root=/dev/vdb pyro.hostname=a pyro.root=/dev/vda x=y=z\n")
	want := map[string]string{"console": "ttyS0", "pyro.root": "/dev/vda", "pyro.hostname": "a", "x": "y=z"}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestShares(t *testing.T) {
	const mib = 1 << 20
	tests := []struct {
		name                string
		total, memory, pids int64
	}{
		{"unknown", 0, 0, 0},
		{"tiny", 40 * mib, 20 * mib, 256},
		{"small", 128 * mib, 104 * mib, 256},
		{"usual", 1024 * mib, 960 * mib, 2048},
		{"large", 64 << 30, 64<<30 - 64*mib, 16384},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if m, p := shares(tt.total); m != tt.memory || p != tt.pids {
				t.Errorf("shares(%d MiB) = %d MiB, %d; want %d MiB, %d", tt.total/mib, m/mib, p, tt.memory/mib, tt.pids)
			}
		})
	}
}

func TestMendHosts(t *testing.T) {
	const local = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
	tests := []struct{ name, in, want string }{
		{"absent", "", local + "127.0.1.1\tweb\n"},
		{"complete", "127.0.0.1 localhost web\n", "127.0.0.1 localhost web\n"},
		{"no newline", "127.0.0.1 localhost", "127.0.0.1 localhost\n127.0.1.1\tweb\n"},
		{"only in a comment", "# localhost web\n", "# localhost web\n" + local + "127.0.1.1\tweb\n"},
		{"another's name", "127.0.0.1 localhost\n10.0.0.1 webserver\n", "127.0.0.1 localhost\n10.0.0.1 webserver\n127.0.1.1\tweb\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if d := cmp.Diff(tt.want, mendHosts(tt.in, "web")); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestParseSuper(t *testing.T) {
	super := make([]byte, 1024)
	if _, _, err := parseSuper(super); err == nil {
		t.Error("zeros pass for a superblock")
	}
	binary.LittleEndian.PutUint16(super[0x38:], 0xef53)
	binary.LittleEndian.PutUint32(super[0x18:], 2)
	binary.LittleEndian.PutUint32(super[0x4:], 1000)
	binary.LittleEndian.PutUint32(super[0x150:], 1)
	if block, blocks, err := parseSuper(super); block != 4096 || blocks != 1000 || err != nil {
		t.Errorf("32 bit: %d blocks of %d, %v", blocks, block, err)
	}
	binary.LittleEndian.PutUint32(super[0x60:], 0x80)
	if _, blocks, _ := parseSuper(super); blocks != 1<<32+1000 {
		t.Errorf("64 bit: %d blocks", blocks)
	}
	binary.LittleEndian.PutUint32(super[0x18:], 60)
	if _, _, err := parseSuper(super); err == nil {
		t.Error("an absurd block size passes")
	}
}
