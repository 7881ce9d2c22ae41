package guestproto_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

const goodReply = `{"stdout":"o","stderr":"e","exit_code":1,"duration_ms":2}`

func TestDecodeReply(t *testing.T) {
	tests := []struct {
		name, data, want string
		class            error
	}{
		{"good", goodReply, "", nil},
		{"good with white space", " \n" + goodReply + "\n ", "", nil},
		{"unknown field", `{"stdout":"","stderr":"","exit_code":1,"duration_ms":2,"later":{"a":[1]}}`, "", nil},
		{"empty", "", "JSON object", api.ErrDamaged},
		{"only a newline", "\n", "JSON object", api.ErrDamaged},
		{"array", `[]`, "JSON object", api.ErrDamaged},
		{"string", `"exit_code"`, "JSON object", api.ErrDamaged},
		{"null", `null`, "JSON object", api.ErrDamaged},
		{"number", `0`, "JSON object", api.ErrDamaged},
		{"cut", goodReply[:20], "ends in the middle of a JSON object", api.ErrDamaged},
		{"two objects", goodReply + goodReply, "bytes follow", api.ErrDamaged},
		{"garbage after", goodReply + "x", "bytes follow", api.ErrDamaged},
		{"duplicate", `{"stdout":"","stderr":"","exit_code":1,"duration_ms":2,"exit_code":0}`, "duplicate", api.ErrDamaged},
		{"case variant", `{"stdout":"","stderr":"","exit_code":1,"duration_ms":2,"EXIT_CODE":0}`, "duplicate", api.ErrDamaged},
		{"variant without underscore", `{"stdout":"","stderr":"","exit_code":1,"duration_ms":2,"exitcode":0}`, "duplicate", api.ErrDamaged},
		{"case variant alone", `{"stdout":"","stderr":"","Exit_Code":1,"duration_ms":2}`, `lacks "exit_code"`, api.ErrDamaged},
		{"no exit code", `{"stdout":"","stderr":"","duration_ms":2}`, `lacks "exit_code"`, api.ErrDamaged},
		{"empty object", `{}`, "lacks", api.ErrDamaged},
		{"text for number", `{"stdout":"","stderr":"","exit_code":"0","duration_ms":2}`, "exit_code", api.ErrDamaged},
		{"fraction", `{"stdout":"","stderr":"","exit_code":0.5,"duration_ms":2}`, "exit_code", api.ErrDamaged},
		{"overflow", `{"stdout":"","stderr":"","exit_code":1,"duration_ms":9223372036854775808}`, "duration_ms", api.ErrDamaged},
		{"not a number", `{"stdout":"","stderr":"","exit_code":NaN,"duration_ms":2}`, "JSON object", api.ErrDamaged},
		{"invalid UTF-8", "{\"stdout\":\"\xff\",\"stderr\":\"\",\"exit_code\":0,\"duration_ms\":2}", "UTF-8", api.ErrDamaged},
		{"deep", `{"a":` + strings.Repeat("[", 40) + strings.Repeat("]", 40) + `}`, "nests deeper", api.ErrDamaged},
		{"many", `{"a":[` + strings.Repeat("1,", 200_000) + `1]}`, "more than", api.ErrDamaged},
		{"error", `{"error":"no such thing"}`, "no such thing", api.ErrUnavailable},
		{"error with code", `{"error":"no such thing","code":"not_found","hint":"look"}`, "no such thing", api.ErrNotFound},
		{"error with an invented code", `{"error":"x","code":"pwned"}`, "x", api.ErrInternal},
		{"error and result", `{"stdout":"","stderr":"","exit_code":0,"duration_ms":2,"error":"no"}`, "no", api.ErrUnavailable},
		{"error that is no text", `{"error":{"a":1}}`, "guest's error", api.ErrDamaged},
		{"error without text", `{"error":""}`, "without a text", api.ErrUnavailable},
		{"long error", `{"error":"` + strings.Repeat("x", 1<<20) + `"}`, "…", api.ErrUnavailable},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var got guestproto.ExecReply
			err := guestproto.DecodeReply([]byte(tt.data), &got, "stdout", "stderr", "exit_code", "duration_ms")
			if tt.class == nil {
				if err != nil {
					t.Fatal(err)
				}
				if got.ExitCode != 1 || got.DurationMS != 2 {
					t.Errorf("decoded %+v", got)
				}
				return
			}
			if err == nil {
				t.Fatalf("no error, decoded %+v", got)
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %q lacks %q", err, tt.want)
			}
			if !errors.Is(err, tt.class) {
				t.Errorf("error %q is of class %s, want %s", err, api.Code(err), api.Code(tt.class))
			}
			if len(err.Error()) > guestproto.MaxErrorText+200 {
				t.Errorf("error has %d bytes", len(err.Error()))
			}
		})
	}
}

