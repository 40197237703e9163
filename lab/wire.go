package lab

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// wires numbers the interfaces of cables.
var wires atomic.Uint32

// Wire lays a cable between two hosts. Each end gets a name that is unique among
// all cables, and the addresses given, such as "192.0.2.1/24".
func Wire(a *Host, addressesA []string, b *Host, addressesB []string) (nameA, nameB string, err error) {
	n := wires.Add(1)
	nameA, nameB = fmt.Sprintf("wire%da", n), fmt.Sprintf("wire%db", n)
	// Made in the first namespace: nothing of it is ever seen in the machine's own.
	veth := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: nameA}, PeerName: nameB, PeerNamespace: netlink.NsFd(b.ns),
	}
	if err := a.handle.LinkAdd(veth); err != nil {
		return "", "", fmt.Errorf("cable: %w", err)
	}
	if err := a.plug(nameA, addressesA); err != nil {
		return "", "", err
	}
	return nameA, nameB, b.plug(nameB, addressesB)
}

func (h *Host) plug(name string, addresses []string) error {
	l, err := h.handle.LinkByName(name)
	if err != nil {
		return fmt.Errorf("cable: %w", err)
	}
	for _, text := range addresses {
		a, err := netlink.ParseAddr(text)
		if err != nil {
			return err
		}
		a.Flags = unix.IFA_F_NODAD
		if err := h.handle.AddrAdd(l, a); err != nil {
			return fmt.Errorf("address %s: %w", text, err)
		}
	}
	// Link-local addresses, too, are usable at once.
	if err := h.Sysctl("net/ipv6/conf/"+name+"/accept_dad", "0"); err != nil {
		return err
	}
	return h.handle.LinkSetUp(l)
}

// Void gives the host an interface with an address, such as "10.0.0.1/8", behind
// which there is nothing: what is sent there is gone, and nobody answers.
func (h *Host) Void(address string) error {
	n := wires.Add(1)
	veth := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: fmt.Sprintf("void%d", n)}, PeerName: fmt.Sprintf("void%dx", n),
	}
	if err := h.handle.LinkAdd(veth); err != nil {
		return fmt.Errorf("void: %w", err)
	}
	// Without neighbours to ask for no send ever fails. The other end stays down.
	if err := h.handle.LinkSetARPOff(veth); err != nil {
		return fmt.Errorf("void: %w", err)
	}
	return h.plug(veth.Name, []string{address})
}

// Sysctl sets a parameter of the host's network, such as "net/ipv4/ip_forward".
func (h *Host) Sysctl(name, value string) error {
	return h.Do(func() error {
		// /proc/sys/net shows the namespace of the thread that opens it.
		return os.WriteFile("/proc/sys/"+name, []byte(value), 0)
	})
}

// Route sends what goes to a prefix, such as "10.96.0.0/12" or "0.0.0.0/0", by way
// of a neighbour.
func (h *Host) Route(prefix, via string) error {
	_, to, err := net.ParseCIDR(prefix)
	if err != nil {
		return err
	}
	if err := h.handle.RouteAdd(&netlink.Route{Dst: to, Gw: net.ParseIP(via)}); err != nil {
		return fmt.Errorf("route %s by %s: %w", prefix, via, err)
	}
	return nil
}

// RouteDevice sends what goes to a prefix out of an interface; "*" is the only one
// besides the loopback.
func (h *Host) RouteDevice(prefix, device string) error { return h.RouteBy(prefix, "", device) }

// RouteBy sends what goes to a prefix out of an interface, as RouteDevice does, to
// a neighbour there.
func (h *Host) RouteBy(prefix, via, device string) error {
	_, to, err := net.ParseCIDR(prefix)
	if err != nil {
		return err
	}
	links, err := h.handle.LinkList()
	if err != nil {
		return err
	}
	for _, l := range links {
		at := l.Attrs()
		if at.Name != device && (device != "*" || at.Name == "lo") {
			continue
		}
		r := &netlink.Route{Dst: to, LinkIndex: at.Index, Gw: net.ParseIP(via)}
		if via == "" {
			r.Scope = netlink.SCOPE_LINK
		}
		if err := h.handle.RouteAdd(r); err != nil {
			return fmt.Errorf("route %s by %s: %w", prefix, at.Name, err)
		}
		return nil
	}
	return fmt.Errorf("route %s: there is no interface %s", prefix, device)
}

