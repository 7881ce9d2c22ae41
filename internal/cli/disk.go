package cli

import (
	"bufio"
	"context"
	"fmt"
	"strconv"

	"github.com/dustin/go-humanize"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/spf13/cobra"

	"github.com/pyro-mcp/pyro"
	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/boundedlog"
)

// diskOptions are those of all disk commands; each uses its part.
type diskOptions struct {
	image       string
	format      string
	path        string
	recursive   bool
	maxBytes    int64
	contentOnly bool
	output      string
}

// defaultDiskPath is the directory that a listing shows when none is named.
const defaultDiskPath = "/workspace"

func newDiskCmd(a *app) *cobra.Command {
	cmd := group("disk", "Look into a disk image without starting it",
		newDiskListCmd(a), newDiskReadCmd(a), newDiskExportCmd(a), newDiskScrubCmd(a))
	cmd.Long = `These commands work on any raw or qcow2 image file with an ext4 file system. The
image may be hostile: nothing is mounted, and no other file that the image names
is opened. An image that a running machine uses is refused.`
	return cmd
}

// newDiskSub returns a disk command with the flag that all share.
func newDiskSub(o *diskOptions, cmd *cobra.Command) *cobra.Command {
	cmd.Flags().StringVar(&o.format, "format", pyro.DiskAuto, "the image's format: raw, qcow2, or auto, which looks at its first bytes")
	return cmd
}

func newDiskListCmd(a *app) *cobra.Command {
	o := &diskOptions{}
	cmd := newDiskSub(o, &cobra.Command{
		Use: "list IMAGE [PATH]", Short: "List a directory of the image (default " + defaultDiskPath + ")",
		Example: "  pyro disk list disk.ext4 / --recursive\n  pyro disk list disk.qcow2 /etc --json",
		Args:    args(named),
		RunE: func(cmd *cobra.Command, given []string) error {
			o.image, o.path = given[0], defaultDiskPath
			if len(given) > 1 {
				o.path = given[1]
			}
			return runDiskList(cmd.Context(), a, o)
		},
	})
	cmd.Flags().BoolVarP(&o.recursive, "recursive", "r", false, "list all levels")
	return cmd
}

func newDiskReadCmd(a *app) *cobra.Command {
	o := &diskOptions{}
	cmd := newDiskSub(o, &cobra.Command{
		Use: "read IMAGE PATH", Short: "Print the beginning of a regular file of the image",
		Example: "  pyro disk read disk.ext4 /etc/passwd\n  pyro disk read disk.ext4 /var/log/dpkg.log --max-bytes 10000000 --content-only > dpkg.log",
		Args:    args(named),
		RunE: func(cmd *cobra.Command, given []string) error {
			o.image, o.path = given[0], given[1]
			if err := a.notWithJSON("content-only", o.contentOnly); err != nil {
				return err
			}
			return runDiskRead(cmd.Context(), a, o)
		},
	})
	cmd.Flags().Int64Var(&o.maxBytes, "max-bytes", 65536, "read at most this many bytes")
	cmd.Flags().BoolVar(&o.contentOnly, "content-only", false, "print the file's bytes as they are and nothing else")
	return cmd
}

func newDiskExportCmd(a *app) *cobra.Command {
	o := &diskOptions{}
	cmd := newDiskSub(o, &cobra.Command{
		Use: "export IMAGE", Short: "Write the image's filesystem to a new raw ext4 image",
		Long: `Export writes a raw, sparse ext4 image. It appears only when it is complete. If
the machine that used the disk was killed, the copy's journal is recovered; the
runtime paths of pyro (/run/pyro-secrets, /run/pyro-services, /run/pyro-shells)
are scrubbed from it.`,
		Example: "  pyro disk export disk.qcow2 --output disk.ext4",
		Args:    args(named),
		RunE: func(cmd *cobra.Command, given []string) error {
			o.image = given[0]
			if o.output == "" {
				return usageError{api.Errorf(api.ErrInvalid, "--output is required")}
			}
			return runDiskExport(cmd.Context(), a, o)
		},
	})
	cmd.Flags().StringVarP(&o.output, "output", "o", "", "the file to write; it must not exist")
	return cmd
}

