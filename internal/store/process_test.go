package store_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/hostproc"
	"github.com/pyro-mcp/pyro/internal/store"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

const childVariable = "PYRO_STORE_TEST_CHILD"

// The test binary is also the other processes that use the database.
func TestMain(m *testing.M) {
	child := map[string]func(place) error{
		"write": writeForEver, "many": writeMany, "hold": holdTheLock, "readonly": readOnly, "full": fillTheDisk,
	}[os.Getenv(childVariable)]
	if child == nil {
		os.Exit(m.Run())
	}
	dir := os.Args[1]
	if err := child(place{filepath.Join(dir, "state.db"), store.Options{WorkspacesDir: filepath.Join(dir, "workspaces")}}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func child(t testing.TB, what string, p place) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0], filepath.Dir(p.path))
	cmd.Env = append(os.Environ(), childVariable+"="+what)
	return cmd
}

// writeForEver changes workspaces and says what was acknowledged.
func writeForEver(p place) error {
	ctx := context.Background()
	s, err := store.Open(ctx, p.path, p.opts)
	if err != nil {
		return err
	}
	for i := 0; ; i++ {
		w, err := s.Update(ctx, "a", func(w *store.Workspace) error { w.ResetCount++; return nil }, store.Event{Kind: "reset"})
		if err != nil {
			return err
		}
		n, err := s.BeginCommand(ctx, "a", api.CommandRecord{StartedAt: time.Now()}, hostproc.Identity{})
		if err != nil {
			return err
		}
		fmt.Println(w.ResetCount, n)
	}
}

// Killed at any instant, the database has all that was acknowledged, and opens
// without a repair.
func TestKilledWriterLosesNothing(t *testing.T) {
	p := newPlace(t)
	s := p.open(t)
	mustCreate(t, s, workspace("a", ""))
	must(t, s.Close())
	resets, commands := int64(0), int64(0)
	for round := range 10 {
		cmd := child(t, "write", p)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		lines := bufio.NewReader(out)
		for range 5 + 3*round {
			line, err := lines.ReadString('\n')
			must(t, err)
			_, err = fmt.Sscan(line, &resets, &commands)
			must(t, err)
		}
		must(t, cmd.Process.Kill())
		for { // what it had said before it died counts as well
			line, err := lines.ReadString('\n')
			if err != nil {
				break
			}
			_, err = fmt.Sscan(line, &resets, &commands)
			must(t, err)
		}
		cmd.Wait() //nolint:errcheck // it was killed
		if _, err := os.Stat(p.path + "-wal"); err != nil {
			t.Fatalf("the writer left no journal: %v", err)
		}
		s := p.open(t)
		w, err := s.Get(t.Context(), "a")
		must(t, err)
		if w.ResetCount < resets || w.ResetCount > resets+1 || w.LastEvent != w.ResetCount || w.LastCommand < commands || w.LastCommand > commands+1 {
			t.Fatalf("round %d: acknowledged %d and %d, found %d, %d and %d", round, resets, commands, w.ResetCount, w.LastEvent, w.LastCommand)
		}
		must(t, s.Close())
	}
}

// A database that broke in the crash is not used.
func TestCheckedAfterCrash(t *testing.T) {
	p := three(t)
	// A row that breaks a rule of the table: no query notices.
	p.exec(t, "PRAGMA writable_schema=1; UPDATE sqlite_schema SET sql = replace(sql, 'name             TEXT UNIQUE', 'name TEXT NOT NULL UNIQUE') WHERE name = 'workspaces'; UPDATE workspaces SET name = NULL WHERE id = 'c'")
	if got, err := p.list(t); err != nil || len(got) != 3 {
		t.Fatalf("after a clean end: %v, %v", got, err)
	}
	cmd := child(t, "write", p)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	cmd.Process.Kill() //nolint:errcheck // it may have failed by itself
	cmd.Wait()         //nolint:errcheck // it was killed
	if err == nil {
		t.Logf("the writer wrote %s", strings.TrimSpace(line))
	}
	if got, err := p.list(t); !errors.Is(err, api.ErrDamaged) || !strings.Contains(err.Error(), "NULL value") {
		t.Errorf("after a crash: %v, %v", got, err)
	}
}

