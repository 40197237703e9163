// Package attach gives pods of this host their devices and addresses, and takes them away:
// what the CNI plugin does, with neither the agent nor anybody else to ask.
//
// The device is the reservation: its name is made of the pod's address, and the kernel
// makes no second one of the same name. There is no list of addresses that could be wrong:
// when the network namespace of a pod goes its device goes, and the address is free. It
// imports no more than it needs, because a plugin is a process of its own each time.
//
// A pod has an address of its own (/32, /128) and sends everything to the other end of its
// device, of which it knows the link-layer address: nothing depends on ARP or NDP.
package attach

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// The gateways of all pods, which are nobody's: the other end of the device is known by
// its link-layer address.
var (
	Gateway4 = netip.MustParseAddr("169.254.1.1")
	Gateway6 = netip.MustParseAddr("fe80::1")
)

// hostMAC is the link-layer address of every host end. It is locally administered.
var hostMAC = net.HardwareAddr{0xee, 0xee, 0xee, 0xee, 0xee, 0xee}

// Protocol marks what is made here (rtnetlink's RTPROT_). It is host.RouteProtocol, which
// would bring more along than a plugin needs; a test sees to it that both are the same.
const Protocol = 112

// Request is a pod that wants a device.
type Request struct {
	Container string // the id of its sandbox
	IfName    string // of the device in the pod
	Netns     string // path of its network namespace
	Pod       string // namespace/name, for people; may be empty
	Wanted    netip.Addr
}

// Attachment is a device that a pod has.
type Attachment struct {
	Owner
	Device   string // the host's end
	Index    int    // of that
	V4, V6   netip.Addr
	PodMAC   net.HardwareAddr
	HostMAC  net.HardwareAddr
	MTU      int
	Existing bool // it was there before
}

// Owner is whose a device is, as its alias says.
type Owner struct {
	Container, IfName, Pod string
}

const aliasPrefix = "pentad"

// maxAlias is IFALIASZ of the kernel, without its end.
const maxAlias = 255

func (o Owner) alias() string {
	pod := o.Pod
	if pod == "" {
		pod = "-"
	}
	text := strings.Join([]string{aliasPrefix, o.Container, o.IfName, pod}, " ")
	return text[:min(len(text), maxAlias)]
}

func parseOwner(alias string) (Owner, bool) {
	fields := strings.Fields(alias)
	if len(fields) != 4 || fields[0] != aliasPrefix {
		return Owner{}, false
	}
	return Owner{fields[1], fields[2], fields[3]}, true
}

// ErrFull says that no block of this host has an address left.
var ErrFull = errors.New("no address is left in the blocks of this host")

// Attach gives a pod a device, or returns the one that it has already. It is safe to be
// repeated after it was interrupted at any point: what is left of the last time is
// removed.
func Attach(ctx context.Context, n Network, r Request) (Attachment, error) {
	owner := Owner{r.Container, r.IfName, r.Pod}
	if owner.alias() != strings.Join([]string{aliasPrefix, r.Container, r.IfName, or(r.Pod, "-")}, " ") {
		return Attachment{}, fmt.Errorf("the names of the pod are too long: %s", r.Pod)
	}
	ns, err := netns.GetFromPath(r.Netns)
	if err != nil {
		return Attachment{}, fmt.Errorf("the network namespace %s cannot be opened: %w", r.Netns, err)
	}
	defer ns.Close()
	pod, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return Attachment{}, fmt.Errorf("the network namespace %s: %w", r.Netns, err)
	}
	defer pod.Close()
	all, err := List()
	if err != nil {
		return Attachment{}, err
	}
	for _, a := range all {
		if a.Container != r.Container || a.IfName != r.IfName {
			continue
		}
		a.complete(n)
		if a.check(pod) == nil {
			a.Existing = true
			return a, nil
		}
		if err := remove(a); err != nil {
			return Attachment{}, err
		}
	}
	return reserve(ctx, n, r, owner, ns, pod)
}

func or(text, fallback string) string {
	if text == "" {
		return fallback
	}
	return text
}

// reserve makes a device under the first address that nobody has, and all that belongs to
// it. What fails leaves nothing behind.
func reserve(ctx context.Context, n Network, r Request, owner Owner, ns netns.NsHandle, pod *netlink.Handle) (Attachment, error) {
	used, err := usedNames()
	if err != nil {
		return Attachment{}, err
	}
	for slot := range n.slots(r.Wanted) {
		if err := ctx.Err(); err != nil {
			return Attachment{}, fmt.Errorf("there was no time left: %w", err)
		}
		if used[slot.device()] {
			continue
		}
		a := Attachment{Owner: owner, Device: slot.device(), V4: slot.v4, V6: slot.v6, PodMAC: slot.mac(), HostMAC: hostMAC, MTU: n.MTU}
		switch err := makeDevice(a, int(ns)); {
		case errors.Is(err, unix.EEXIST):
			// Somebody else has the address by now, or the pod has a device of that name.
			if _, inPod := pod.LinkByName(r.IfName); inPod == nil {
				return Attachment{}, fmt.Errorf("the pod has a device %s already", r.IfName)
			}
			continue
		case err != nil:
			return Attachment{}, fmt.Errorf("device %s: %w", a.Device, err)
		}
		if err := a.finish(pod); err != nil {
			return Attachment{}, errors.Join(err, remove(a))
		}
		return a, nil
	}
	if r.Wanted.IsValid() {
		return Attachment{}, fmt.Errorf("the address %s is not one of this host's blocks, or somebody has it", r.Wanted)
	}
	return Attachment{}, ErrFull
}

