package pins

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
)

// Interface is one that a program may be attached to.
type Interface struct {
	Index uint32
	MAC   [6]byte
}

// Ethernet returns the interfaces of Ethernet that are there, of those named.
func Ethernet(names []string) (map[string]Interface, error) {
	all, err := netlink.LinkList()
	if err != nil {
		return nil, errors.Join(errors.New("interfaces cannot be listed"), err)
	}
	found := make(map[string]Interface)
	for _, l := range all {
		// Programs know packets that begin with addresses of Ethernet.
		if a := l.Attrs(); slices.Contains(names, a.Name) && a.EncapType == "ether" && len(a.HardwareAddr) == 6 {
			found[a.Name] = Interface{uint32(a.Index), [6]byte(a.HardwareAddr)}
		}
	}
	return found, nil
}

// AttachInterface has an interface run a program for each packet that arrives, by a link
// that is pinned in a directory under its number: one that is there is switched, else it
// is made, before those of others with first.
func AttachInterface(dir string, index uint32, p *ebpf.Program, first bool) error {
	pin := filepath.Join(dir, strconv.FormatUint(uint64(index), 10))
	l, err := link.LoadPinnedLink(pin, nil)
	if err == nil {
		defer l.Close()
		if interfaceOf(l) == index {
			return l.Update(p)
		}
		if err := os.Remove(pin); err != nil {
			return err
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	options := link.TCXOptions{Interface: int(index), Program: p, Attach: ebpf.AttachTCXIngress}
	if first {
		options.Anchor = link.Head()
	}
	fresh, err := link.AttachTCX(options)
	if err != nil {
		return fmt.Errorf("tcx (Linux 6.6): %w", err)
	}
	defer fresh.Close()
	return fresh.Pin(pin)
}

// interfaceOf returns the number of the interface that a link is attached to; 0: to none.
func interfaceOf(l link.Link) uint32 {
	info, err := l.Info()
	if err != nil {
		return 0
	}
	if t := info.TCX(); t != nil {
		return t.Ifindex
	}
	return 0
}

// IsAttached reports whether a link of a directory is attached to an interface.
func IsAttached(dir string, index uint32) bool {
	l, err := link.LoadPinnedLink(filepath.Join(dir, strconv.FormatUint(uint64(index), 10)), nil)
	if err != nil {
		return false
	}
	defer l.Close()
	return interfaceOf(l) == index
}

// Interfaces returns the names of those that links of a directory are attached to, sorted.
func Interfaces(dir string) (names []string) {
	all, _ := os.ReadDir(dir) // on an error there are none to be seen
	for _, d := range all {
		l, err := link.LoadPinnedLink(filepath.Join(dir, d.Name()), nil)
		if err != nil {
			continue
		}
		if index := interfaceOf(l); index != 0 {
			names = append(names, InterfaceName(int(index)))
		}
		l.Close()
	}
	slices.Sort(names)
	return names
}

// InterfaceName returns the name of an interface, or words for one that is gone.
func InterfaceName(index int) string {
	if i, err := net.InterfaceByIndex(index); err == nil {
		return i.Name
	}
	return "interface " + strconv.Itoa(index)
}

// DetachOthers takes the links of a directory away from all interfaces but some.
func DetachOthers(dir string, keep []uint32) error {
	all, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, d := range all {
		n, err := strconv.ParseUint(d.Name(), 10, 32)
		if err != nil || slices.Contains(keep, uint32(n)) {
			continue
		}
		errs = append(errs, os.Remove(filepath.Join(dir, d.Name())))
	}
	return errors.Join(errs...)
}

// OpenOrMake opens a pinned map, or makes and pins it. One of another shape is of another
// pentad, and takes its place.
func OpenOrMake(pin string, spec *ebpf.MapSpec) (*ebpf.Map, error) {
	m, err := ebpf.LoadPinnedMap(pin, nil)
	if err == nil {
		if spec.Compatible(m) == nil {
			return m, nil
		}
		m.Close()
		if err := os.Remove(pin); err != nil {
			return nil, err
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if m, err = ebpf.NewMap(spec); err != nil {
		return nil, err
	}
	if err := m.Pin(pin); err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}
