package cli

import (
	"bytes"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// leaves calls do for every command that does something by itself.
func leaves(cmd *cobra.Command, do func(*cobra.Command)) {
	for _, sub := range cmd.Commands() {
		leaves(sub, do)
	}
	if !cmd.HasSubCommands() && !cmd.Hidden {
		do(cmd)
	}
}

func TestEveryCommandHasAnExample(t *testing.T) {
	leaves(Tree(), func(cmd *cobra.Command) {
		if !strings.Contains(cmd.Example, cmd.CommandPath()) {
			t.Errorf("%s has no example of itself, but %q", cmd.CommandPath(), cmd.Example)
		}
		for line := range strings.SplitSeq(cmd.Example, "\n") {
			if !strings.HasPrefix(line, "  ") {
				t.Errorf("%s: the example %q is not indented", cmd.CommandPath(), line)
			}
		}
	})
}

// Wrong words are told in the words of the usage line.
func TestUsageErrors(t *testing.T) {
	t.Setenv("PYRO_STATE_DIR", t.TempDir()+"/state")
	t.Setenv("PYRO_CACHE_DIR", t.TempDir()+"/cache")
	for _, c := range []struct {
		args   string
		status int
		want   string
	}{
		{"workspace status", 2, "WORKSPACE is missing, as in: pyro workspace status WORKSPACE"},
		{"workspace file read w", 2, "PATH is missing, as in: pyro workspace file read WORKSPACE PATH"},
		{"workspace file list w a b", 2, `"b" is one argument too many for: pyro workspace file list WORKSPACE [PATH]`},
		{"workspace list w", 2, `"w" is one argument too many for: pyro workspace list`},
		{"workspace export w", 2, "PATH is missing, as in: pyro workspace export WORKSPACE PATH --output HOST_PATH"},
		{"workspace file write w", 2, "PATH is missing"},
		{"prepare a b", 2, `"b" is one argument too many`},
		{"workspce", 2, `unknown command "workspce" for "pyro"; there is workspace`},
		{"zzzz", 2, `unknown command "zzzz" for "pyro"` + "\n"},
		{"workspace update w --ttl-seconds soon", 2, `--ttl-seconds is "soon" and must be a number` + "\n"},
		{"workspace create e --vcpu-count 1.5", 2, `--vcpu-count is "1.5" and must be a whole number` + "\n"},
		{"workspace shell open w --cols 70000", 2, `--cols is "70000" and must be a whole number from 0 to 65535`},
		{"run e --network -- true", 125, "--network was given no value"},
		{"workspace exec w --cwd -- true", 125, "--cwd was given no value"},
		{"workspace create e --seed-path=", 2, "--seed-path is empty"},
		{"workspace create e --name=", 2, "--name is empty"},
		{"workspace logs w --tail -1", 2, "numbers above 0"},
		{"workspace service logs w s --all --tail-lines 3", 2, "--all and --tail-lines exclude each other"},
		{"workspace service start w s --publish x -- y", 2, `--publish "x" is no port`},
		{"workspace file write w p --text-file /", 2, "--text-file: read /: is a directory"},
		{"workspace list --label a=b", 0, "no workspace has the labels a=b"},
	} {
		t.Run(c.args, func(t *testing.T) {
			var out, errs bytes.Buffer
			status := Main(strings.Split(c.args, " "), Streams{In: strings.NewReader(""), Out: &out, Err: &errs})
			if status != c.status || !strings.Contains(errs.String(), c.want) || out.Len() > 0 {
				t.Errorf("status %d, stdout %q, stderr %q; want %d and %q", status, out.String(), errs.String(), c.status, c.want)
			}
		})
	}
}

// A name shows as it is or, where it would not, quoted.
func TestNameText(t *testing.T) {
	for name, want := range map[string]string{
		"plain/näme": "plain/näme", "a b": "a b",
		"a\nb": `"a\nb"`, "caf\xe9": `"caf\xe9"`, "\x1b[31mred": `"\x1b[31mred"`, `q"q`: `"q\"q"`, "\u202eevil": `"\u202eevil"`,
	} {
		if got := nameText(name); got != want {
			t.Errorf("%q is shown as %s, want %s", name, got, want)
		}
	}
}

// What a hint tells to paste keeps its lines.
func TestHintOfSeveralLines(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	t.Setenv("HOME", t.TempDir())
	var out, errs bytes.Buffer
	Main([]string{"host", "connect", "codex"}, Streams{In: strings.NewReader(""), Out: &out, Err: &errs})
	if !strings.Contains(errs.String(), "\n[mcp_servers.pyro]\n") {
		t.Errorf("the table's header has no line of its own in %q", errs.String())
	}
}