func newDiskScrubCmd(a *app) *cobra.Command {
	o := &diskOptions{}
	return newDiskSub(o, &cobra.Command{
		Use: "scrub IMAGE", Short: "Remove pyro's runtime paths from the image, with their data",
		Long: `Scrub removes /run/pyro-secrets, /run/pyro-services and /run/pyro-shells, wipes
what they held, and recovers the journal, so that no later mount brings them
back. It works on a copy that takes the image's place when it is proven clean.`,
		Example: "  pyro disk scrub disk.ext4",
		Args:    args(named),
		RunE: func(cmd *cobra.Command, given []string) error {
			o.image = given[0]
			return runDiskScrub(cmd.Context(), a, o)
		},
	})
}

func runDiskList(ctx context.Context, a *app, o *diskOptions) error {
	d, err := pyro.OpenDisk(ctx, o.image, o.format)
	if err != nil {
		return err
	}
	defer d.Close()
	list, err := d.List(ctx, o.path, o.recursive)
	if err != nil {
		return err
	}
	if a.json {
		return a.printList(list)
	}
	return a.printEntries(list.Entries)
}

// printList is printJSON for listings, which can be long: the type's fields
// are declared in the order of their JSON names, so that no map has to sort
// them, and one pass writes them indented; both take most of the time of
// listing 10,000 files otherwise.
func (a *app) printList(list *api.DiskList) error {
	w := bufio.NewWriter(a.Out)
	if err := json.MarshalWrite(w, list, jsontext.WithIndent("  "), jsontext.AllowInvalidUTF8(true)); err != nil {
		return err
	}
	if err := w.WriteByte('\n'); err != nil {
		return err
	}
	return w.Flush()
}

// printEntries prints a listing for people.
func (a *app) printEntries(entries []api.DiskEntry) error {
	w := bufio.NewWriter(a.Out)
	for _, e := range entries {
		path, err := e.RawPath()
		if err != nil {
			return err
		}
		line := fmt.Sprintf("%-9s %12s  %s", e.ArtifactType, strconv.FormatInt(e.SizeBytes, 10), nameText(path))
		if e.LinkTarget != nil {
			line += " -> " + nameText(*e.LinkTarget)
		}
		fmt.Fprintln(w, line)
	}
	return w.Flush()
}

func runDiskRead(ctx context.Context, a *app, o *diskOptions) error {
	d, err := pyro.OpenDisk(ctx, o.image, o.format)
	if err != nil {
		return err
	}
	defer d.Close()
	if o.contentOnly {
		return d.CopyFile(ctx, a.Out, o.path, o.maxBytes)
	}
	r, err := d.Read(ctx, o.path, o.maxBytes)
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(r)
	}
	return a.printContent(r.Content, r.ContentBase64, false, diskReadRecord(r))
}

// diskReadRecord is the line on stderr behind a file's content.
func diskReadRecord(r *api.DiskRead) string {
	return fmt.Sprintf("[disk-read] path=%s size_bytes=%d truncated=%t", boundedlog.Printable(r.Path), r.SizeBytes, r.Truncated)
}

func runDiskExport(ctx context.Context, a *app, o *diskOptions) error {
	d, err := pyro.OpenDisk(ctx, o.image, o.format)
	if err != nil {
		return err
	}
	defer d.Close()
	res, err := d.Export(ctx, o.output)
	if err != nil {
		return err
	}
	return a.printDiskExport(res)
}

func (a *app) printDiskExport(res *api.DiskExport) error {
	if a.json {
		return a.printJSON(res)
	}
	_, err := fmt.Fprintf(a.Out, "wrote %s (%s, %s)\n", res.OutputPath, res.DiskFormat, humanize.IBytes(uint64(res.BytesWritten)))
	return err
}

func runDiskScrub(ctx context.Context, a *app, o *diskOptions) error {
	res, err := pyro.ScrubDisk(ctx, o.image, o.format)
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(res)
	}
	for _, p := range res.Removed {
		fmt.Fprintf(a.Out, "removed %s\n", p)
	}
	if len(res.Removed) == 0 {
		fmt.Fprintln(a.Out, "nothing to remove")
	}
	return nil
}