func TestEncodeMendsUTF8(t *testing.T) {
	line, err := guestproto.Encode(guestproto.ExecReply{Stdout: "a\xffb"})
	if err != nil {
		t.Fatal(err)
	}
	var got guestproto.ExecReply
	if err := guestproto.DecodeReply(line, &got, "exit_code"); err != nil {
		t.Fatal(err)
	}
	if got.Stdout != "a\uFFFDb" {
		t.Errorf("stdout is %q", got.Stdout)
	}
}

// TestPlainReplyFits holds the promise that MaxReply is enough for two outputs
// of the largest size in the worst escaping.
func TestPlainReplyFits(t *testing.T) {
	out := strings.Repeat("\x01", guestproto.MaxPlainOutput)
	line, err := guestproto.Encode(guestproto.ExecReply{Stdout: out, Stderr: out})
	if err != nil {
		t.Fatal(err)
	}
	if len(line) > guestproto.MaxReply {
		t.Errorf("the reply has %d bytes, the limit is %d", len(line), guestproto.MaxReply)
	}
}

func TestReadLine(t *testing.T) {
	tests := []struct {
		name, in string
		limit    int
		want     string
		wantErr  error
	}{
		{"line", "abc\nrest", 10, "abc", nil},
		{"empty line", "\nrest", 10, "", nil},
		{"exact", "abc\nrest", 4, "abc", nil},
		{"too long", "abcd\nrest", 4, "", api.ErrDamaged},
		{"endless", strings.Repeat("a", 1<<20), 5000, "", api.ErrDamaged},
		{"longer than the buffer", strings.Repeat("a", 100) + "\nrest", 101, strings.Repeat("a", 100), nil},
		{"nothing", "", 10, "", io.EOF},
		{"cut", "ab", 10, "", io.ErrUnexpectedEOF},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := bufio.NewReaderSize(strings.NewReader(tt.in), 16)
			got, err := guestproto.ReadLine(r, tt.limit)
			if !errors.Is(err, tt.wantErr) {
				t.Fatalf("error %v, want %v", err, tt.wantErr)
			}
			if string(got) != tt.want {
				t.Errorf("line %q, want %q", got, tt.want)
			}
			if err == nil {
				rest, _ := io.ReadAll(r)
				if string(rest) != "rest" {
					t.Errorf("left %q in the reader", rest)
				}
			}
		})
	}
}

func TestExecReplyCheck(t *testing.T) {
	tests := []struct {
		name     string
		in       guestproto.ExecReply
		wantCode int
		ok       bool
	}{
		{"zero", guestproto.ExecReply{}, 0, true},
		{"largest", guestproto.ExecReply{ExitCode: 255}, 255, true},
		{"signal", guestproto.ExecReply{ExitCode: -9}, 137, true},
		{"too large", guestproto.ExecReply{ExitCode: 256}, 0, false},
		{"too small", guestproto.ExecReply{ExitCode: math.MinInt}, 0, false},
		{"negative time", guestproto.ExecReply{DurationMS: -1}, 0, false},
		{"time that overflows", guestproto.ExecReply{DurationMS: math.MaxInt64}, 0, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.in.Check()
			if (err == nil) != tt.ok {
				t.Fatalf("error %v", err)
			}
			if err == nil && tt.in.ExitCode != tt.wantCode {
				t.Errorf("exit code %d, want %d", tt.in.ExitCode, tt.wantCode)
			}
			if err != nil && !errors.Is(err, api.ErrDamaged) {
				t.Errorf("class %s", api.Code(err))
			}
		})
	}
}