// makeDevice makes both ends. The kernel refuses a second device of a name: that is how
// an address is taken.
func makeDevice(a Attachment, ns int) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr, attrs.MTU, attrs.Flags = a.Device, a.HostMAC, a.MTU, net.FlagUp
	return netlink.LinkAdd(&netlink.Veth{
		LinkAttrs: attrs, PeerName: a.IfName, PeerHardwareAddr: a.PodMAC, PeerNamespace: netlink.NsFd(ns), PeerMTU: uint32(a.MTU),
	})
}

// finish sets up both ends. The routes of the host come last: they are what makes the pod
// reachable.
func (a *Attachment) finish(pod *netlink.Handle) error {
	link, err := netlink.LinkByName(a.Device)
	if err != nil {
		return err
	}
	a.Index = link.Attrs().Index
	if err := netlink.LinkSetAlias(link, a.alias()); err != nil {
		return fmt.Errorf("device %s: %w", a.Device, err)
	}
	if err := setSysctls(a.Device, a.V6.IsValid()); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("device %s: %w", a.Device, err)
	}
	if err := a.finishPod(pod); err != nil {
		return fmt.Errorf("device %s of the pod: %w", a.IfName, err)
	}
	a.forgetFlows()
	return a.Repair()
}

// finishPod sets up the pod's end.
func (a *Attachment) finishPod(pod *netlink.Handle) error {
	lo, err := pod.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := pod.LinkSetUp(lo); err != nil {
		return fmt.Errorf("lo: %w", err)
	}
	link, err := pod.LinkByName(a.IfName)
	if err != nil {
		return err
	}
	if err := pod.LinkSetUp(link); err != nil {
		return err
	}
	for _, x := range a.families() {
		// No other host could have the address: IPv6 need not look for one.
		address := &netlink.Addr{IPNet: x.network(), Flags: unix.IFA_F_NODAD}
		if err := pod.AddrReplace(link, address); err != nil {
			return fmt.Errorf("%s: %w", x.address, err)
		}
		neighbour := &netlink.Neigh{LinkIndex: link.Attrs().Index, Family: x.family, State: netlink.NUD_PERMANENT, IP: x.gateway.AsSlice(), HardwareAddr: a.HostMAC}
		if err := pod.NeighSet(neighbour); err != nil {
			return fmt.Errorf("its gateway: %w", err)
		}
		if x.family == netlink.FAMILY_V4 {
			toGateway := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: HostNet(x.gateway), Scope: netlink.SCOPE_LINK}
			if err := pod.RouteReplace(toGateway); err != nil {
				return fmt.Errorf("the route to its gateway: %w", err)
			}
		}
		if err := pod.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: x.gateway.AsSlice(), Dst: x.everything}); err != nil {
			return fmt.Errorf("its default route: %w", err)
		}
	}
	return nil
}

// Repair makes the host's neighbours and routes to a pod what they should be. It is
// repeated whenever something is missing.
func (a *Attachment) Repair() error {
	for _, x := range a.families() {
		neighbour := &netlink.Neigh{LinkIndex: a.Index, Family: x.family, State: netlink.NUD_PERMANENT, IP: x.address.AsSlice(), HardwareAddr: a.PodMAC}
		if err := netlink.NeighSet(neighbour); err != nil {
			return fmt.Errorf("device %s: its neighbour: %w", a.Device, err)
		}
		route := &netlink.Route{LinkIndex: a.Index, Dst: HostNet(x.address), Scope: netlink.SCOPE_LINK, Protocol: Protocol}
		if x.family == netlink.FAMILY_V6 {
			route.Scope = netlink.SCOPE_UNIVERSE
		}
		if err := netlink.RouteReplace(route); err != nil {
			return fmt.Errorf("the route to %s: %w", x.address, err)
		}
	}
	return nil
}

// address is one family of an attachment.
type address struct {
	address, gateway netip.Addr
	family           int
	everything       *net.IPNet
}

func (a *Attachment) families() (all []address) {
	if a.V4.IsValid() {
		all = append(all, address{a.V4, Gateway4, netlink.FAMILY_V4, &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}})
	}
	if a.V6.IsValid() {
		all = append(all, address{a.V6, Gateway6, netlink.FAMILY_V6, &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}})
	}
	return all
}

