package file

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/source"
)

// feed is a running source and what it emits.
type feed struct {
	t       *testing.T
	updates chan source.Update
}

func follow(t *testing.T, path string) *feed {
	t.Helper()
	s, err := New(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Load(); err != nil {
		t.Fatal(err)
	}
	f := &feed{t, make(chan source.Update, 100)}
	ctx, stop := context.WithCancel(t.Context())
	var run sync.WaitGroup
	run.Go(func() {
		if err := s.Run(ctx, func(u source.Update) { f.updates <- u }); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		stop()
		run.Wait()
		s.Close()
		goleak.VerifyNone(t)
	})
	return f
}

// await waits for an update that is as wanted; there may be others before it.
func (f *feed) await(what string, wanted func(source.Update) bool) {
	f.t.Helper()
	late := time.After(20 * time.Second)
	for {
		select {
		case u := <-f.updates:
			if wanted(u) {
				return
			}
		case <-late:
			f.t.Fatalf("%s is not noticed", what)
		}
	}
}

func (f *feed) awaitServices(what string, n int) {
	f.t.Helper()
	f.await(what, func(u source.Update) bool { return u.Err == nil && len(u.Config.Services) == n })
}

func (f *feed) awaitError(what string, want error) {
	f.t.Helper()
	f.await(what, func(u source.Update) bool { return errors.Is(u.Err, want) })
}

const (
	none = "services: []\n"
	one  = "services: [{name: a, listen: [192.0.2.1:80], backends: [192.0.2.2:80]}]\n"
)

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// The directory is moved away and another one takes its place.
func TestReplacedDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "etc", "pentad")
	path := filepath.Join(dir, "pentad.yaml")
	write(t, path, none)
	f := follow(t, path)
	must(t, os.Rename(dir, dir+".old"))
	f.awaitError("a directory that is gone", fs.ErrNotExist)
	write(t, path, one)
	f.awaitServices("a directory in its place", 1)
	write(t, path, none)
	f.awaitServices("a change in it", 0)
	// The one above it, too, and within an instant.
	write(t, filepath.Join(dir+"2", "pentad", "pentad.yaml"), one)
	must(t, os.Rename(filepath.Dir(dir), filepath.Dir(dir)+".old"))
	must(t, os.Rename(filepath.Dir(dir)+".old/pentad2", filepath.Dir(dir)))
	f.awaitServices("a directory above in its place", 1)
}

func TestFileIsGone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pentad.yaml")
	write(t, path, one)
	f := follow(t, path)
	must(t, os.Remove(path))
	f.awaitError("a file that is gone", fs.ErrNotExist)
	write(t, path, one)
	f.awaitServices("the same file again", 1)
}

// A pipe to which nobody writes is refused; what comes after it is read, and the
// source ends when it is told to.
func TestPipe(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pentad.yaml")
	write(t, path, none)
	f := follow(t, path)
	must(t, syscall.Mkfifo(path+".new", 0o600))
	must(t, os.Rename(path+".new", path))
	f.awaitError("a pipe", config.ErrNotFile)
	write(t, path+".new", one)
	must(t, os.Rename(path+".new", path))
	f.awaitServices("a file in its place", 1)
	must(t, syscall.Mkfifo(path+".new", 0o600))
	must(t, os.Rename(path+".new", path))
	f.awaitError("a pipe at the end", config.ErrNotFile)
}
