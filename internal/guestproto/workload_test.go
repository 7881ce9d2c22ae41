package guestproto_test

import (
	"errors"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

func TestCheckWorkloadName(t *testing.T) {
	for name, ok := range map[string]bool{
		"web": true, "Web-2.local_x": true, "0": true, strings.Repeat("x", 64): true,
		"": false, strings.Repeat("x", 65): false, "-x": false, ".": false, "..": false, "a/b": false, "a b": false,
		"a\n": false, "a\x00": false, "é": false, "a\x1b[2J": false,
	} {
		if err := guestproto.CheckWorkloadName(name); (err == nil) != ok || err != nil && !errors.Is(err, api.ErrInvalid) {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestReadinessCheck(t *testing.T) {
	for _, test := range []struct {
		name string
		r    guestproto.Readiness
		ok   bool
	}{
		{"File", guestproto.Readiness{Type: "file", Path: "x"}, true},
		{"NUL", guestproto.Readiness{Type: "file", Path: "x\x00"}, false},
		{"TCP", guestproto.Readiness{Type: "tcp", Address: "localhost:1"}, true},
		{"TCP6", guestproto.Readiness{Type: "tcp", Address: "[::1]:65535"}, true},
		{"HighPort", guestproto.Readiness{Type: "tcp", Address: "localhost:65536"}, false},
		{"NoPort", guestproto.Readiness{Type: "tcp", Address: "localhost"}, false},
		{"HTTP", guestproto.Readiness{Type: "http", URL: "http://localhost"}, true},
		{"HTTPPort", guestproto.Readiness{Type: "http", URL: "http://[::1]:8080/a?b"}, true},
		{"HTTPS", guestproto.Readiness{Type: "http", URL: "https://localhost"}, false},
		{"BadPort", guestproto.Readiness{Type: "http", URL: "http://localhost:99999"}, false},
		{"NoHost", guestproto.Readiness{Type: "http", URL: "http:///x"}, false},
		{"Injected", guestproto.Readiness{Type: "http", URL: "http://localhost/\r\nX: y"}, false},
		{"Command", guestproto.Readiness{Type: "command", Command: "true"}, true},
		{"Nothing", guestproto.Readiness{Type: "command"}, false},
		{"Two", guestproto.Readiness{Type: "command", Command: "true", URL: "http://x"}, false},
		{"Unknown", guestproto.Readiness{Type: "udp", Address: "x:1"}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			if err := test.r.Check(); (err == nil) != test.ok || err != nil && !errors.Is(err, api.ErrInvalid) {
				t.Errorf("%+v: %v", test.r, err)
			}
		})
	}
}

func TestWorkloadTimes(t *testing.T) {
	check := &guestproto.Readiness{Type: "file", Path: "x"}
	for seconds, want := range map[float64]time.Duration{0: 30 * time.Second, 0.5: 500 * time.Millisecond, 3600: time.Hour} {
		if got, err := (&guestproto.StartService{Readiness: check, ReadyTimeoutSeconds: seconds}).ReadyTimeout(); err != nil || got != want {
			t.Errorf("%v s: %v, %v", seconds, got, err)
		}
	}
	if got, err := (&guestproto.StartService{}).ReadyTimeout(); err != nil || got != 0 {
		t.Errorf("without a check: %v, %v", got, err)
	}
	for _, seconds := range []float64{-1, 3601, math.NaN(), math.Inf(1)} {
		if _, err := (&guestproto.StartService{ReadyTimeoutSeconds: seconds}).ReadyTimeout(); !errors.Is(err, api.ErrInvalid) {
			t.Errorf("%v s: %v", seconds, err)
		}
	}
	for ms, ok := range map[int64]bool{0: true, 600_000: true, -1: false, 600_001: false} {
		got, err := (&guestproto.StopService{GraceMS: &ms}).Grace()
		if (err == nil) != ok || ok && got != time.Duration(ms)*time.Millisecond {
			t.Errorf("%d ms: %v, %v", ms, got, err)
		}
	}
	if got, err := (&guestproto.StopService{}).Grace(); err != nil || got != guestproto.DefaultStopGrace {
		t.Errorf("the default grace is %v, %v", got, err)
	}
}
