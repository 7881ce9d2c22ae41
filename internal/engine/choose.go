package engine

import (
	"context"
	"strings"
	"sync"

	"github.com/pyro-mcp/pyro/api"
)

// Auto is the value of --engine that leaves the choice to [Choose].
const Auto = "auto"

// HostName is the name of the engine without isolation.
const HostName = "host"

// A Choice says what the caller will accept.
type Choice struct {
	// Engine is a name, or "" or Auto for the best that works here.
	Engine string
	// Require is the floor that no choice goes below.
	Require api.Require
	// AllowHostCompat admits engine host, which isolates nothing, when nothing
	// that isolates works here or when Engine names it.
	AllowHostCompat bool
}

// Candidate is an engine with what its Probe found.
type Candidate struct {
	Engine
	Capabilities
}

// ProbeAll probes every engine, all at once.
func ProbeAll(ctx context.Context, engines []Engine) []Candidate {
	out := make([]Candidate, len(engines))
	var wg sync.WaitGroup
	for i, e := range engines {
		wg.Go(func() { out[i] = Candidate{e, e.Probe(ctx)} })
	}
	wg.Wait()
	return out
}

// Pick probes what want leaves open, and chooses. An engine that is named is
// the only one that is probed.
func Pick(ctx context.Context, engines []Engine, want Choice) (Candidate, error) {
	for _, e := range engines {
		if e.Name() == want.Engine {
			return Choose(ProbeAll(ctx, []Engine{e}), want)
		}
	}
	return Choose(ProbeAll(ctx, engines), want)
}

// Choose picks the engine for a new machine. Automatic choice takes the
// strongest isolation that runs at full speed, then the strongest at all; it
// never goes below the floor and never ends at engine host unless the caller
// admitted that. A choice that cannot be met is an error that says why.
func Choose(candidates []Candidate, want Choice) (Candidate, error) {
	switch want.Require {
	case api.RequireAny, api.RequireSandbox, api.RequireVM:
	default:
		return Candidate{}, api.WithHint(api.Errorf(api.ErrInvalid, "unknown isolation floor %q", want.Require),
			"use --require vm or --require sandbox")
	}
	if want.Engine != "" && want.Engine != Auto {
		return named(candidates, want)
	}
	var best *Candidate
	for i := range candidates {
		c := &candidates[i]
		if c.Available && want.Require.Allows(c.Isolation) && (best == nil || better(c, best)) {
			best = c
		}
	}
	if best != nil {
		return *best, nil
	}
	if want.AllowHostCompat && want.Require == api.RequireAny {
		for _, c := range candidates {
			if c.Name() == HostName && c.Available {
				return c, nil
			}
		}
	}
	return Candidate{}, noneWorks(candidates, want.Require)
}

func named(candidates []Candidate, want Choice) (Candidate, error) {
	var names []string
	for _, c := range candidates {
		names = append(names, c.Name())
		if c.Name() != want.Engine {
			continue
		}
		if c.Name() == HostName {
			if want.Require != api.RequireAny {
				return Candidate{}, api.WithHint(api.Errorf(api.ErrDenied, "engine host isolates nothing and --require %s was given", want.Require),
					"drop one of the two")
			}
			if !want.AllowHostCompat {
				return Candidate{}, api.WithHint(api.Errorf(api.ErrDenied, "engine host isolates nothing: commands would run on this host"),
					"if that is what you want, add --allow-host-compat")
			}
		}
		if !c.Available {
			return Candidate{}, hintRemedy(api.Errorf(api.ErrUnsupported, "engine %s does not work here: %s", c.Name(), c.Detail), c.Remedy)
		}
		if c.Name() != HostName && !want.Require.Allows(c.Isolation) {
			return Candidate{}, api.WithHint(api.Errorf(api.ErrDenied, "engine %s gives isolation %s, below the required %s", c.Name(), c.Isolation, want.Require),
				"drop --engine or --require")
		}
		return c, nil
	}
	return Candidate{}, api.WithHint(api.Errorf(api.ErrInvalid, "unknown engine %q", want.Engine),
		"use auto, %s", strings.Join(names, ", "))
}

// better reports whether a is to be preferred over b.
func better(a, b *Candidate) bool {
	if a.FullSpeed != b.FullSpeed {
		return a.FullSpeed
	}
	return rank(a.Isolation) > rank(b.Isolation)
}

func rank(i api.Isolation) int {
	switch i {
	case api.IsolationVMKVM:
		return 3
	case api.IsolationVMEmulated:
		return 2
	case api.IsolationSandboxGVisor:
		return 1
	}
	return 0
}

func noneWorks(candidates []Candidate, floor api.Require) error {
	var why []string
	remedy := ""
	for _, c := range candidates {
		if c.Name() == HostName {
			continue
		}
		switch {
		case !c.Available:
			why = append(why, c.Name()+": "+c.Detail)
			if remedy == "" {
				remedy = c.Remedy
			}
		case !floor.Allows(c.Isolation):
			why = append(why, c.Name()+": gives "+string(c.Isolation)+" only")
		}
	}
	what := "no engine can isolate a guest here"
	if floor != api.RequireAny {
		what = "no engine here reaches the required isolation " + string(floor)
	}
	return hintRemedy(api.Errorf(api.ErrUnsupported, "%s (%s)", what, strings.Join(why, "; ")), remedy)
}

func hintRemedy(err error, remedy string) error {
	if remedy == "" {
		return api.WithHint(err, "run pyro doctor for what each engine needs")
	}
	return api.WithHint(err, "%s", remedy)
}
