package socket

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/pins"
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
	l, err := pins.Attach(filepath.Join(a.dir, linksDir), name, at, p, cgroup, id)
	if err != nil {
		return err
	}
	a.keep(name, l)
	return nil
}

func (a *attacher) keep(name string, l link.Link) {
	if a.links == nil {
		a.links = make(map[string]link.Link)
	}
	if old := a.links[name]; old != nil {
		old.Close()
	}
	a.links[name] = l
}

// readHooks looks at the pinned links.
func readHooks(dir string) []Hook {
	all := make([]Hook, 0, len(hooks))
	for _, h := range hooks {
		id := pins.CgroupOf(filepath.Join(dir, linksDir), h.name)
		all = append(all, Hook{Name: h.name, CgroupID: id, Attached: id != 0})
	}
	return all
}

// detachAll removes the links in reverse order: first nothing is translated any
// more, then what was translated is forgotten.
func detachAll(dir string) error {
	var errs []error
	for i := len(hooks) - 1; i >= 0; i-- {
		errs = append(errs, pins.Detach(filepath.Join(dir, linksDir), hooks[i].name))
	}
	return errors.Join(errs...)
}
