package view

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/pentad/pentad/flow"
	"github.com/pentad/pentad/service"
)

// Questions reads a destination. An address alone asks for each of its listeners, the
// name of a service for each of its. The error says what is wrong with the text.
func (e *Explainer) Questions(text string) ([]flow.Question, error) {
	owners := e.owners
	listeners := slices.SortedFunc(maps.Keys(owners), service.Listener.Compare)
	questions := func(wanted func(service.Listener) bool) (all []flow.Question) {
		for _, l := range listeners {
			if wanted(l) {
				all = append(all, flow.Question{Destination: l.Address, Protocol: l.Protocol})
			}
		}
		return all
	}
	if all := questions(func(l service.Listener) bool { return slices.Contains(owners[l], text) }); all != nil {
		return all, nil
	}
	dest, protocol, named := strings.Cut(text, "/")
	if all := questions(func(l service.Listener) bool {
		return slices.Contains(owners[l], dest) && l.Protocol.String() == protocol
	}); all != nil {
		return all, nil
	}
	q := flow.Question{Protocol: service.TCP}
	switch {
	case !named || protocol == "tcp":
	case protocol == "udp":
		q.Protocol = service.UDP
	case strings.Contains(text, "://"):
		return nil, fmt.Errorf("%q: write the address without what stands before ://", text)
	default:
		return nil, fmt.Errorf("%q: want protocol tcp or udp, found %q", text, protocol)
	}
	var err error
	if q.Destination, err = netip.ParseAddrPort(dest); err == nil {
		q.Destination = netip.AddrPortFrom(q.Destination.Addr().Unmap(), q.Destination.Port())
		return []flow.Question{q}, nil
	}
	addr, err := netip.ParseAddr(strings.Trim(dest, "[]"))
	if err != nil {
		return nil, fmt.Errorf("%q is no destination; want ADDRESS:PORT, such as 10.96.0.10:3306 or [2001:db8::10]:53/udp, or the name of a service; "+
			"other names are not resolved%s", text, nearestOwner(owners, dest))
	}
	all := questions(func(l service.Listener) bool {
		return l.Address.Addr() == addr.Unmap() && (!named || l.Protocol == q.Protocol)
	})
	if all == nil {
		hint := ""
		host, port, _ := cutLast(dest, ":")
		if a, err := netip.ParseAddr(host); err == nil && a.Is6() && !strings.HasPrefix(dest, "[") {
			hint = fmt.Sprintf("; did you mean [%s]:%s?", host, port)
		}
		return nil, fmt.Errorf("no service listens on %s; name a port to have a connection explained all the same%s", addr, hint)
	}
	return all, nil
}

// nearestOwner says which service was probably meant.
func nearestOwner(owners map[service.Listener][]string, name string) string {
	var names []string
	for _, some := range owners {
		names = append(names, some...)
	}
	if near := service.NearestWord(name, names); near != "" {
		return fmt.Sprintf("; did you mean %q?", near)
	}
	return ""
}

func cutLast(text, sep string) (before, after string, found bool) {
	i := strings.LastIndex(text, sep)
	if i < 0 {
		return text, "", false
	}
	return text[:i], text[i+len(sep):], true
}