func (x address) network() *net.IPNet { return HostNet(x.address) }

// HostNet is an address alone, in the types of package net.
func HostNet(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

// setSysctls prepares the host's end: it passes on what the pod sends, to addresses of
// 127.0.0.0/8 as well (NodePorts at the loopback), and takes no address from whoever
// advertises routers there.
func setSysctls(device string, v6 bool) error {
	settings := []struct{ name, value string }{
		{"ipv4/conf/" + device + "/forwarding", "1"},
		{"ipv4/conf/" + device + "/rp_filter", "1"},
		{"ipv4/conf/" + device + "/route_localnet", "1"},
	}
	if v6 {
		settings = append(settings, struct{ name, value string }{"ipv6/conf/" + device + "/accept_ra", "0"}, struct{ name, value string }{"ipv6/conf/" + device + "/forwarding", "1"})
	}
	for _, s := range settings {
		if err := os.WriteFile("/proc/sys/net/"+s.name, []byte(s.value), 0); err != nil {
			return fmt.Errorf("net.%s: %w", strings.ReplaceAll(s.name, "/", "."), err)
		}
	}
	return nil
}

// forgetFlows forgets connections of whoever had the address before. Without conntrack
// there are none.
func (a *Attachment) forgetFlows() {
	for _, x := range a.families() {
		for _, part := range []netlink.ConntrackFilterType{netlink.ConntrackOrigSrcIP, netlink.ConntrackOrigDstIP, netlink.ConntrackReplySrcIP} {
			f := &netlink.ConntrackFilter{}
			if f.AddIP(part, x.address.AsSlice()) == nil {
				_, _ = netlink.ConntrackDeleteFilters(netlink.ConntrackTable, netlink.InetFamily(x.family), f)
			}
		}
	}
}

// Detach takes a pod's device away. There may be none.
func Detach(container, ifName string) error {
	all, err := List()
	if err != nil {
		return err
	}
	var errs []error
	for _, a := range all {
		if a.Container == container && a.IfName == ifName {
			a.forgetFlows()
			errs = append(errs, remove(a))
		}
	}
	return errors.Join(errs...)
}

// remove deletes a device, and with it its routes and neighbours.
func remove(a Attachment) error {
	link, err := netlink.LinkByName(a.Device)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err != nil {
		return err
	}
	if owner, ok := parseOwner(link.Attrs().Alias); ok && owner.Container != a.Container {
		return nil // it is somebody else's by now
	}
	if err := netlink.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("device %s: %w", a.Device, err)
	}
	return nil
}

// Check reports what is wrong with the device that a pod should have.
func Check(n Network, r Request) error {
	ns, err := netns.GetFromPath(r.Netns)
	if err != nil {
		return fmt.Errorf("the network namespace %s cannot be opened: %w", r.Netns, err)
	}
	defer ns.Close()
	pod, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer pod.Close()
	all, err := List()
	if err != nil {
		return err
	}
	for _, a := range all {
		if a.Container == r.Container && a.IfName == r.IfName {
			a.complete(n)
			return a.check(pod)
		}
	}
	return fmt.Errorf("the pod has no device %s", r.IfName)
}

// check looks at both ends.
func (a *Attachment) check(pod *netlink.Handle) error {
	link, err := pod.LinkByName(a.IfName)
	if err != nil {
		return fmt.Errorf("there is no device %s in the pod: %w", a.IfName, err)
	}
	if link.Attrs().ParentIndex != a.Index {
		return fmt.Errorf("device %s in the pod is not the other end of %s", a.IfName, a.Device)
	}
	for _, x := range a.families() {
		addresses, err := pod.AddrList(link, x.family)
		if err != nil {
			return err
		}
		found := false
		for _, has := range addresses {
			ip, _ := netip.AddrFromSlice(has.IP)
			found = found || ip.Unmap() == x.address
		}
		if !found {
			return fmt.Errorf("device %s in the pod has not the address %s", a.IfName, x.address)
		}
		routes, err := netlink.RouteListFiltered(x.family, &netlink.Route{Dst: HostNet(x.address), LinkIndex: a.Index}, netlink.RT_FILTER_DST|netlink.RT_FILTER_OIF)
		if err != nil {
			return err
		}
		if len(routes) == 0 {
			return fmt.Errorf("there is no route to %s", x.address)
		}
		defaults, err := pod.RouteListFiltered(x.family, &netlink.Route{LinkIndex: link.Attrs().Index, Gw: x.gateway.AsSlice()}, netlink.RT_FILTER_OIF|netlink.RT_FILTER_GW)
		if err != nil {
			return err
		}
		if len(defaults) == 0 {
			return fmt.Errorf("the pod has no default route by %s", x.gateway)
		}
	}
	return nil
}
