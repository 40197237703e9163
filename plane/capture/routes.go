package capture

import (
	"errors"
	"net"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/service"
)

// What the table marks is delivered here by a rule a family and interface, and a table of
// routes in which every address is one of this host:
//
//	ip rule add iif eth1 fwmark 0x706e3774 lookup 28788 proto 112
//	ip route add local default dev lo table 28788 proto 112
//
// The interface is named so that the mark does not count where the kernel looks for the
// way back (net.ipv4.conf.*.src_valid_mark): it would find that the sender is this host.

// rulePriority is the place of the rules, before those of tables main and default.
const rulePriority = 28788

// anyInterface stands for what a proxy that keeps the source of its clients is answered,
// wherever that arrives.
const anyInterface = ""

// needsRoutes reports whether anything is delivered that wants to go elsewhere.
func needsRoutes(entries []entry) bool { return len(interfacesOf(entries)) > 0 }

// interfacesOf returns where packets arrive that may be delivered.
func interfacesOf(entries []entry) (all []string) {
	for _, e := range entries {
		if e.Mode == config.CaptureTProxy {
			all = append(all, e.Interface)
		}
		if e.KeepSource {
			all = append(all, anyInterface)
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

func linkFamily(f service.Family) int {
	if f == service.V4 {
		return netlink.FAMILY_V4
	}
	return netlink.FAMILY_V6
}

func everyAddress(f service.Family) *net.IPNet {
	n := f.Length()
	return &net.IPNet{IP: make(net.IP, n), Mask: make(net.IPMask, n)}
}

// setRoutes has marked packets of interfaces be delivered here, and no others. What is
// there already is not touched.
func setRoutes(interfaces []string) error {
	var errs []error
	for _, f := range service.EachFamily {
		if f == service.V6 && isWithoutIPv6() {
			continue
		}
		errs = append(errs, setRoutesOf(f, interfaces))
	}
	return errors.Join(errs...)
}

// isWithoutIPv6 reports whether this host has no IPv6, or none on the loopback, where
// packets would be delivered.
func isWithoutIPv6() bool {
	b, err := os.ReadFile("/proc/sys/net/ipv6/conf/lo/disable_ipv6")
	return err != nil || strings.TrimSpace(string(b)) == "1"
}

func setRoutesOf(f service.Family, interfaces []string) error {
	have, err := rulesOf(f)
	if err != nil {
		return err
	}
	var errs []error
	if len(interfaces) > 0 {
		errs = append(errs, netlink.RouteReplace(&netlink.Route{
			Table: host.LocalTable, Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST, Dst: everyAddress(f), LinkIndex: loopback, Protocol: host.RouteProtocol, Family: linkFamily(f),
		}))
	}
	for _, name := range interfaces {
		if _, ok := have[name]; !ok {
			errs = append(errs, netlink.RuleAdd(ruleFor(f, name)))
		}
	}
	for name, r := range have {
		if !slices.Contains(interfaces, name) {
			errs = append(errs, netlink.RuleDel(&r))
		}
	}
	if len(interfaces) == 0 {
		errs = append(errs, removeRoutesOf(f))
	}
	return errors.Join(errs...)
}

// loopback is the number of the loopback interface in every network namespace
// (include/net/flow.h, LOOPBACK_IFINDEX).
const loopback = 1

func ruleFor(f service.Family, name string) *netlink.Rule {
	r := netlink.NewRule()
	r.Family, r.Priority, r.Table, r.Mark, r.IifName, r.Protocol = linkFamily(f), rulePriority, host.LocalTable, host.LocalMark, name, host.RouteProtocol
	return r
}

// rulesOf returns the rules that are there, by their interface, whoever made them.
func rulesOf(f service.Family) (map[string]netlink.Rule, error) {
	all, err := netlink.RuleListFiltered(linkFamily(f), &netlink.Rule{Table: host.LocalTable}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, err
	}
	have := make(map[string]netlink.Rule)
	for _, r := range all {
		if r.Protocol == host.RouteProtocol && r.Mark == host.LocalMark {
			have[r.IifName] = r
		}
	}
	return have, nil
}

func removeRoutesOf(f service.Family) error {
	routes, err := netlink.RouteListFiltered(linkFamily(f), &netlink.Route{Table: host.LocalTable}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return err
	}
	var errs []error
	for _, r := range routes {
		if r.Protocol == host.RouteProtocol {
			errs = append(errs, netlink.RouteDel(&r))
		}
	}
	return errors.Join(errs...)
}

// routesIntact reports whether what setRoutes made is there. What cannot be seen is not
// missing.
func routesIntact(interfaces []string) bool {
	for _, f := range service.EachFamily {
		have, err := rulesOf(f)
		if err != nil || f == service.V6 && isWithoutIPv6() {
			continue
		}
		for _, name := range interfaces {
			if _, ok := have[name]; !ok {
				return false
			}
		}
		if len(have) != len(interfaces) {
			return false
		}
		routes, err := netlink.RouteListFiltered(linkFamily(f), &netlink.Route{Table: host.LocalTable, Type: unix.RTN_LOCAL}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE)
		if err == nil && len(routes) == 0 && len(interfaces) > 0 {
			return false
		}
	}
	return true
}
