package oci_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/environment/oci"
)

// noise is a file that does not get smaller.
func noise(size int) entry {
	b := make([]byte, size)
	random := rand.NewChaCha8([32]byte{1})
	_, _ = random.Read(b)
	return file("noise", string(b))
}

// packed returns what a registry has of a layer, and its path there and in the
// cache.
func packed(t *testing.T, p *oci.Puller, l v1.Layer) (content []byte, suffix, cached string) {
	t.Helper()
	digest, err := l.Digest()
	if err != nil {
		t.Fatal(err)
	}
	r, err := l.Compressed()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if content, err = io.ReadAll(r); err != nil {
		t.Fatal(err)
	}
	return content, digest.String(), filepath.Join(p.CacheDir, digest.Hex)
}

// answer serves content from where the request says, up to cut bytes of it, and
// returns where it began.
func answer(w http.ResponseWriter, r *http.Request, content []byte, cut int) (from int) {
	if text := r.Header.Get("Range"); text != "" {
		var to int
		if n, err := fmt.Sscanf(text, "bytes=%d-%d", &from, &to); n != 2 || err != nil || from > to || to != len(content)-1 {
			w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
			return from
		}
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to, len(content)))
	}
	w.Header().Set("Content-Length", fmt.Sprint(len(content)-from))
	if from > 0 {
		w.WriteHeader(http.StatusPartialContent)
	}
	_, _ = w.Write(content[from:min(len(content), from+cut)])
	if from+cut < len(content) {
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	return from
}

// TestResume: a registry that cuts connections at random places is asked for
// what is missing, in one pull and in the next; what is complete for nothing.
func TestResume(t *testing.T) {
	s, p := newServer(t), newPuller(t)
	whole, large := layerOf(t, file("a", "1")), layerOf(t, noise(4<<20))
	content, suffix, cached := packed(t, p, large)
	_, first, _ := packed(t, p, whole)
	ref := s.push(t, "image", imageOf(t, v1.Config{}, whole, large))
	var mu sync.Mutex
	asked, sent, wholes := 0, 0, 0
	s.intercept = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, first) {
			mu.Lock()
			wholes++
			mu.Unlock()
		}
		if !strings.HasSuffix(r.URL.Path, suffix) {
			return false
		}
		mu.Lock()
		asked++
		cut := rand.IntN(300 << 10)
		if asked%5 == 0 {
			cut = 0
		}
		// What comes from here is on its way when the next request arrives.
		sent += cut
		mu.Unlock()
		answer(w, r, content, cut)
		return true
	}
	pulls := 0
	for {
		image, _, err := build(t.Context(), t, p, ref)
		if pulls++; err == nil {
			if d := cmp.Diff(unpack([]entry{file("a", "1"), noise(4 << 20)}), read(t, image)); d != "" {
				t.Error("the trees differ")
			}
			break
		}
		if !errors.Is(err, api.ErrUnavailable) || pulls == 100 {
			t.Fatalf("pull %d: %v", pulls, err)
		}
	}
	if pulls < 2 || wholes != 1 {
		t.Errorf("%d pulls, the first layer was fetched %d times", pulls, wholes)
	}
	if limit := len(content) + 300<<10; sent > limit {
		t.Errorf("%d bytes were sent in %d answers, want %d at most", sent, asked, limit)
	}
	if _, err := os.Stat(cached + ".part"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the part is left: %v", err)
	}
}

// TestParts begins with what an earlier pull may have left, or somebody else put
// there, and with registries that know no ranges or lie about them.
func TestParts(t *testing.T) {
	honest := func(w http.ResponseWriter, r *http.Request, content []byte) { answer(w, r, content, len(content)) }
	half := func(content []byte) []byte { return content[:len(content)/2] }
	for _, tt := range []struct {
		name  string
		part  func(content []byte) []byte
		serve func(w http.ResponseWriter, r *http.Request, content []byte)
		// The ranges that are asked for, "" for all of it.
		want    []string
		wantErr error
	}{
		{"Half", half, honest, []string{"half"}, nil},
		{"Complete", func(c []byte) []byte { return c }, honest, nil, nil},
		{"Empty", func([]byte) []byte { return nil }, honest, []string{""}, nil},
		{"TooLong", func(c []byte) []byte { return append(bytes.Clone(c), 0) }, honest, []string{""}, nil},
		{"Tampered", func(c []byte) []byte { b := bytes.Clone(half(c)); b[100] ^= 1; return b }, honest, []string{"half", ""}, nil},
		{"CompleteTampered", func(c []byte) []byte { b := bytes.Clone(c); b[100] ^= 1; return b }, honest, []string{""}, nil},
		{"NoRanges", half, func(w http.ResponseWriter, r *http.Request, content []byte) { _, _ = w.Write(content) }, []string{"half"}, nil},
		{"RangesRefused", half, func(w http.ResponseWriter, r *http.Request, content []byte) {
			if r.Header.Get("Range") != "" {
				w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
				return
			}
			_, _ = w.Write(content)
		}, []string{"half", ""}, nil},
		{"WrongRange", half, func(w http.ResponseWriter, r *http.Request, content []byte) {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes 1-%d/%d", len(content)-1, len(content)))
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(content[1:])
		}, []string{"half", "half", "half"}, api.ErrUnavailable},
		{"WrongBytes", half, func(w http.ResponseWriter, r *http.Request, content []byte) {
			answer(w, r, make([]byte, len(content)), len(content))
		}, []string{"half", ""}, api.ErrDamaged},
		{"TooMuch", half, func(w http.ResponseWriter, r *http.Request, content []byte) {
			if r.Header.Get("Range") == "" {
				honest(w, r, content)
				return
			}
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", len(half(content)), len(content)-1, len(content)))
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(append(bytes.Clone(content[len(half(content)):]), 0))
		}, []string{"half", ""}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, p := newServer(t), newPuller(t)
			large := layerOf(t, noise(100<<10))
			content, suffix, cached := packed(t, p, large)
			ref := s.push(t, "image", imageOf(t, v1.Config{}, large))
			var mu sync.Mutex
			var got []string
			s.intercept = func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.HasSuffix(r.URL.Path, suffix) {
					return false
				}
				mu.Lock()
				defer mu.Unlock()
				what := r.Header.Get("Range")
				if what == fmt.Sprintf("bytes=%d-%d", len(half(content)), len(content)-1) {
					what = "half"
				}
				got = append(got, what)
				tt.serve(w, r, content)
				return true
			}
			if err := os.MkdirAll(p.CacheDir, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(cached+".part", tt.part(content), 0o600); err != nil {
				t.Fatal(err)
			}
			image, _, err := build(t.Context(), t, p, ref)
			if !errors.Is(err, tt.wantErr) {
				t.Fatalf("got %v, want %v", err, tt.wantErr)
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Error(d)
			}
			if err == nil && cmp.Diff(unpack([]entry{noise(100 << 10)}), read(t, image)) != "" {
				t.Error("the trees differ")
			}
			// What may still be of use stays, and nothing else.
			_, statErr := os.Stat(cached + ".part")
			if kept := statErr == nil; kept != (tt.wantErr == api.ErrUnavailable) {
				t.Errorf("the part is kept: %v", kept)
			}
		})
	}
}
