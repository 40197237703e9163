package socket

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/host"
)

// hooks are the programs and where they attach, in the order of attaching: what
// remembers and forgets a socket stands before anything is translated. Removal
// goes the other way.
var hooks = []struct {
	name   string // of the program and of its pin
	attach ebpf.AttachType
}{
	{kernelProgSockRelease, ebpf.AttachCgroupInetSockRelease},
	{kernelProgSockOps, ebpf.AttachCGroupSockOps},
	{kernelProgGetpeername4, ebpf.AttachCgroupInet4GetPeername},
	{kernelProgGetpeername6, ebpf.AttachCgroupInet6GetPeername},
	{kernelProgRecvmsg4, ebpf.AttachCGroupUDP4Recvmsg},
	{kernelProgRecvmsg6, ebpf.AttachCGroupUDP6Recvmsg},
	{kernelProgSendmsg4, ebpf.AttachCGroupUDP4Sendmsg},
	{kernelProgSendmsg6, ebpf.AttachCGroupUDP6Sendmsg},
	{kernelProgPostBind4, ebpf.AttachCGroupInet4PostBind},
	{kernelProgPostBind6, ebpf.AttachCGroupInet6PostBind},
	{kernelProgConnect4, ebpf.AttachCGroupInet4Connect},
	{kernelProgConnect6, ebpf.AttachCGroupInet6Connect},
}

// linksDir holds the pinned links below the plane's directory.
const linksDir = "links"

// attacher keeps the programs of one directory of pins attached.
type attacher struct {
	dir   string
	links map[string]link.Link // kept alive: a collected link detaches
}

func (a *attacher) close() {
	for _, l := range a.links {
		l.Close()
	}
	a.links = nil
}

// attach makes every hook of the cgroup run the programs of the collection:
// links that are there are switched atomically, missing ones are made.
func (a *attacher) attach(programs map[string]*ebpf.Program, cgroup string) error {
	id, err := host.CgroupID(cgroup)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(a.dir, linksDir), 0o700); err != nil {
		return err
	}
	for _, h := range hooks {
		if err := a.attachOne(h.name, h.attach, programs[h.name], cgroup, id); err != nil {
			return fmt.Errorf("hook %s: %w", h.name, err)
		}
	}
	return nil
}

func (a *attacher) attachOne(name string, at ebpf.AttachType, p *ebpf.Program, cgroup string, id uint64) error {
	pin := filepath.Join(a.dir, linksDir, name)
	old, err := link.LoadPinnedLink(pin, nil)
	if err == nil && linkCgroup(old) == id {
		if err := old.Update(p); err != nil {
			old.Close()
			return err
		}
		a.keep(name, old)
		return nil
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	fresh, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: at, Program: p})
	if err != nil {
		return err
	}
	next := nextPin(a.dir, name)
	if err := os.Remove(next); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := fresh.Pin(next); err != nil {
		fresh.Close()
		return err
	}
	if old != nil {
		defer old.Close()
	}
	if err := os.Rename(next, pin); err != nil {
		fresh.Close()
		return err
	}
	a.keep(name, fresh)
	return nil
}

// nextPin is where a new link waits to be renamed over the old one. The bpf
// filesystem reserves names with a dot.
func nextPin(dir, name string) string { return filepath.Join(dir, linksDir, "next-"+name) }

func (a *attacher) keep(name string, l link.Link) {
	if a.links == nil {
		a.links = make(map[string]link.Link)
	}
	if old := a.links[name]; old != nil {
		old.Close()
	}
	a.links[name] = l
}

// linkCgroup returns the id of the cgroup that a link is attached to, 0 when it
// is detached or no cgroup link.
func linkCgroup(l link.Link) uint64 {
	info, err := l.Info()
	if err != nil {
		return 0
	}
	if c := info.Cgroup(); c != nil {
		return c.CgroupId
	}
	return 0
}

// readHooks looks at the pinned links.
func readHooks(dir string) []Hook {
	all := make([]Hook, 0, len(hooks))
	for _, h := range hooks {
		hook := Hook{Name: h.name}
		l, err := link.LoadPinnedLink(filepath.Join(dir, linksDir, h.name), nil)
		if err == nil {
			hook.CgroupID = linkCgroup(l)
			hook.Attached = hook.CgroupID != 0
			l.Close()
		}
		all = append(all, hook)
	}
	return all
}

// detachAll removes the links in reverse order: first nothing is translated any
// more, then what was translated is forgotten.
func detachAll(dir string) error {
	var errs []error
	for i := len(hooks) - 1; i >= 0; i-- {
		pin := filepath.Join(dir, linksDir, hooks[i].name)
		for _, path := range []string{pin, nextPin(dir, hooks[i].name)} {
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
					errs = append(errs, fmt.Errorf("hook %s: %w", hooks[i].name, err))
				}
			}
			errs = append(errs, l.Unpin())
			l.Close()
		}
	}
	return errors.Join(errs...)
}