// perProcess is even.
const perProcess = 20

// writeMany does perProcess changes of every kind.
func writeMany(p place) error {
	ctx := context.Background()
	s, err := store.Open(ctx, p.path, p.opts)
	if err != nil {
		return err
	}
	for i := range perProcess {
		id := fmt.Sprintf("w-%d-%d", os.Getpid(), i)
		if err := s.Create(ctx, workspace(id, id)); err != nil {
			return err
		}
		if _, err := s.Update(ctx, "a", func(w *store.Workspace) error { w.ResetCount++; return nil }); err != nil {
			return err
		}
		n, err := s.BeginCommand(ctx, "a", api.CommandRecord{StartedAt: time.Now()}, hostproc.Identity{})
		if err != nil {
			return err
		}
		if err := s.FinishCommand(ctx, "a", n, store.CommandResult{State: "exited", EndedAt: time.Now()}); err != nil {
			return err
		}
		if i%2 == 0 {
			if err := s.Delete(ctx, id); err != nil {
				return err
			}
			if err := os.Remove(p.dir(id)); err != nil {
				return err
			}
		}
		if i%10 == 0 { // others come and go
			if err := s.Close(); err != nil {
				return err
			}
			if s, err = store.Open(ctx, p.path, p.opts); err != nil {
				return err
			}
		}
	}
	return s.Close()
}

