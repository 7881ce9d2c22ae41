package guestclient_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

const (
	shellJSON   = `"shell_id":"s","cwd":"/w","cols":80,"rows":24,"state":"running","started_at":1`
	serviceJSON = `"service_name":"s","command":"x","cwd":"/w","state":"running","started_at":1`
)

// A guest that lists more than there can be, or what was never named so.
func TestListsOfALiar(t *testing.T) {
	many := func(list, item string, n int) string {
		return fmt.Sprintf(`{%q:[%s{%s}]}`, list, strings.Repeat("{"+item+"},", n), item)
	}
	for _, test := range []struct{ name, reply string }{
		{"TooManyShells", many("shells", shellJSON, guestproto.MaxShells)},
		{"TooManyServices", many("services", serviceJSON, guestproto.MaxServices)},
		{"NameOfAShell", many("shells", strings.ReplaceAll(shellJSON, `"s"`, `"../s"`), 0)},
		{"NameOfAService", many("services", strings.ReplaceAll(serviceJSON, `"s"`, `"\u001b[2J"`), 0)},
		{"StateOfAShell", many("shells", strings.ReplaceAll(shellJSON, "running", "failed"), 0)},
		{"StateOfAService", many("services", strings.ReplaceAll(serviceJSON, "running", "odd"), 0)},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := dialPeer(t, quick, says(test.reply+"\n"))
			var err error
			if strings.Contains(test.reply, "shells") {
				_, err = c.ListShells(testContext(t))
			} else {
				_, err = c.ListServices(testContext(t))
			}
			if !errors.Is(err, api.ErrDamaged) {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestAttach(t *testing.T) {
	var got [][]byte
	received := make(chan struct{})
	c := dialPeer(t, quick, func(conn net.Conn, request []byte) {
		defer close(received)
		got = append(got, bytes.Clone(request))
		_, _ = io.WriteString(conn, frame(guestproto.FrameHeader, `{`+shellJSON+`,"cursor":7}`)+
			frame(guestproto.FrameStderr, "missed")+frame(guestproto.FrameStdout, "out"))
		fr := guestproto.NewFrameReader(conn)
		for {
			typ, p, err := fr.Next()
			if err != nil {
				return
			}
			got = append(got, append([]byte{byte(typ)}, p...))
			if typ == guestproto.FrameStdinClose {
				break
			}
		}
		var grant [4]byte
		binary.BigEndian.PutUint32(grant[:], 2)
		_, _ = io.WriteString(conn, frame(guestproto.FrameStdinWindow, string(grant[:]))+
			frame(guestproto.FrameResult, `{`+strings.Replace(shellJSON, "running", "stopped", 1)+`,"exit_code":3}`))
	})
	var stdout, stderr bytes.Buffer
	cursor := int64(7)
	var attached guestproto.ShellAttached
	sh, err := c.AttachShell(testContext(t), guestproto.AttachShell{ShellID: "s", Cursor: &cursor, Cols: 80, Rows: 24},
		guestclient.ExecIO{Stdin: strings.NewReader("ls"), Stdout: &stdout, Stderr: &stderr},
		func(a guestproto.ShellAttached) { attached = a })
	if err != nil || sh.State != "stopped" || sh.ExitCode == nil || *sh.ExitCode != 3 {
		t.Errorf("%+v, %v", sh, err)
	}
	if attached.Cursor != 7 || stdout.String() != "out" || stderr.String() != "missed" {
		t.Errorf("attached at %d, output %q, %q", attached.Cursor, &stdout, &stderr)
	}
	<-received
	want := [][]byte{
		[]byte(`{"action":"attach_shell","stream":true,"shell_id":"s","cursor":7,"cols":80,"rows":24}`),
		append([]byte{byte(guestproto.FrameStdin)}, "ls"...), {byte(guestproto.FrameStdinClose)},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// The caller's end detaches it and is no fault of the guest.
func TestDetach(t *testing.T) {
	hungUp := make(chan struct{})
	c := dialPeer(t, quick, func(conn net.Conn, _ []byte) {
		defer close(hungUp)
		_, _ = io.WriteString(conn, frame(guestproto.FrameHeader, `{`+shellJSON+`,"cursor":0}`))
		_, _ = io.Copy(io.Discard, conn)
	})
	ctx, cancel := context.WithCancel(testContext(t))
	_, err := c.AttachShell(ctx, guestproto.AttachShell{ShellID: "s"}, guestclient.ExecIO{}, func(guestproto.ShellAttached) { cancel() })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	<-hungUp
}

func TestAttachToALiar(t *testing.T) {
	header := frame(guestproto.FrameHeader, `{`+shellJSON+`,"cursor":0}`)
	for _, test := range []struct{ name, sent string }{
		{"AnotherShell", frame(guestproto.FrameHeader, `{`+strings.Replace(shellJSON, `"s"`, `"t"`, 1)+`,"cursor":0}`)},
		{"NoHeader", frame(guestproto.FrameStdout, "x")},
		{"TwoHeaders", header + header},
		{"ResultOfAnother", header + frame(guestproto.FrameResult, `{`+strings.Replace(shellJSON, `"s"`, `"t"`, 1)+`}`)},
		{"HugeWindow", header + frame(guestproto.FrameStdinWindow, "\xff\xff\xff\xff")},
		{"OddWindow", header + frame(guestproto.FrameStdinWindow, "\xff")},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := dialPeer(t, quick, says(test.sent))
			if _, err := c.AttachShell(testContext(t), guestproto.AttachShell{ShellID: "s"}, guestclient.ExecIO{}, nil); !errors.Is(err, api.ErrDamaged) {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestStreamLogs(t *testing.T) {
	asked := make(chan string, 1)
	c := dialPeer(t, quick, func(conn net.Conn, request []byte) {
		asked <- string(request)
		_, _ = io.WriteString(conn, frame(guestproto.FrameStderr, "e")+frame(guestproto.FrameStdout, "o")+frame(guestproto.FrameResult, `{`+serviceJSON+`}`))
	})
	var stdout, stderr bytes.Buffer
	lines := int64(4)
	sv, err := c.StreamLogs(testContext(t), "s", &lines, true, &stdout, &stderr)
	if err != nil || sv.State != "running" || stdout.String() != "o" || stderr.String() != "e" {
		t.Errorf("%+v, %v, %q, %q", sv, err, &stdout, &stderr)
	}
	if d := cmp.Diff(`{"action":"logs_service","stream":true,"service_name":"s","tail_lines":4,"follow":true}`, <-asked); d != "" {
		t.Error(d)
	}
}
