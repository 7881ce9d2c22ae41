package cli

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/pyro-mcp/pyro"
	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/boundedlog"
)

func newSyncCmd(a *app) *cobra.Command {
	return group("sync", "Bring files of this host into a workspace", newSyncPushCmd(a))
}

type syncOptions struct{ req api.SyncRequest }

func newSyncPushCmd(a *app) *cobra.Command {
	o := &syncOptions{}
	cmd := &cobra.Command{
		Use: "push WORKSPACE SOURCE", Short: "Copy a directory or archive over a workspace's files, all of it or nothing",
		Long: `Push copies the content of a directory or of a tar archive over a directory of a
running workspace. Files that are there and not in the source stay. If it fails
or is broken off, the workspace is as it was.`,
		Example:           "  pyro workspace sync push fix ./patches --dest /workspace/patches\n  pyro workspace sync push fix vendor.tar.gz",
		ValidArgsFunction: a.completeWorkspace,
		Args:              args(named),
		RunE: a.withClient(func(ctx context.Context, c *pyro.Client, given []string) error {
			o.req.SourcePath = given[1]
			progress := a.newProgress()
			o.req.Progress = progress.show
			res, err := c.SyncPush(ctx, given[0], o.req)
			progress.clear()
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(res)
			}
			fmt.Fprintf(a.Out, "copied %s (%s) to %s\n", entriesText(res.EntryCount), humanize.IBytes(uint64(res.BytesWritten)), boundedlog.Printable(res.Destination))
			a.noteSkipped(res.Skipped, res.SkippedCount)
			return nil
		}),
	}
	cmd.Flags().StringVar(&o.req.Destination, "dest", api.WorkspacePath, "directory in the workspace")
	cmd.Flags().BoolVar(&o.req.IncludeIgnored, "include-ignored", false, "also take what a Git checkout ignores")
	cmd.Flags().BoolVar(&a.quiet, "quiet", false, "no progress and no report of what was left out on stderr")
	return cmd
}

func newFileCmd(a *app) *cobra.Command {
	return group("file", "List, read and write files of a running workspace", newFileListCmd(a), newFileReadCmd(a), newFileWriteCmd(a))
}

type fileOptions struct {
	recursive   bool
	offset      int64
	maxBytes    int64
	contentOnly bool
	text        string
	textFile    string
	stdin       bool
}

func newFileListCmd(a *app) *cobra.Command {
	o := &fileOptions{}
	cmd := &cobra.Command{
		Use: "list WORKSPACE [PATH]", Short: "List a directory (default /workspace)",
		Example:           "  pyro workspace file list fix\n  pyro workspace file list fix src --recursive --json",
		ValidArgsFunction: a.completeWorkspace,
		Args:              args(named),
		RunE: a.withClient(func(ctx context.Context, c *pyro.Client, given []string) error {
			path := api.WorkspacePath
			if len(given) > 1 {
				path = given[1]
			}
			list, err := c.ListFiles(ctx, given[0], path, o.recursive)
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(list)
			}
			if err := a.printEntries(list.Entries); err != nil {
				return err
			}
			if list.Truncated {
				fmt.Fprintf(a.Err, "pyro: only the first %d entries are shown; list a directory below it for more\n", len(list.Entries))
			}
			return nil
		}),
	}
	cmd.Flags().BoolVarP(&o.recursive, "recursive", "r", false, "list all levels")
	return cmd
}

func newFileReadCmd(a *app) *cobra.Command {
	o := &fileOptions{}
	cmd := &cobra.Command{
		Use: "read WORKSPACE PATH", Short: "Print a part of a file",
		Example:           "  pyro workspace file read fix src/main.c\n  pyro workspace file read fix big.log --offset 65536 --content-only",
		ValidArgsFunction: a.completeWorkspace,
		Args:              args(named),
		RunE: a.withClient(func(ctx context.Context, c *pyro.Client, given []string) error {
			if err := a.notWithJSON("content-only", o.contentOnly); err != nil {
				return err
			}
			r, err := c.ReadFile(ctx, given[0], given[1], o.offset, o.maxBytes)
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(r)
			}
			record := fmt.Sprintf("[file-read] workspace_id=%s path=%s size_bytes=%d truncated=%t", r.WorkspaceID, boundedlog.Printable(r.Path), r.SizeBytes, r.Truncated)
			if r.Truncated {
				record += fmt.Sprintf("; go on with --offset %d", r.Offset+r.MaxBytes)
			}
			return a.printContent(r.Content, r.ContentBase64, o.contentOnly, record)
		}),
	}
	cmd.Flags().Int64Var(&o.maxBytes, "max-bytes", 65536, "read at most this many bytes")
	cmd.Flags().Int64Var(&o.offset, "offset", 0, "byte to begin at")
	cmd.Flags().BoolVar(&o.contentOnly, "content-only", false, "print the file's bytes as they are and nothing else")
	return cmd
}

