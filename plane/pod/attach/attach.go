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
	Network   string // the name of the network, as the runtime has it
	Pod       string // namespace/name, for people; may be empty
	Wanted    netip.Addr
}

// Attachment is a device that a pod has.
type Attachment struct {
	Owner
	Device  string // the host's end
	Index   int    // of that
	V4, V6  netip.Addr
	PodMAC  net.HardwareAddr
	HostMAC net.HardwareAddr
	MTU     int
}

// Owner is whose a device is, as its alias says.
type Owner struct {
	Network, Container, IfName, Pod string
}

const aliasPrefix = "pentad"

// maxAlias is IFALIASZ of the kernel, without its end.
const maxAlias = 255

// alias is what the device says of itself: whose it is, and its addresses, which stay the
// same whatever becomes of the blocks.
func (a Attachment) alias() string {
	text := strings.Join([]string{aliasPrefix, a.Container, a.IfName, orDash(a.V4), orDash(a.V6), word(a.Network)}, " ")
	// The pod's name is for people: as much of it as there is room for.
	pod := word(a.Pod)
	return text + " " + pod[:max(1, min(len(pod), maxAlias-len(text)-1))]
}

func orDash(a netip.Addr) string {
	if !a.IsValid() {
		return "-"
	}
	return a.String()
}

// word makes one word of a text.
func word(text string) string {
	if text = strings.Join(strings.FieldsFunc(text, func(r rune) bool { return r <= ' ' || r == 0x7f }), "_"); text == "" {
		return "-"
	}
	return text
}

// parseAlias reads what a device says of itself.
func parseAlias(alias string) (a Attachment, ok bool) {
	fields := strings.Fields(alias)
	if len(fields) != 7 || fields[0] != aliasPrefix {
		return a, false
	}
	a.Owner = Owner{Container: fields[1], IfName: fields[2], Network: fields[5], Pod: fields[6]}
	for i, to := range map[int]*netip.Addr{3: &a.V4, 4: &a.V6} {
		if fields[i] == "-" {
			continue
		}
		x, err := netip.ParseAddr(fields[i])
		if err != nil {
			return a, false
		}
		*to = x
	}
	a.PodMAC = slot{a.V4, a.V6}.mac()
	return a, a.V4.IsValid() || a.V6.IsValid()
}

// ErrFull says that no block of this host has an address left.
var ErrFull = errors.New("no address is left in the blocks of this host")

// Attach gives a pod a device, or returns the one that it has already. It is safe to be
// repeated after it was interrupted at any point: what is left of the last time is
// removed.
func Attach(ctx context.Context, n Network, r Request) (Attachment, error) {
	ns, err := netns.GetFromPath(r.Netns)
	if err != nil {
		return Attachment{}, fmt.Errorf("the network namespace %s cannot be opened: %w", r.Netns, err)
	}
	defer ns.Close()
	if err := isAnother(ns); err != nil {
		return Attachment{}, err
	}
	pod, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return Attachment{}, fmt.Errorf("the network namespace %s: %w", r.Netns, err)
	}
	defer pod.Close()
	if err := removeUnnamed(pod, r.IfName); err != nil {
		return Attachment{}, err
	}
	all, err := List()
	if err != nil {
		return Attachment{}, err
	}
	for _, a := range all {
		if a.Container != r.Container || a.IfName != r.IfName {
			continue
		}
		// What the host has of it may have been taken away a moment ago.
		if err := a.Repair(); err == nil && a.check(pod) == nil {
			return a, nil
		}
		if err := remove(a); err != nil {
			return Attachment{}, err
		}
	}
	return reserve(ctx, n, r, all, ns, pod)
}

// removeUnnamed removes a device that a plugin made for the pod which was interrupted
// before it could say whose it is.
func removeUnnamed(pod *netlink.Handle, ifName string) error {
	inPod, err := pod.LinkByName(ifName)
	if err != nil {
		return nil // there is none
	}
	ours, err := netlink.LinkByIndex(inPod.Attrs().ParentIndex)
	if err != nil || !isOurs(ours) || ours.Attrs().Alias != "" || ours.Attrs().ParentIndex != inPod.Attrs().Index {
		return nil // it is somebody else's, or it is known whose it is
	}
	return deleteLink(ours)
}

