package workspace

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/environment"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/passwd"
	"github.com/pyro-mcp/pyro/internal/seed"
	"github.com/pyro-mcp/pyro/internal/supervisor"
	"github.com/pyro-mcp/pyro/internal/workspacedisk"
)

// sourceAt says what the file or directory at path on this host holds; the
// empty source for "".
func sourceAt(path string, includeIgnored bool) (seed.Source, error) {
	if path == "" {
		return seed.Source{}, nil
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return seed.Source{}, err
	}
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return seed.Source{}, api.WithHint(api.Errorf(api.ErrInvalid, "%s does not exist", path), "name a directory or a tar archive on this host")
	case err != nil:
		return seed.Source{}, err
	case !st.IsDir() && !st.Mode().IsRegular():
		return seed.Source{}, api.WithHint(api.Errorf(api.ErrInvalid, "%s is neither a directory nor a file", path), "name a directory or a tar archive")
	}
	return seed.Source{Path: path, IncludeIgnored: includeIgnored}, nil
}

// ingredients gets the environment's image and the seed. Either is nil where
// there is none.
func (m *Manager) ingredients(ctx context.Context, c engine.Candidate, source seed.Source, req api.CreateRequest) (*environment.Image, *seed.Seed, error) {
	var image *environment.Image
	if c.NeedsImage {
		var err error
		if image, err = m.environments.Use(ctx, req.Environment, req.Progress); err != nil {
			return nil, nil, err
		}
	}
	if source.Path == "" {
		return image, nil, nil
	}
	sd, err := m.makeSeed(ctx, c, source, image, req)
	if err != nil {
		image.Close()
		return nil, nil, err
	}
	return image, sd, nil
}

// makeSeed makes the seed of a workspace on that image.
func (m *Manager) makeSeed(ctx context.Context, c engine.Candidate, source seed.Source, image *environment.Image, req api.CreateRequest) (*seed.Seed, error) {
	if c.SeedLayer {
		// No guest will give these files to its user.
		var err error
		if source.UID, source.GID, err = idsIn(ctx, image, runsAs(req, image)); err != nil {
			return nil, err
		}
	}
	seeds, err := m.seeds()
	if err != nil {
		return nil, err
	}
	return seeds.Build(ctx, source, req.Progress)
}

// runsAs is who the commands of a new workspace run as.
func runsAs(req api.CreateRequest, image *environment.Image) string {
	return cmp.Or(req.User, image.Config.User)
}

// idsIn looks a user up as a guest of that image does, before there is one.
func idsIn(ctx context.Context, image *environment.Image, user string) (uid, gid uint32, err error) {
	if api.IsRoot(user) {
		return 0, 0, nil
	}
	if err := api.CheckUser(user); err != nil {
		return 0, 0, err
	}
	d, err := workspacedisk.Open(ctx, workspacedisk.Source{Path: image.Path, Format: workspacedisk.FormatRaw}, workspacedisk.Options{})
	if err != nil {
		return 0, 0, err
	}
	defer d.Close()
	u, err := passwd.Database(func(path string, limit int64) ([]byte, error) {
		data, err := d.ReadLinked(ctx, path, limit)
		if errors.Is(err, api.ErrNotFound) {
			return nil, nil
		}
		return data, err
	}).Look(user)
	if err != nil {
		return 0, 0, err
	}
	return u.UID, u.GID, nil
}

// upload puts the seed's files into the guest.
func upload(ctx context.Context, p *supervisor.Process, sd *seed.Seed, progress func(api.Progress)) error {
	progress(api.Progress{Phase: "seed", Message: "copying the seed into the guest"})
	client := guestclient.New(p.DialGuest, guestclient.Options{Patience: patience(p.Status.TimeScale)})
	r, w := io.Pipe()
	defer r.Close()
	go func() {
		meter := &meter{w: w, report: func(n int64) {
			progress(api.Progress{Phase: "seed", Message: "copying the seed into the guest", Done: n, Total: max(n, sd.Info.BytesWritten)})
		}}
		w.CloseWithError(sd.WriteTar(ctx, meter))
	}()
	if _, err := client.UploadArchive(ctx, api.WorkspacePath, r); err != nil {
		return fmt.Errorf("copying the seed into the guest: %w", err)
	}
	return nil
}

// meter reports how much has gone through it, some ten times a second at most.
type meter struct {
	w      io.Writer
	n      int64
	last   time.Time
	report func(int64)
}

func (m *meter) Write(p []byte) (int, error) {
	n, err := m.w.Write(p)
	m.n += int64(n)
	if now := time.Now(); now.Sub(m.last) > 100*time.Millisecond {
		m.last = now
		m.report(m.n)
	}
	return n, err
}
