package gvisor_test

import (
	"bytes"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

// dayImageVariable names an environment image with a developer's tools, such as
// the installed debian:12-build.
const dayImageVariable = "PYRO_TEST_IMAGE"

// What a developer does on an ordinary day works in the sandbox. Each script
// ends with "ok" on its last line.
func TestDevelopersDay(t *testing.T) {
	e := newEngine(t)
	image := os.Getenv(dayImageVariable)
	testenv.Require(t, "gvisor-day", image != "", dayImageVariable+" names no image with development tools")
	spec := newSpec(t)
	spec.RootImage, spec.MemMiB, spec.DiskMiB, spec.VCPUCount = image, 2048, 4096, 2
	m := start(t, e, spec)
	client := guestclient.New(m.DialGuest, guestclient.Options{Patience: 5 * time.Minute})
	for _, tt := range []struct{ name, needs, script string }{
		{"git clone", "git", `git init -q a && cd a && git config user.email a@b && git config user.name x &&
			echo 1 >f && git add f && git commit -qm one && cd .. && git clone -q a b && cat b/f && cd b && git gc -q && git fsck && git worktree add -q ../c && test -f ../c/f`},
		{"python venv and wheel", "python3", `python3 - <<'P'
import zipfile
z = zipfile.ZipFile("pkg-1.0-py3-none-any.whl", "w")
z.writestr("pkg.py", "x = 42\n")
z.writestr("pkg-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: pkg\nVersion: 1.0\n")
z.writestr("pkg-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
z.writestr("pkg-1.0.dist-info/RECORD", "pkg.py,,\npkg-1.0.dist-info/METADATA,,\npkg-1.0.dist-info/WHEEL,,\npkg-1.0.dist-info/RECORD,,\n")
z.close()
P
			python3 -m venv v && v/bin/pip install -q --no-index ./pkg-1.0-py3-none-any.whl && v/bin/python -c 'import pkg; assert pkg.x == 42'`},
		{"gcc and make", "gcc", `printf 'int main(void) { return 0; }\n' >p.c && printf 'all: p\np: p.c\n\tgcc -O2 -g -o p p.c\n' >Makefile && make -j2 && ./p`},
		{"node", "node", `node -e 'const h = require("http"); const s = h.createServer((q, r) => r.end("hi")).listen(0, () => h.get({port: s.address().port}, r => { r.on("data", d => { console.log(String(d)); process.exit(String(d) === "hi" ? 0 : 1) }) }))'`},
		{"node watches files", "node", `mkdir -p w && node -e 'const fs = require("fs"); fs.watch("w", (e, f) => process.exit(f === "x" ? 0 : 1)); setTimeout(() => fs.writeFileSync("w/x", "1"), 50); setTimeout(() => process.exit(2), 5000)'`},
		{"inotify", "inotifywait", `mkdir -p i && { inotifywait -q -t 10 -e create i >out & } && sleep 0.5 && touch i/x && wait && grep x out`},
		{"multiprocessing", "python3", `python3 -c 'import multiprocessing as m
if __name__ == "__main__":
    assert sum(m.Pool(4).map(abs, range(-100, 0))) == 5050'`},
		{"sqlite", "python3", `python3 -c 'import sqlite3; c = sqlite3.connect("d.db"); c.execute("pragma journal_mode=wal"); c.execute("create table t(x)"); c.execute("insert into t values(1)"); c.commit(); assert c.execute("select x from t").fetchone() == (1,)'`},
		{"pty in a program", "python3", `python3 -c 'import pty, sys; sys.exit(pty.spawn(["sh", "-c", "test -t 0 && stty size"]) >> 8)'`},
		{"web server and curl", "curl", `echo hello >index.html; python3 -m http.server 8123 --bind 127.0.0.1 >/dev/null 2>&1 & p=$!; r=; for i in 1 2 3 4 5 6 7 8 9 10; do r=$(curl -s http://127.0.0.1:8123/index.html) && break; sleep 0.3; done; kill $p; test "$r" = hello`},
		{"tmux", "tmux", `export TERM=xterm; tmux new -d -s s 'sleep 60' && tmux send-keys -t s x && tmux kill-server`},
		{"hard links and locks", "flock", `echo 1 >l1 && ln l1 l2 && test "$(stat -c %h l1)" = 2 && flock l1 true`},
		{"rename directories of the environment", "sh", `mv /usr/share/doc /usr/share/doc2 && mv /usr/share/doc2 /usr/share/doc && test -d /usr/share/doc`},
		{"package manager", "dpkg", `dpkg -l | grep -q dpkg && dpkg --audit`},
		{"other users", "su", `chmod 777 . && su nobody -s /bin/sh -c 'id -un && touch owned' && test "$(stat -c %U owned)" = nobody`},
		{"strace", "strace", `strace -o s true && grep -q exit s`},
		{"go", "go", `mkdir g && cd g && go mod init g && printf 'package main\nfunc main() { println("hi") }\n' >main.go && go build . && ./g`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			script := "command -v " + tt.needs + " >/dev/null || { echo absent; exit 0; }; mkdir -p /workspace/day && cd /workspace/day && ( set -e; " + tt.script + " ) && echo ok"
			begin := time.Now()
			r, err := client.ExecPlain(t.Context(), guestproto.ExecRequest{Argv: []string{"sh", "-c", script}, TimeoutSeconds: 120})
			if err != nil {
				t.Fatal(err)
			}
			switch {
			case r.Stdout == "absent\n":
				t.Skipf("the image has no %s", tt.needs)
			case !strings.HasSuffix(r.Stdout, "ok\n"):
				t.Errorf("exit code %d\n%s%s", r.ExitCode, r.Stdout, r.Stderr)
			}
			t.Logf("%s", time.Since(begin).Round(time.Millisecond))
		})
	}
	t.Run("terminal", func(t *testing.T) {
		var out bytes.Buffer
		r, err := client.Exec(t.Context(), guestproto.ExecRequest{
			Command: "stty size; tty; test -t 0 && echo terminal", TTY: &guestproto.Resize{Cols: 100, Rows: 40},
		}, guestclient.ExecIO{Stdout: &out})
		if err != nil || r.ExitCode != 0 {
			t.Fatalf("%+v, %v", r, err)
		}
		if got := out.String(); !strings.HasPrefix(got, "40 100\r\n/dev/pts/") || !strings.HasSuffix(got, "terminal\r\n") {
			t.Errorf("a terminal of 100x40 says %q", got)
		}
	})
}
