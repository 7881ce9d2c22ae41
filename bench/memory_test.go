package bench

import (
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

//page:topic 1 Workspaces that begin with a memory

// BenchmarkForkTen forks a running workspace of 1 GiB with 300 MiB of random bytes
// in use ten times with its memory. The reference are ten creates of a workspace
// with nothing in it, one after the other. Memory is the Pss of all processes of a
// fork before it works, in MiB.
//
//page:row ten forks with 300 MiB in use
//page:aim pyro-ms <= 5000
//page:aim pyro-memory-MiB <= 40
func BenchmarkForkTen(b *testing.B) {
	for _, engine := range []string{"qemu", "gvisor"} {
		b.Run(engine, func(b *testing.B) {
			d := newDesk(b, engine)
			id := d.create("debian:12")
			d.pyro("workspace", "service", "start", id, "hold", "--ready-file", "/run/ready", "--ready-timeout-seconds", "120", "--",
				"python3", "-c", "import os, time; b = os.urandom(1 << 20) * 300; open('/run/ready', 'w').close(); time.sleep(1e6)")
			var memory []float64
			compare(b, 3, func() time.Duration {
				began := time.Now()
				forks := strings.Fields(d.pyro("workspace", "fork", id, "--memory", "--count", "10", "--id-only", "--quiet"))
				took := time.Since(began)
				memory = append(memory, memoryOf(b, forks))
				d.pyro(append([]string{"workspace", "delete"}, forks...)...)
				return took
			}, func() time.Duration {
				var made []string
				began := time.Now()
				for range 10 {
					made = append(made, d.create("debian:12"))
				}
				took := time.Since(began)
				d.pyro(append([]string{"workspace", "delete"}, made...)...)
				return took
			})
			b.ReportMetric(memory[len(memory)/2], "pyro-memory-MiB")
		})
	}
}

// memoryOf is the memory of all processes of workspaces, in MiB for each.
func memoryOf(b *testing.B, ids []string) float64 {
	b.Helper()
	sum := 0.0
	for _, id := range ids {
		supervisor, machine := processesOf(b, id)
		sum += used(append(machine, supervisor)...).mib
	}
	return sum / float64(len(ids))
}

// BenchmarkTwentyWorkspaces creates twenty workspaces at once, until each has
// answered a command. The reference are twenty times one that is created alone.
// Memory is the Pss of all processes of a workspace then, in MiB.
//
//page:row twenty workspaces at once
func BenchmarkTwentyWorkspaces(b *testing.B) {
	const count = 20
	for _, engine := range []string{"qemu", "gvisor"} {
		b.Run(engine, func(b *testing.B) {
			d := newDesk(b, engine)
			one := func() (id string, err error) {
				id, err = d.try(nil, "workspace", "create", "debian:12", "--ttl-seconds", "7200", "--id-only", "--quiet")
				if err != nil {
					return "", err
				}
				id = strings.TrimSpace(id)
				_, err = d.try(nil, "workspace", "exec", id, "--quiet", "--timeout-seconds", "120", "--", "true")
				return id, err
			}
			var memory []float64
			compare(b, 2, func() time.Duration {
				ids := make([]string, count)
				began := time.Now()
				var all errgroup.Group
				for i := range ids {
					all.Go(func() (err error) {
						ids[i], err = one()
						return err
					})
				}
				check(b, all.Wait())
				took := time.Since(began)
				memory = append(memory, memoryOf(b, ids))
				d.pyro(append([]string{"workspace", "delete"}, ids...)...)
				return took
			}, func() time.Duration {
				began := time.Now()
				id, err := one()
				check(b, err)
				took := time.Since(began)
				d.pyro("workspace", "delete", id)
				return count * took
			})
			b.ReportMetric(memory[len(memory)/2], "pyro-memory-MiB")
		})
	}
}

// BenchmarkBegin resets a workspace and forks one, until it has answered a
// command, and lets one that is paused to disk answer one. The references are a
// workspace that is created, and for the last one that is stopped and started.
//
//page:row beginning otherwise than by create
func BenchmarkBegin(b *testing.B) {
	for _, engine := range []string{"qemu", "gvisor"} {
		b.Run(engine, func(b *testing.B) {
			d := newDesk(b, engine)
			id := d.create("debian:12")
			answer := func(id string) { d.pyro("workspace", "exec", id, "--quiet", "--", "true") }
			made := func(make func() string) func() time.Duration {
				return func() time.Duration {
					began := time.Now()
					id := make()
					answer(id)
					took := time.Since(began)
					d.pyro("workspace", "delete", id)
					return took
				}
			}
			create := made(func() string { return d.create("debian:12") })
			b.Run("reset", func(b *testing.B) {
				compare(b, 5, func() time.Duration {
					began := time.Now()
					d.pyro("workspace", "reset", id, "--quiet")
					answer(id)
					return time.Since(began)
				}, create)
			})
			for name, flags := range map[string][]string{"fork": nil, "fork --memory": {"--memory"}} {
				b.Run(name, func(b *testing.B) {
					compare(b, 5, made(func() string {
						return d.pyro(append([]string{"workspace", "fork", id, "--id-only", "--quiet"}, flags...)...)
					}), create)
				})
			}
			b.Run("wake", func(b *testing.B) {
				compare(b, 5, func() time.Duration {
					d.pyro("workspace", "pause", id, "--to-disk")
					began := time.Now()
					answer(id)
					return time.Since(began)
				}, func() time.Duration {
					d.pyro("workspace", "stop", id)
					began := time.Now()
					d.pyro("workspace", "start", id, "--quiet")
					answer(id)
					return time.Since(began)
				})
			})
		})
	}
}
