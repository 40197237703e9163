// Package pins keeps programs attached to cgroups by links that are pinned: they go on
// while no agent lives, and a new one switches them to its own programs without a
// moment in between. Which programs do what is the planes' business.
package pins

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Attach has a cgroup run a program at a hook, by a link that is pinned in a directory
// under a name: one that is there is switched, else it is made, and takes the place of
// one at another cgroup. The id is that of the cgroup, whose directory is path.
func Attach(dir, name string, at ebpf.AttachType, p *ebpf.Program, path string, id uint64) (link.Link, error) {
	pin := filepath.Join(dir, name)
	old, err := link.LoadPinnedLink(pin, nil)
	if err == nil && Cgroup(old) == id {
		if err := old.Update(p); err != nil {
			old.Close()
			return nil, err
		}
		return old, nil
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if old != nil {
		defer old.Close()
	}
	fresh, err := link.AttachCgroup(link.CgroupOptions{Path: path, Attach: at, Program: p})
	if err != nil {
		return nil, err
	}
	if err := replace(fresh, next(dir, name), pin); err != nil {
		fresh.Close()
		return nil, err
	}
	return fresh, nil
}

// replace pins a link where another may be.
func replace(l link.Link, next, pin string) error {
	if err := os.Remove(next); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := l.Pin(next); err != nil {
		return err
	}
	return os.Rename(next, pin)
}

// next is where a new link waits to be renamed over the old one. The bpf filesystem
// reserves names with a dot.
func next(dir, name string) string { return filepath.Join(dir, "next-"+name) }

// Cgroup returns the id of the cgroup that a link is attached to, 0 when it is detached
// or no link of a cgroup.
func Cgroup(l link.Link) uint64 {
	info, err := l.Info()
	if err != nil {
		return 0
	}
	if c := info.Cgroup(); c != nil {
		return c.CgroupId
	}
	return 0
}

// CgroupOf is Cgroup of the link that is pinned in a directory under a name; 0 if there
// is none.
func CgroupOf(dir, name string) uint64 {
	l, err := link.LoadPinnedLink(filepath.Join(dir, name), nil)
	if err != nil {
		return 0
	}
	defer l.Close()
	return Cgroup(l)
}

// Detach takes a link away that Attach made. There may be none.
func Detach(dir, name string) error {
	var errs []error
	for _, path := range []string{filepath.Join(dir, name), next(dir, name)} {
		l, err := link.LoadPinnedLink(path, nil)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		// A link whose cgroup is gone is detached already.
		if d, ok := l.(interface{ Detach() error }); ok {
			if err := d.Detach(); err != nil && !errors.Is(err, unix.ENOLINK) && !errors.Is(err, unix.EINVAL) {
				errs = append(errs, fmt.Errorf("hook %s: %w", name, err))
			}
		}
		errs = append(errs, l.Unpin())
		l.Close()
	}
	return errors.Join(errs...)
}