// Eight processes write at once, open and close.
func TestManyProcesses(t *testing.T) {
	p := newPlace(t)
	s := p.open(t)
	mustCreate(t, s, workspace("a", ""))
	must(t, s.Close())
	const processes = 8
	var wg sync.WaitGroup
	for range processes {
		wg.Go(func() {
			if out, err := child(t, "many", p).CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
	wg.Wait()
	s = p.open(t)
	w, err := s.Get(t.Context(), "a")
	if err != nil || w.ResetCount != processes*perProcess || w.CommandCount != processes*perProcess || w.LastCommand != processes*perProcess {
		t.Errorf("%d updates, %d commands, last %d, %v", w.ResetCount, w.CommandCount, w.LastCommand, err)
	}
	if all, err := s.List(t.Context()); err != nil || len(all) != 1+processes*perProcess/2 {
		t.Errorf("%d workspaces, %v", len(all), err)
	}
	if running, err := s.RunningCommands(t.Context(), "a"); err != nil || len(running) != 0 {
		t.Errorf("%d commands run, %v", len(running), err)
	}
	// The last copy is the newest, whoever wrote it.
	must(t, s.Close())
	must(t, os.Remove(p.path))
	if r, err := store.Repair(t.Context(), p.path, p.opts); err != nil || r.Workspaces != 1+processes*perProcess/2 || len(r.Skipped) != 0 {
		t.Fatalf("%d workspaces, %d skipped, %v", r.Workspaces, len(r.Skipped), err)
	}
	if w, err := p.open(t).Get(t.Context(), "a"); err != nil || w.ResetCount != processes*perProcess {
		t.Errorf("the copy has %d updates, %v", w.ResetCount, err)
	}
}

func TestFiftyGoroutines(t *testing.T) {
	s := newPlace(t).open(t)
	mustCreate(t, s, workspace("a", ""))
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			for range 4 {
				if _, err := s.Update(t.Context(), "a", func(w *store.Workspace) error { w.ResetCount++; return nil }); err != nil {
					t.Error(err)
				}
				journal(t, s, "a")
				if _, err := s.List(t.Context()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if w, err := s.Get(t.Context(), "a"); err != nil || w.ResetCount != 200 || w.CommandCount != 200 {
		t.Errorf("%d updates, %d commands, %v", w.ResetCount, w.CommandCount, err)
	}
}

// holdTheLock keeps a transaction open until its standard input ends.
func holdTheLock(p place) error {
	s, err := store.Open(context.Background(), p.path, p.opts)
	if err != nil {
		return err
	}
	defer s.Close()
	_, _ = s.Update(context.Background(), "a", func(*store.Workspace) error {
		fmt.Println("held")
		_, err := os.Stdin.Read(make([]byte, 1))
		return err
	})
	return nil
}

func TestLockedByAnotherProcess(t *testing.T) {
	p := three(t)
	cmd := child(t, "hold", p)
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	defer cmd.Wait() //nolint:errcheck // it is told to end
	defer in.Close()
	_, err = bufio.NewReader(out).ReadString('\n')
	must(t, err)

	p.opts.BusyTimeout = 100 * time.Millisecond
	s := p.open(t)
	began := time.Now()
	err = s.Touch(t.Context(), "a", time.Now())
	if !errors.Is(err, api.ErrBusy) || !strings.Contains(err.Error(), p.path) || api.Hint(err) == "" {
		t.Errorf("a writer got %v", err)
	}
	if took := time.Since(began); took < 90*time.Millisecond {
		t.Errorf("a writer waited %v only", took)
	}
	// Readers do not wait.
	if got, err := p.list(t); err != nil || len(got) != 3 {
		t.Errorf("a reader got %v, %v", got, err)
	}
}

// readOnly looks at a database in a directory that it cannot write.
func readOnly(p place) error {
	ctx := context.Background()
	s, err := store.Open(ctx, p.path, p.opts)
	if err != nil {
		return err
	}
	all, err := s.List(ctx)
	if err != nil || len(all) != 3 {
		return fmt.Errorf("listed %v: %w", ids(all), err)
	}
	if sn, err := s.Snapshots(ctx, "b"); err != nil || len(sn) != 1 {
		return fmt.Errorf("snapshots %v: %w", sn, err)
	}
	for name, err := range map[string]error{
		"creating": s.Create(ctx, workspace("d", "")), "touching": s.Touch(ctx, "a", time.Now()), "deleting": s.Delete(ctx, "a"),
	} {
		if !errors.Is(err, api.ErrDenied) || api.Hint(err) == "" || !strings.Contains(err.Error(), "cannot be written") {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	if err := s.Close(); err != nil {
		return err
	}
	if r, err := store.Repair(ctx, p.path, p.opts); !errors.Is(err, api.ErrDenied) {
		return fmt.Errorf("repairing: %+v, %w", r, err)
	}
	return nil
}

func TestReadOnlyDirectory(t *testing.T) {
	for _, test := range []struct{ name string }{{"Clean"}, {"LeftByKill"}, {"WithoutLockFile"}} {
		t.Run(test.name, func(t *testing.T) {
			p := three(t)
			dir := filepath.Dir(p.path)
			switch test.name {
			case "LeftByKill":
				cmd := child(t, "write", p)
				out, err := cmd.StdoutPipe()
				must(t, err)
				must(t, cmd.Start())
				_, err = bufio.NewReader(out).ReadString('\n')
				must(t, err)
				must(t, cmd.Process.Kill())
				cmd.Wait() //nolint:errcheck // it was killed
			case "WithoutLockFile":
				must(t, os.Remove(p.path+".lock"))
			}
			cmd := child(t, "readonly", p)
			if os.Geteuid() == 0 {
				// Root may write anywhere: look as somebody else.
				const nobody = 65534
				for path := filepath.Dir(dir); path != os.TempDir() && len(path) > 1; path = filepath.Dir(path) {
					must(t, os.Chmod(path, 0o755))
				}
				err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
					return errors.Join(err, os.Chown(path, nobody, nobody))
				})
				must(t, err)
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
				binary, err := os.ReadFile(os.Args[0])
				must(t, err)
				cmd.Path = filepath.Join(t.TempDir(), "store.test")
				must(t, os.Chmod(filepath.Dir(cmd.Path), 0o755))
				must(t, os.WriteFile(cmd.Path, binary, 0o755))
			}
			must(t, os.Chmod(p.path, 0o400))
			must(t, os.Chmod(dir, 0o500))
			defer os.Chmod(dir, 0o700) //nolint:errcheck // for the clean-up
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
}

// fillTheDisk works on a file system of one MiB.
func fillTheDisk(p place) error {
	dir := filepath.Dir(p.path)
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		return err
	}
	if err := os.Mkdir(p.opts.WorkspacesDir, 0o700); err != nil {
		return err
	}
	ctx := context.Background()
	s, err := store.Open(ctx, p.path, p.opts)
	if err != nil {
		return err
	}
	made := 0
	for ; made < 1000 && err == nil; made++ {
		w := workspace("w"+strconv.Itoa(made), "")
		w.Environment = strings.Repeat("x", 5000)
		err = s.Create(ctx, w)
	}
	made--
	if made < 10 || !errors.Is(err, api.ErrExhausted) || !strings.Contains(err.Error(), p.path) || api.Hint(err) == "" {
		return fmt.Errorf("after %d workspaces: %w", made, err)
	}
	check := func() error {
		all, err := s.List(ctx)
		if err != nil || len(all) != made {
			return fmt.Errorf("listed %d of %d: %w", len(all), made, err)
		}
		return nil
	}
	if err := check(); err != nil {
		return err
	}
	// All of it can still be opened, and with space it goes on.
	if err := s.Close(); err != nil && !errors.Is(err, api.ErrExhausted) {
		return err
	}
	if s, err = store.Open(ctx, p.path, p.opts); err != nil {
		return err
	}
	if err := check(); err != nil {
		return err
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT, "size=4m"); err != nil {
		return err
	}
	made++
	if err := s.Create(ctx, workspace("last", "")); err != nil {
		return err
	}
	if err := check(); err != nil {
		return err
	}
	return s.Close()
}

func TestFullDisk(t *testing.T) {
	p := place{path: filepath.Join(t.TempDir(), "state.db")}
	cmd := child(t, "full", p)
	// The mount is in a mount namespace of its own and ends with the process.
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}},
	}
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Start()
	testenv.Require(t, "userns", err == nil, "making a user namespace does not work")
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, out.String())
	}
}

func TestNetworkFileSystemsAreRefused(t *testing.T) {
	p := three(t)
	for magic, name := range map[int64]string{unix.NFS_SUPER_MAGIC: "NFS", unix.V9FS_MAGIC: "9P", unix.CIFS_SUPER_MAGIC: "CIFS"} {
		restore := store.SetStatfs(func(_ string, st *unix.Statfs_t) error {
			// Type is signed and as wide as a long: a magic number may come negative.
			st.Type = int64(int32(uint32(magic)))
			return nil
		})
		_, err := p.list(t)
		_, repairErr := store.Repair(t.Context(), p.path, p.opts)
		restore()
		for _, err := range []error{err, repairErr} {
			if !errors.Is(err, api.ErrUnsupported) || !strings.Contains(err.Error(), name) || !strings.Contains(api.Hint(err), "PYRO_STATE_DIR") {
				t.Errorf("on %s: %v", name, err)
			}
		}
	}
}

func TestFilesAreClosedToOthers(t *testing.T) {
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	p := newPlace(t)
	s := p.open(t)
	mustCreate(t, s, workspace("a", ""))
	for _, suffix := range []string{"", "-wal", "-shm", ".lock"} {
		if st, err := os.Stat(p.path + suffix); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v", suffix, st)
		}
	}
	if st, err := os.Stat(p.dir("a")); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("the workspace's directory: %v", st)
	}
	must(t, s.Close())
	// The last one out leaves a single file.
	for _, suffix := range []string{"-wal", "-shm"} {
		if _, err := os.Stat(p.path + suffix); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", suffix, err)
		}
	}
}