// printContent prints a file's content on stdout and a record on stderr. On a
// terminal, control characters of the guest's are made visible.
func (a *app) printContent(text, encoded string, only bool, record string) error {
	content := []byte(text)
	if encoded != "" {
		var err error
		if content, err = base64.StdEncoding.DecodeString(encoded); err != nil {
			return err
		}
	}
	if only {
		_, err := a.Out.Write(content)
		return err
	}
	if _, err := a.filtered(a.Out, false).Write(content); err != nil {
		return err
	}
	if n := len(content); n > 0 && content[n-1] != '\n' && isTerminal(a.Out) {
		fmt.Fprintln(a.Out)
	}
	fmt.Fprintln(a.Err, record)
	return nil
}

// filtered returns where what a guest made goes: straight through, or, on a
// terminal, past a filter, because the guest must not drive it.
func (a *app) filtered(to io.Writer, raw bool) io.Writer {
	if !raw && isTerminal(to) {
		return &terminalFilter{to: to}
	}
	return to
}

func newFileWriteCmd(a *app) *cobra.Command {
	o := &fileOptions{}
	cmd := &cobra.Command{
		Use: "write WORKSPACE PATH (--text TEXT | --text-file FILE | --stdin)", Short: "Write a file, all of it or nothing",
		Example:           "  pyro workspace file write fix notes.txt --text 'remember this'\n  pyro workspace file write fix config.yml --text-file ./config.yml",
		ValidArgsFunction: a.completeWorkspace,
		Args:              args(named),
		RunE: func(cmd *cobra.Command, given []string) error {
			content, err := a.oneInput(cmd, "text", o.text, "text-file", o.textFile, o.stdin, maxFileInput)
			if err != nil {
				return err
			}
			return a.withClient(func(ctx context.Context, c *pyro.Client, given []string) error {
				res, err := c.WriteFile(ctx, given[0], given[1], content)
				if err != nil {
					return err
				}
				if a.json {
					return a.printJSON(res)
				}
				_, err = fmt.Fprintf(a.Out, "wrote %d bytes to %s\n", res.BytesWritten, boundedlog.Printable(res.Path))
				return err
			})(cmd, given)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.text, "text", "", "the content")
	f.StringVar(&o.textFile, "text-file", "", "file of this host that holds the content")
	f.BoolVar(&o.stdin, "stdin", false, "read the content from stdin")
	return cmd
}

// The bounds of what is read from this host for one request, a little above
// what the SDK takes so that it is the one to refuse.
const (
	maxFileInput  = 1<<20 + 1
	maxPatchInput = 64<<20 + 1
)

// oneInput returns the content that exactly one of three flags gives.
func (a *app) oneInput(cmd *cobra.Command, textFlag, text, fileFlag, file string, stdin bool, limit int64) ([]byte, error) {
	var given []string
	for _, f := range []string{textFlag, fileFlag, "stdin"} {
		if cmd.Flags().Changed(f) {
			given = append(given, "--"+f)
		}
	}
	if len(given) != 1 {
		what := "none"
		if len(given) > 0 {
			what = strings.Join(given, " and ")
		}
		return nil, usageError{fmt.Errorf("give exactly one of --%s, --%s and --stdin; there is %s", textFlag, fileFlag, what)}
	}
	switch {
	case cmd.Flags().Changed(textFlag):
		return []byte(text), nil
	case stdin:
		return io.ReadAll(io.LimitReader(a.In, limit))
	}
	content, err := readAtMost(file, limit)
	if errors.Is(err, os.ErrNotExist) {
		return nil, api.WithHint(api.Errorf(api.ErrInvalid, "--%s: %s does not exist", fileFlag, file), "name a file on this host")
	}
	if err != nil {
		return nil, api.WithHint(api.Errorf(api.ErrInvalid, "--%s: %v", fileFlag, err), "name a file on this host")
	}
	return content, nil
}

func readAtMost(file string, limit int64) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit))
}

func newPatchCmd(a *app) *cobra.Command {
	return group("patch", "Apply patches to a workspace", newPatchApplyCmd(a))
}

type patchOptions struct {
	patch     string
	patchFile string
	stdin     bool
}

func newPatchApplyCmd(a *app) *cobra.Command {
	o := &patchOptions{}
	cmd := &cobra.Command{
		Use: "apply WORKSPACE (--patch TEXT | --patch-file FILE | --stdin)", Short: "Apply a unified or git-style patch, all of it or nothing",
		Example:           "  git diff | pyro workspace patch apply fix --stdin",
		ValidArgsFunction: a.completeWorkspace,
		Args:              args(named),
		RunE: func(cmd *cobra.Command, given []string) error {
			text, err := a.oneInput(cmd, "patch", o.patch, "patch-file", o.patchFile, o.stdin, maxPatchInput)
			if err != nil {
				return err
			}
			return a.withClient(func(ctx context.Context, c *pyro.Client, given []string) error {
				res, err := c.ApplyPatch(ctx, given[0], text)
				if err != nil {
					return err
				}
				if a.json {
					return a.printJSON(res)
				}
				for _, e := range res.Entries {
					fmt.Fprintf(a.Out, "%-9s %s\n", e.Status, nameText(e.Path))
				}
				return nil
			})(cmd, given)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.patch, "patch", "", "the patch")
	f.StringVar(&o.patchFile, "patch-file", "", "file of this host that holds the patch")
	f.BoolVar(&o.stdin, "stdin", false, "read the patch from stdin")
	return cmd
}