// RouteLocal makes every address of a prefix one of the host's own.
func (h *Host) RouteLocal(prefix string) error {
	_, to, err := net.ParseCIDR(prefix)
	if err != nil {
		return err
	}
	lo, err := h.handle.LinkByName("lo")
	if err != nil {
		return err
	}
	return h.handle.RouteAdd(&netlink.Route{
		Dst: to, LinkIndex: lo.Attrs().Index, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST,
	})
}

// RouteReplace is Route for a prefix that may have had another one.
func (h *Host) RouteReplace(prefix, via string) error {
	_, to, err := net.ParseCIDR(prefix)
	if err != nil {
		return err
	}
	return h.handle.RouteReplace(&netlink.Route{Dst: to, Gw: net.ParseIP(via)})
}

// Forward makes the host pass packets on, as a router or a node does.
func (h *Host) Forward() error {
	return errors.Join(h.Sysctl("net/ipv4/ip_forward", "1"), h.Sysctl("net/ipv6/conf/all/forwarding", "1"))
}

// Switch is a layer-2 segment into which hosts are plugged.
type Switch struct {
	host  *Host
	ports map[*Host][]string // of each host that is plugged in
}

// AnswerAll has the host send an ICMP message for everything that it refuses, where
// Linux sends some a second.
func (h *Host) AnswerAll() error {
	return errors.Join(h.Sysctl("net/ipv4/icmp_ratelimit", "0"), h.Sysctl("net/ipv4/icmp_msgs_per_sec", "1000000"),
		h.Sysctl("net/ipv4/icmp_msgs_burst", "1000000"), h.Sysctl("net/ipv6/icmp/ratelimit", "0"))
}

// NewSwitch makes a switch. It needs root.
func NewSwitch() (*Switch, error) {
	h, err := NewHost()
	if err != nil {
		return nil, err
	}
	s := &Switch{host: h, ports: make(map[*Host][]string)}
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "switch"}}
	if err := h.handle.LinkAdd(bridge); err != nil {
		return nil, errors.Join(fmt.Errorf("switch: %w", err), h.Close())
	}
	return s, h.handle.LinkSetUp(bridge)
}

// Plug lays a cable from a host to the switch and gives the host's end addresses.
// It returns the name of the host's interface.
func (s *Switch) Plug(h *Host, addresses ...string) (string, error) {
	name, port, err := Wire(h, addresses, s.host, nil)
	if err != nil {
		return "", err
	}
	bridge, err := s.host.handle.LinkByName("switch")
	if err != nil {
		return "", err
	}
	l, err := s.host.handle.LinkByName(port)
	if err != nil {
		return "", err
	}
	s.ports[h] = append(s.ports[h], port)
	return name, s.host.handle.LinkSetMaster(l, bridge)
}

// Cut makes everything from and to a host vanish in the switch: its interfaces stay up,
// and nobody tells it.
func (s *Switch) Cut(h *Host) error {
	return s.eachPort(h, func(port, _ netlink.Link) error { return s.host.handle.LinkSetNoMaster(port) })
}

// Mend undoes Cut.
func (s *Switch) Mend(h *Host) error {
	return s.eachPort(h, s.host.handle.LinkSetMaster)
}

func (s *Switch) eachPort(h *Host, do func(port, bridge netlink.Link) error) error {
	bridge, err := s.host.handle.LinkByName("switch")
	if err != nil {
		return err
	}
	for _, name := range s.ports[h] {
		l, err := s.host.handle.LinkByName(name)
		if err != nil {
			return err
		}
		if err := do(l, bridge); err != nil {
			return err
		}
	}
	return nil
}

// Close takes the switch away.
func (s *Switch) Close() error { return s.host.Close() }
