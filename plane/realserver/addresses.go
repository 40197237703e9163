package realserver

import (
	"errors"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/host"
)

// loopback is the number of the loopback interface in every network namespace
// (include/net/flow.h, LOOPBACK_IFINDEX).
const loopback = 1

// ifaProto is IFA_PROTO of linux/if_addr.h: who has made an address (Linux 5.18).
const ifaProto = 11

// setVIPs makes the VIPs that the loopback has from us just these.
func setVIPs(wanted []netip.Addr) error {
	have, err := vipsOfHost()
	if err != nil {
		return err
	}
	var errs []error
	for _, a := range wanted {
		if !slices.Contains(have, a) {
			// One that somebody else has put there is his.
			err := change(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK, a)
			if !errors.Is(err, unix.EEXIST) {
				errs = append(errs, err)
			}
		}
	}
	for _, a := range have {
		if !slices.Contains(wanted, a) {
			errs = append(errs, change(unix.RTM_DELADDR, unix.NLM_F_ACK, a))
		}
	}
	return errors.Join(errs...)
}

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// change adds an address to the loopback, or removes it. It is there at once (NODAD), and
// this host does not choose it for what it sends of its own accord.
func change(request, flags int, a netip.Addr) error {
	r := nl.NewNetlinkRequest(request, flags)
	m := nl.NewIfAddrmsg(familyOf(a))
	m.Index, m.Prefixlen, m.Scope = loopback, uint8(a.BitLen()), unix.RT_SCOPE_HOST
	r.AddData(m)
	r.AddData(nl.NewRtAttr(unix.IFA_LOCAL, a.AsSlice()))
	r.AddData(nl.NewRtAttr(unix.IFA_ADDRESS, a.AsSlice()))
	r.AddData(nl.NewRtAttr(unix.IFA_FLAGS, nl.Uint32Attr(unix.IFA_F_NODAD)))
	r.AddData(nl.NewRtAttr(ifaProto, []byte{host.RouteProtocol}))
	if a.Is6() && request == unix.RTM_NEWADDR {
		const forever = 0xffffffff
		// Deprecated: preferred for no time, valid for ever (struct ifa_cacheinfo).
		r.AddData(nl.NewRtAttr(unix.IFA_CACHEINFO, slices.Concat(nl.Uint32Attr(0), nl.Uint32Attr(forever), nl.Uint32Attr(0), nl.Uint32Attr(0))))
	}
	_, err := r.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// vipsOfHost returns the addresses that the loopback has from us, sorted.
func vipsOfHost() ([]netip.Addr, error) {
	r := nl.NewNetlinkRequest(unix.RTM_GETADDR, unix.NLM_F_DUMP)
	r.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	messages, err := r.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWADDR)
	if err != nil {
		return nil, err
	}
	var all []netip.Addr
	for _, b := range messages {
		m := nl.DeserializeIfAddrmsg(b)
		if m.Index != loopback {
			continue
		}
		attributes, err := nl.ParseRouteAttr(b[m.Len():])
		if err != nil {
			return nil, err
		}
		var a netip.Addr
		ours := false
		for _, x := range attributes {
			switch x.Attr.Type {
			case unix.IFA_ADDRESS:
				a, _ = netip.AddrFromSlice(x.Value)
			case ifaProto:
				ours = len(x.Value) > 0 && x.Value[0] == host.RouteProtocol
			}
		}
		if ours && a.IsValid() {
			all = append(all, a)
		}
	}
	slices.SortFunc(all, netip.Addr.Compare)
	return all, nil
}
