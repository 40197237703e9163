package capture

import (
	"errors"
	"fmt"
	"io/fs"
	"math/bits"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/pins"
	"github.com/pentad/pentad/service"
)

// attachment is what the programs at one cgroup lead away.
type attachment struct {
	cgroup   uint64
	entries  []programsEntry
	prefixes []programsPrefix
	services map[programsEndpoint]bool
}

// The reasons for which connect() leaves a connection alone.
const (
	whyNobody   = "no capture is about it"
	whyNotTCP   = "only TCP is captured"
	whyBegun    = "what has begun stays where it is"
	whyLoopback = "the loopback is never captured"
	whyLink     = "addresses of a link are never captured"
	whyService  = "a service leads to it, or it is a backend of one"
)

// readPrograms reads what is attached. What the programs read is found by them, and not
// by names: so it is what they do.
func readPrograms(dir string) ([]attachment, error) {
	all, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var found []attachment
	for _, d := range all {
		if !strings.HasPrefix(d.Name(), processesDir) {
			continue
		}
		a, err := readAttachment(filepath.Join(dir, d.Name(), programsProgConnect4))
		if errors.Is(err, fs.ErrNotExist) {
			continue // it is just being made, or taken away
		}
		if err != nil {
			return nil, err
		}
		if a.cgroup != 0 {
			found = append(found, a)
		}
	}
	return found, nil
}

func readAttachment(pin string) (a attachment, err error) {
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return a, err
	}
	defer l.Close()
	a.cgroup = pins.Cgroup(l)
	info, err := l.Info()
	if err != nil {
		return a, err
	}
	p, err := ebpf.NewProgramFromID(info.Program)
	if err != nil {
		return a, err
	}
	defer p.Close()
	about, err := p.Info()
	if err != nil {
		return a, err
	}
	ids, _ := about.MapIDs()
	for _, id := range ids {
		if err := a.readMap(id); err != nil {
			return a, err
		}
	}
	return a, nil
}

func (a *attachment) readMap(id ebpf.MapID) error {
	m, err := ebpf.NewMapFromID(id)
	if err != nil {
		return err
	}
	defer m.Close()
	info, err := m.Info()
	if err != nil {
		return err
	}
	var k programsPrefix
	var e programsEndpoint
	var present uint8
	switch info.Name {
	case programsMapEntries:
		var n uint32
		var v programsEntry
		for all := m.Iterate(); all.Next(&n, &v); {
			if v.Name[0] != 0 {
				a.entries = append(a.entries, v)
			}
		}
	case programsMapPrefixes:
		all := m.Iterate()
		for all.Next(&k, &present) {
			a.prefixes = append(a.prefixes, k)
		}
		return all.Err()
	case programsMapServices:
		a.services = make(map[programsEndpoint]bool)
		all := m.Iterate()
		for all.Next(&e, &present) {
			a.services[e] = true
		}
		return all.Err()
	}
	return nil
}

// connect is what connect() does with a connection: the programs of the innermost
// cgroup run first, and whoever leads it away leads it to where nobody captures it.
func (v *View) connect(c Connection) Outcome {
	out := Outcome{Why: whyNobody}
	if c.Interface != "" {
		return out
	}
	if c.UDP {
		return Outcome{Why: whyNotTCP}
	}
	for _, id := range slices.Backward(c.Cgroups) {
		for _, a := range v.programs {
			if a.cgroup != id {
				continue
			}
			o := a.connect(c)
			if o.Capture != "" {
				return o
			}
			if o.Why != whyNobody {
				out = o
			}
		}
	}
	return out
}

func (a attachment) connect(c Connection) Outcome {
	to := c.Destination
	switch {
	case to.Addr().IsLoopback() || to.Addr().IsUnspecified():
		return Outcome{Why: whyLoopback}
	case to.Addr().Is6() && to.Addr().IsLinkLocalUnicast():
		return Outcome{Why: whyLink}
	case a.services[endpointOf(to)]:
		return Outcome{Why: whyService}
	}
	out := Outcome{Why: whyNobody}
	for i, e := range a.entries {
		if !e.isOf(c.RealUser, c.RealGroup) {
			continue
		}
		name := text(e.Name[:])
		switch {
		case a.has(i, prefixExcept, to.Addr()):
			out.Why = fmt.Sprintf("the capture %s excepts this destination", name)
		case !e.hasPort(to.Port()) || !a.has(i, prefixDestination, to.Addr()):
			if out.Why == whyNobody {
				out.Why = fmt.Sprintf("the capture %s is about this process, and not about this destination", name)
			}
		default:
			return e.lead(name, to.Addr())
		}
	}
	return out
}

func (e programsEntry) isOf(user, group uint32) bool {
	return (e.Traits&entryUser == 0 || e.User == user) && (e.Traits&entryGroup == 0 || e.Group == group)
}

func (e programsEntry) hasPort(port uint16) bool {
	for _, r := range e.Ports[:e.PortsCount] {
		if port >= r.First && port <= r.Last {
			return true
		}
	}
	return e.PortsCount == 0
}

func (e programsEntry) lead(name string, to netip.Addr) Outcome {
	proxy, bit := e.Proxy4, uint32(entryIPv4)
	if service.FamilyOf(to) != service.V4 {
		proxy, bit = e.Proxy6, entryIPv6
	}
	if e.Traits&bit == 0 {
		return Outcome{Capture: name}
	}
	return Outcome{Capture: name, To: addressOf(proxy), Direct: e.Traits&entryDirect != 0}
}

// has reports whether an entry has a prefix of a kind in which an address lies.
func (a attachment) has(entry int, kind uint8, to netip.Addr) bool {
	return slices.ContainsFunc(a.prefixes, func(k programsPrefix) bool {
		return k.Entry == uint32(entry) && k.Kind == kind && k.prefix().Contains(to)
	})
}

// prefix is a prefix as people have it.
func (k programsPrefix) prefix() netip.Prefix {
	length := int(k.Length) - prefixHead
	a := bytesOf(k.Addr)
	if k.Family == unix.AF_INET {
		return netip.PrefixFrom(netip.AddrFrom4([4]byte(a[:4])), length)
	}
	return netip.PrefixFrom(netip.AddrFrom16(a), length)
}

func addressOf(e programsEndpoint) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16(bytesOf(e.Addr)).Unmap(), bits.ReverseBytes16(e.Port))
}

func text(b []int8) string {
	var s strings.Builder
	for _, c := range b {
		if c == 0 {
			break
		}
		s.WriteByte(byte(c))
	}
	return s.String()
}
