package qemu

import (
	"errors"
	"io/fs"
	"strings"
	"testing"
)

const (
	withVMX     = "processor\t: 0\nflags\t\t: fpu vme vmx sse\nbogomips: 1\n"
	withSVM     = "flags\t\t: fpu svm\n"
	withNeither = "flags\t\t: fpu svm_lock avmx hypervisor\n"
)

// The device, its version and KVM_CREATE_VM prove nothing: only the flags do.
func TestProbeKVM(t *testing.T) {
	for _, test := range []struct {
		name    string
		open    error
		cpuinfo string
		ok      bool
		says    string
	}{
		{"Intel", nil, withVMX, true, "usable"},
		{"AMD", nil, withSVM, true, "usable"},
		{"PresentButHollow", nil, withNeither, false, "present but does not work"},
		{"Absent", fs.ErrNotExist, withVMX, false, "there is no /dev/kvm"},
		{"Forbidden", fs.ErrPermission, withVMX, false, "not yours to use"},
		{"ForbiddenAndHollow", fs.ErrPermission, withNeither, false, "present but does not work"},
		{"Broken", errors.New("no such device"), withVMX, false, "no such device"},
	} {
		t.Run(test.name, func(t *testing.T) {
			fact := probeKVM(func(string) ([]byte, error) { return []byte(test.cpuinfo), nil }, func() error { return test.open })
			if fact.OK != test.ok || !strings.Contains(fact.Value, test.says) {
				t.Errorf("got %+v, want ok %v and %q", fact, test.ok, test.says)
			}
			if !fact.OK && test.name != "Broken" && fact.Remedy == "" {
				t.Error("no remedy")
			}
		})
	}
}
