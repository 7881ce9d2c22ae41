package bench

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/test/build"
)

// programs holds pyro and pyro-agent, built as make build does.
var programs string

func TestMain(m *testing.M) { os.Exit(build.Main(m, &programs, false)) }

func program(name string) string { return filepath.Join(programs, name) }

// compare runs ours and theirs alternately, rounds times each after one round
// that does not count, and reports the medians in milliseconds and their ratio.
// Each function returns how long the measured part of it took.
func compare(b *testing.B, rounds int, ours, theirs func() time.Duration) {
	b.Helper()
	var a, z []time.Duration
	for range b.N {
		ours()
		theirs()
		for range rounds {
			a = append(a, ours())
			z = append(z, theirs())
		}
	}
	report(b, median(a), median(z))
}

// report prints a pair: what pyro took, what the reference took, and their ratio.
func report(b *testing.B, ours, theirs time.Duration) {
	b.ReportMetric(0, "ns/op") // the loop's own time means nothing here
	b.ReportMetric(ms(ours), "pyro-ms")
	b.ReportMetric(ms(theirs), "reference-ms")
	b.ReportMetric(float64(ours)/float64(theirs), "ratio")
}

func median(d []time.Duration) time.Duration {
	s := slices.Sorted(slices.Values(d))
	return s[len(s)/2]
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
