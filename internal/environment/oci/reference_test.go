package oci_test

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/environment/oci"
)

func TestParseReference(t *testing.T) {
	cwd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	sum := "sha256:" + strings.Repeat("0a", 32)
	for _, tt := range []struct{ in, short, end string }{
		{"docker://python:3.13-slim", "python:3.13-slim", "/library/python:3.13-slim"},
		{"docker://python", "python:latest", "/library/python:latest"},
		{"docker://some/one", "some/one:latest", "/some/one:latest"},
		{"docker://localhost:5000/a/b:1", "localhost:5000/a/b:1", "docker://localhost:5000/a/b:1"},
		{"docker://example.com/a@" + sum, "example.com/a@" + sum, "docker://example.com/a@" + sum},
		{"oci-layout:/a/b", "b", "oci-layout:/a/b"},
		{"oci-layout:/a/b@v1", "b-v1", "oci-layout:/a/b@v1"},
		{"oci-layout:/a@b/c@", "c", "oci-layout:/a@b/c@"},
		{"docker-archive:x/my image.tar", "my-image", "docker-archive:" + cwd + "/x/my image.tar"},
		{"docker-archive:/x.tar@a/b:1", "x-a-b-1", "docker-archive:/x.tar@a/b:1"},
	} {
		ref, err := oci.ParseReference(tt.in)
		if err != nil {
			t.Errorf("%s: %v", tt.in, err)
			continue
		}
		if ref.ShortName() != tt.short || !strings.HasSuffix(ref.String(), tt.end) {
			t.Errorf("%s is %q, in full %q", tt.in, ref.ShortName(), ref.String())
		}
		if again, err := oci.ParseReference(ref.String()); err != nil || again.String() != ref.String() {
			t.Errorf("%s read again is %s, %v", ref, again, err)
		}
	}
	for _, in := range []string{"", "python", "docker://", "docker:///x", "docker://A/B", "docker://x:" + strings.Repeat("a", 200), "docker://x@sha256:12",
		"docker://../x", "oci-layout:", "oci-layout:\x00", "docker-archive:@x", "https://example.com/x", "docker://" + strings.Repeat("x", 5000)} {
		if ref, err := oci.ParseReference(in); !errors.Is(err, api.ErrInvalid) {
			t.Errorf("%.40q is %v, %v", in, ref, err)
		}
	}
}

func FuzzParseReference(f *testing.F) {
	for _, s := range []string{"docker://python:3.13-slim", "oci-layout:/a@b", "docker-archive:x.tar", "docker://h:1/a@sha256:"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		ref, err := oci.ParseReference(s)
		if err != nil {
			return
		}
		if again, err := oci.ParseReference(ref.String()); err != nil || again.String() != ref.String() {
			t.Errorf("%q read again is %q, %v", ref.String(), again.String(), err)
		}
	})
}
