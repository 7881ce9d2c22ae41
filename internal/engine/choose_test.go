package engine_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
)

type stub struct {
	name string
	caps engine.Capabilities
}

func (s stub) Name() string                              { return s.name }
func (s stub) Probe(context.Context) engine.Capabilities { return s.caps }
func (stub) Start(context.Context, engine.MachineSpec) (engine.Machine, error) {
	return nil, api.ErrInternal
}

var (
	kvm    = stub{"qemu", engine.Capabilities{Available: true, Isolation: api.IsolationVMKVM, FullSpeed: true}}
	tcg    = stub{"qemu", engine.Capabilities{Available: true, Isolation: api.IsolationVMEmulated}}
	noQEMU = stub{"qemu", engine.Capabilities{Detail: "it is not installed", Remedy: "install it"}}
	gvisor = stub{"gvisor", engine.Capabilities{Available: true, Isolation: api.IsolationSandboxGVisor, FullSpeed: true}}
	noGV   = stub{"gvisor", engine.Capabilities{Detail: "no runsc"}}
	onHost = stub{"host", engine.Capabilities{Available: true, Isolation: api.IsolationNone, FullSpeed: true}}
)

const refused = ""

func TestChoose(t *testing.T) {
	for _, test := range []struct {
		name    string
		engines []engine.Engine
		want    engine.Choice
		engine  string // refused for an error
		is      api.Isolation
		class   error
	}{
		{"KVMFirst", []engine.Engine{gvisor, kvm, onHost}, engine.Choice{}, "qemu", api.IsolationVMKVM, nil},
		{"FullSpeedBeforeEmulation", []engine.Engine{tcg, gvisor, onHost}, engine.Choice{Engine: "auto"}, "gvisor", api.IsolationSandboxGVisor, nil},
		{"EmulationBeforeNothing", []engine.Engine{tcg, noGV, onHost}, engine.Choice{}, "qemu", api.IsolationVMEmulated, nil},
		{"FloorVM", []engine.Engine{tcg, gvisor, onHost}, engine.Choice{Require: api.RequireVM}, "qemu", api.IsolationVMEmulated, nil},
		{"FloorSandboxTakesBest", []engine.Engine{kvm, gvisor}, engine.Choice{Require: api.RequireSandbox}, "qemu", api.IsolationVMKVM, nil},
		{"FloorNotReached", []engine.Engine{noQEMU, gvisor, onHost}, engine.Choice{Require: api.RequireVM}, refused, "", api.ErrUnsupported},
		{"FloorNotReachedByHost", []engine.Engine{noQEMU, noGV, onHost}, engine.Choice{Require: api.RequireSandbox, AllowHostCompat: true}, refused, "", api.ErrUnsupported},
		{"UnknownFloor", []engine.Engine{kvm}, engine.Choice{Require: "castle"}, refused, "", api.ErrInvalid},
		{"FailsClosed", []engine.Engine{noQEMU, noGV, onHost}, engine.Choice{}, refused, "", api.ErrUnsupported},
		{"HostByOptIn", []engine.Engine{noQEMU, noGV, onHost}, engine.Choice{AllowHostCompat: true}, "host", api.IsolationNone, nil},
		{"OptInIsNotPreference", []engine.Engine{tcg, onHost}, engine.Choice{AllowHostCompat: true}, "qemu", api.IsolationVMEmulated, nil},
		{"HostByNameNeedsOptIn", []engine.Engine{kvm, onHost}, engine.Choice{Engine: "host"}, refused, "", api.ErrDenied},
		{"HostByNameWithOptIn", []engine.Engine{kvm, onHost}, engine.Choice{Engine: "host", AllowHostCompat: true}, "host", api.IsolationNone, nil},
		{"HostByNameBelowFloor", []engine.Engine{kvm, onHost}, engine.Choice{Engine: "host", AllowHostCompat: true, Require: api.RequireSandbox}, refused, "", api.ErrDenied},
		{"NamedIsNeverReplaced", []engine.Engine{noQEMU, gvisor}, engine.Choice{Engine: "qemu"}, refused, "", api.ErrUnsupported},
		{"NamedBelowFloor", []engine.Engine{kvm, gvisor}, engine.Choice{Engine: "gvisor", Require: api.RequireVM}, refused, "", api.ErrDenied},
		{"UnknownName", []engine.Engine{kvm}, engine.Choice{Engine: "zen"}, refused, "", api.ErrInvalid},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := engine.Choose(engine.ProbeAll(t.Context(), test.engines), test.want)
			if test.engine == refused {
				if !errors.Is(err, test.class) || api.Hint(err) == "" {
					t.Fatalf("got %v (hint %q), want class %v with a hint", err, api.Hint(err), test.class)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got.Name() != test.engine || got.Isolation != test.is {
				t.Errorf("got %s with %s, want %s with %s", got.Name(), got.Isolation, test.engine, test.is)
			}
		})
	}
}

func TestChooseSaysWhy(t *testing.T) {
	_, err := engine.Choose(engine.ProbeAll(t.Context(), []engine.Engine{noQEMU, noGV, onHost}), engine.Choice{})
	for _, want := range []string{"qemu: it is not installed", "gvisor: no runsc"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q does not say %q", err, want)
		}
	}
	if got := api.Hint(err); got != "install it" {
		t.Errorf("hint %q, want the first remedy", got)
	}
}