// reserve makes a device under the first address that nobody has, and all that belongs to
// it. What fails leaves nothing behind.
func reserve(ctx context.Context, n Network, r Request, others []Attachment, ns netns.NsHandle, pod *netlink.Handle) (Attachment, error) {
	used, err := usedNames()
	if err != nil {
		return Attachment{}, err
	}
	// Blocks of both families may have been put together otherwise before.
	taken := make(map[netip.Addr]bool)
	for _, o := range others {
		taken[o.V4], taken[o.V6] = true, true
	}
	delete(taken, netip.Addr{})
	for slot := range n.slots(r.Wanted) {
		if err := ctx.Err(); err != nil {
			return Attachment{}, fmt.Errorf("there was no time left: %w", err)
		}
		if used[slot.device()] || taken[slot.v4] || taken[slot.v6] {
			continue
		}
		a := Attachment{Owner: Owner{r.Network, r.Container, r.IfName, r.Pod}, Device: slot.device(), V4: slot.v4, V6: slot.v6, PodMAC: slot.mac(), HostMAC: hostMAC, MTU: n.MTU}
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
			return Attachment{}, errors.Join(err, remove(a), removeUnnamed(pod, r.IfName))
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
	attrs.Name, attrs.HardwareAddr, attrs.MTU = a.Device, a.HostMAC, a.MTU
	return netlink.LinkAdd(&netlink.Veth{
		LinkAttrs: attrs, PeerName: a.IfName, PeerHardwareAddr: a.PodMAC, PeerNamespace: netlink.NsFd(ns), PeerMTU: uint32(a.MTU), PeerTxQLen: -1,
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
			return ignoreGone(fmt.Errorf("device %s: its neighbour: %w", a.Device, err))
		}
		route := &netlink.Route{LinkIndex: a.Index, Dst: HostNet(x.address), Scope: netlink.SCOPE_LINK, Protocol: Protocol}
		if x.family == netlink.FAMILY_V6 {
			route.Scope = netlink.SCOPE_UNIVERSE
		}
		if err := netlink.RouteReplace(route); err != nil {
			return ignoreGone(fmt.Errorf("the route to %s: %w", x.address, err))
		}
	}
	return nil
}

// ignoreGone passes over what fails because the device has gone meanwhile.
func ignoreGone(err error) error {
	if errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
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

// setSysctls prepares the host's end: it passes on what the pod sends, and takes no
// address from whoever advertises routers there.
func setSysctls(device string, v6 bool) error {
	type setting struct {
		name, value string
		needed      bool
	}
	settings := []setting{
		{"ipv4/conf/" + device + "/forwarding", "1", true},
		{"ipv4/conf/" + device + "/rp_filter", "1", true},
		{"ipv6/conf/" + device + "/disable_ipv6", "0", v6},
		{"ipv6/conf/" + device + "/accept_ra", "0", v6},
		{"ipv6/conf/" + device + "/forwarding", "1", v6},
	}
	for _, s := range settings {
		err := os.WriteFile("/proc/sys/net/"+s.name, []byte(s.value), 0)
		if err != nil && s.needed {
			return fmt.Errorf("net.%s: %w", strings.ReplaceAll(s.name, "/", "."), err)
		}
	}
	return nil
}

// forgetFlows forgets connections of a pod that is gone: somebody else has the address next.
// It is no part of Attach, because the kernel looks through all that it tracks, which takes
// longer than all the rest. Without conntrack there are none.
func (a *Attachment) forgetFlows() {
	for _, x := range a.families() {
		var filters []netlink.CustomConntrackFilter
		for _, part := range []netlink.ConntrackFilterType{netlink.ConntrackOrigSrcIP, netlink.ConntrackOrigDstIP, netlink.ConntrackReplySrcIP} {
			f := &netlink.ConntrackFilter{}
			if f.AddIP(part, x.address.AsSlice()) == nil {
				filters = append(filters, f)
			}
		}
		_, _ = netlink.ConntrackDeleteFilters(netlink.ConntrackTable, netlink.InetFamily(x.family), filters...)
	}
}

// Detach takes a pod's device away. There may be none, and no network namespace either.
func Detach(container, ifName, ns string) error {
	all, err := List()
	if err != nil {
		return err
	}
	var errs []error
	for _, a := range all {
		if a.Container == container && a.IfName == ifName {
			errs = append(errs, remove(a))
			a.forgetFlows()
		}
	}
	return errors.Join(append(errs, removeUnnamedIn(ns, ifName))...)
}

// removeUnnamedIn is removeUnnamed for a namespace that may be gone.
func removeUnnamedIn(path, ifName string) error {
	if path == "" {
		return nil
	}
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return nil // and so is everything in it
	}
	defer ns.Close()
	if isAnother(ns) != nil {
		return nil
	}
	pod, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer pod.Close()
	return removeUnnamed(pod, ifName)
}

// isAnother reports an error if a namespace is the one of this host: the other end of a
// device there would be the host itself.
func isAnother(ns netns.NsHandle) error {
	own, err := netns.Get()
	if err != nil {
		return err
	}
	defer own.Close()
	if own.Equal(ns) {
		return errors.New("the network namespace of the pod is that of the host: it needs no device")
	}
	return nil
}

// remove deletes a device, and with it its routes and neighbours. It may be gone, and its
// name somebody else's.
func remove(a Attachment) error {
	link, err := netlink.LinkByName(a.Device)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err != nil {
		return err
	}
	if link.Attrs().Index != a.Index {
		return nil
	}
	return deleteLink(link)
}

func deleteLink(link netlink.Link) error {
	if err := netlink.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("device %s: %w", link.Attrs().Name, err)
	}
	return nil
}

// RemoveAll removes the devices of all pods, those that do not say whose they are as well.
func RemoveAll() error {
	links, err := Links()
	if err != nil {
		return err
	}
	var errs []error
	for _, l := range links {
		if isOurs(l) {
			errs = append(errs, deleteLink(l))
		}
	}
	return errors.Join(errs...)
}

// isOurs reports whether a device is the host's end of one of ours.
func isOurs(l netlink.Link) bool {
	x := l.Attrs()
	return l.Type() == "veth" && strings.HasPrefix(x.Name, DevicePrefix) && x.HardwareAddr.String() == hostMAC.String()
}

// Check reports what is wrong with the device that a pod should have.
func Check(r Request) error {
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