func TestFrames(t *testing.T) {
	var buf bytes.Buffer
	type frame struct {
		Type    guestproto.FrameType
		Payload string
	}
	want := []frame{
		{guestproto.FrameStarted, `{"pid":1}`},
		{guestproto.FrameStdout, strings.Repeat("x", guestproto.MaxFrame)},
		{guestproto.FrameStdinClose, ""},
	}
	for _, f := range want {
		if err := guestproto.WriteFrame(&buf, f.Type, []byte(f.Payload)); err != nil {
			t.Fatal(err)
		}
	}
	whole := buf.Bytes()
	r := guestproto.NewFrameReader(bytes.NewReader(whole))
	var got []frame
	for {
		typ, p, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, frame{typ, string(p)})
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if err := guestproto.WriteFrame(io.Discard, 1, make([]byte, guestproto.MaxFrame+1)); !errors.Is(err, api.ErrInvalid) {
		t.Errorf("a frame above the limit was written: %v", err)
	}
	t.Run("cut", func(t *testing.T) {
		for _, n := range []int{1, 4, 5, 8} {
			r := guestproto.NewFrameReader(bytes.NewReader(whole[:n]))
			if _, _, err := r.Next(); err != io.ErrUnexpectedEOF {
				t.Errorf("cut at %d: %v", n, err)
			}
		}
	})
	t.Run("lying length", func(t *testing.T) {
		r := guestproto.NewFrameReader(strings.NewReader("\x11\xff\xff\xff\xffabc"))
		if _, _, err := r.Next(); !errors.Is(err, api.ErrDamaged) {
			t.Errorf("error %v", err)
		}
	})
}

// TestErrorsKeepTheirClass sends every class through the plain form's error.
func TestErrorsKeepTheirClass(t *testing.T) {
	for _, code := range api.Codes() {
		t.Run(code, func(t *testing.T) {
			in := api.WithHint(api.Errorf(api.ClassOf(code), "doing it: broken"), "mend it")
			w := api.ToWire(in)
			line, err := guestproto.Encode(guestproto.ErrorReply{Error: w.Message, Code: w.Code, Hint: w.Hint})
			if err != nil {
				t.Fatal(err)
			}
			out := guestproto.DecodeReply(line, &guestproto.Hello{})
			got := fmt.Sprint(out, "|", api.Code(out), "|", api.Hint(out))
			if want := "doing it: broken|" + code + "|mend it"; got != want {
				t.Errorf("got %q, want %q", got, want)
			}
		})
	}
}

func FuzzDecodeReply(f *testing.F) {
	f.Add([]byte(goodReply))
	f.Add([]byte(`{"error":"x"}`))
	f.Add([]byte(`{"a":[[[{"b":1e999}]]],"exit_code":-9}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var r guestproto.ExecReply
		if err := guestproto.DecodeReply(data, &r, "exit_code"); err == nil {
			if err := r.Check(); err == nil && (r.ExitCode < 0 || r.ExitCode > 255) {
				t.Errorf("accepted %+v", r)
			}
		}
		var h guestproto.ExportHeader
		if err := guestproto.DecodeReply(data, &h, "archive_size"); err == nil {
			if h.Check(1000) == nil && (h.ArchiveSize < 0 || h.ArchiveSize > 1000) {
				t.Errorf("accepted %+v", h)
			}
		}
		var s guestproto.ReadShellReply
		_ = guestproto.DecodeReply(data, &s)
		var l guestproto.ServiceLogs
		_ = guestproto.DecodeReply(data, &l)
		var q guestproto.ExecRequest
		_ = guestproto.Decode(data, &q)
	})
}

func FuzzFrameReader(f *testing.F) {
	f.Add([]byte("\x11\x00\x00\x00\x01a\x14\x00\x00\x00\x02{}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		r := guestproto.NewFrameReader(bytes.NewReader(data))
		for {
			_, p, err := r.Next()
			if err != nil {
				return
			}
			if len(p) > guestproto.MaxFrame {
				t.Fatalf("a payload of %d bytes", len(p))
			}
		}
	})
}
