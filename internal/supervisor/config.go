package supervisor

import (
	"net/netip"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/hostproc"
	"github.com/pyro-mcp/pyro/internal/statedir"
)

// protocol is the version of Config and result. Both sides are the same binary
// unless somebody replaced it between two moments, which this finds out.
const protocol = 1

// The inherited files, by descriptor.
const (
	fdConfig  = 3 // reads Config as JSON until end of file
	fdResult  = 4 // takes one line of JSON, then end of file
	fdControl = 5 // listening socket
	fdGuest   = 6 // listening socket
	fdLock    = 7 // the machine's lock, held
	fdLease   = 8 // with Config.Leased: end of file means that the caller is gone
	fdHeld    = 9 // and up: files only to keep open (locks of images)
)

// Config tells a supervisor what to run.
type Config struct {
	Protocol int `json:"protocol"`
	// Dir is the machine's directory, a statedir.Machine.
	Dir    string `json:"dir"`
	Engine string `json:"engine"`
	// Require is looked at again if a failed boot changes the accelerator.
	Require api.Require        `json:"require"`
	Spec    engine.MachineSpec `json:"spec"`
	// NoteFile is statedir.Dir.AcceleratorFile.
	NoteFile string `json:"note_file"`
	// TTL ends the machine; 0 means never.
	TTL time.Duration `json:"ttl"`
	// Leased ends the machine when the caller's end of the lease pipe closes,
	// unless the caller has called Keep by then.
	Leased bool `json:"leased"`
	// Ephemeral removes the machine's directory at the end. The directory of
	// other machines stays, with their logs and how they ended.
	Ephemeral bool `json:"ephemeral"`
	// Standby, if set, lets the supervisor wait until somebody needs the machine.
	Standby *Standby `json:"standby,omitempty"`
	// Network is the policy, one of api.NetworkOff and its like; "" is off.
	Network string `json:"network,omitempty"`
	// NetworkAllow is for tests: network.Config.Allow. Nothing that a user can
	// say leads here.
	NetworkAllow []netip.Prefix `json:"network_allow,omitempty"`
}

// Standby is what a supervisor does for a machine that is not there yet: one that
// is paused to disk and whose ports stay open.
type Standby struct {
	// Ports are open from the beginning. All are, or the supervisor ends.
	Ports []PublishedPort `json:"ports"`
	// Command is run when somebody connects to one. It is to call [Client.Wake],
	// and the connection waits for that.
	Command []string `json:"command"`
	// Env are variables for it beside the supervisor's own.
	Env []string `json:"env"`
}

// Ending is how a machine that is not ephemeral ended, as its supervisor wrote
// it down last.
type Ending struct {
	At time.Time `json:"at"`
	// Reason is for people.
	Reason string `json:"reason"`
	// Requested is true if somebody asked for the end; Expired if the time to
	// live was over.
	Requested bool `json:"requested"`
	Expired   bool `json:"expired"`
	// Frozen is the path of the layer that the disk of a machine that was put to
	// sleep is; "" for all other ends. See [Client.Sleep].
	Frozen string `json:"frozen,omitempty"`
	// Console are the last lines of a guest that ended by itself.
	Console []string `json:"console,omitempty"`
}

// result is the one line on the result pipe.
type result struct {
	Protocol int            `json:"protocol"`
	PID      int            `json:"pid"`
	Status   *Status        `json:"status,omitempty"`
	Error    *api.WireError `json:"error,omitempty"`
}

// Status is what a supervisor says of its machine.
type Status struct {
	ID        string        `json:"id"`
	Engine    string        `json:"engine"`
	Isolation api.Isolation `json:"isolation"`
	// TimeScale is by how much the guest is slower than the host.
	TimeScale int        `json:"time_scale"`
	StartedAt time.Time  `json:"started_at"`
	ExpiresAt *time.Time `json:"expires_at,omitempty"`
	BootMS    int64      `json:"boot_ms"` // from start to the agent's first answer
	Kernel    string     `json:"kernel"`
	// Exited says why the machine has ended or is ending, "" while it runs.
	Exited string `json:"exited,omitempty"`
	PIDs   []int  `json:"pids"`
	// Notes are sentences for the user, such as that KVM was given up.
	Notes []string `json:"notes,omitempty"`
	// Network is nil for a guest without one.
	Network *NetworkStatus `json:"network,omitempty"`
	// Published are the ports of this host that lead to the guest.
	Published []PublishedPort `json:"published,omitempty"`
}

// record is machine.json: what a clean-up after a crash needs.
type record struct {
	ID         string             `json:"id"`
	Engine     string             `json:"engine"`
	CreatedAt  time.Time          `json:"created_at"`
	Supervisor *hostproc.Identity `json:"supervisor,omitempty"`
	// Processes are the machine's own.
	Processes []hostproc.Identity `json:"processes,omitempty"`
	Ephemeral bool                `json:"ephemeral"`
}

// write puts the record in its place. One of an ephemeral machine does not wait
// for the disk: after a crash of the host none of its processes run, and its
// directory goes whatever the record says.
func (r record) write(dir statedir.Machine) error {
	if r.Ephemeral {
		return statedir.WriteVolatileJSON(dir.RecordFile(), r)
	}
	return statedir.WriteJSON(dir.RecordFile(), r)
}
