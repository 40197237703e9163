package proxy

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/pentad/pentad/config"
)

// question is what decides by which way a connection goes.
type question struct {
	client netip.Addr
	user   string
	to     target
}

// answer is by which way one goes: the names of upstreams, or one that is config.Direct
// or config.Refuse.
type answer struct {
	via  []string
	rule int // its number, from 0; -1: there are no rules, or none fits
}

// choose returns the way of the first rule that fits. needsAddress is true when a rule
// that comes before any that fits asks for an address, and the target has a name.
func choose(rules []config.ProxyRule, q question) (a answer, needsAddress bool) {
	if len(rules) == 0 {
		return answer{[]string{config.Direct}, -1}, false
	}
	for i, r := range rules {
		if !fitsButAddress(r, q) {
			continue
		}
		if len(r.Destinations) == 0 || contains(r.Destinations, q.to.IP) {
			return answer{r.Via, i}, false
		}
		if !q.to.IP.IsValid() {
			return answer{}, true
		}
	}
	return answer{[]string{config.Refuse}, -1}, false
}

func fitsButAddress(r config.ProxyRule, q question) bool {
	inRange := func(p config.PortRange) bool { return p.First <= q.to.Port && q.to.Port <= p.Last }
	under := func(domain string) bool { return isUnder(q.to.Name, domain) }
	return (len(r.Ports) == 0 || slices.ContainsFunc(r.Ports, inRange)) &&
		(len(r.Domains) == 0 || slices.ContainsFunc(r.Domains, under)) &&
		(len(r.Clients) == 0 || contains(r.Clients, q.client)) &&
		(len(r.Users) == 0 || slices.Contains(r.Users, q.user))
}

func contains(prefixes []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
}

// isUnder reports whether a name is a domain, or lies below one that begins with a dot.
func isUnder(name, domain string) bool {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	if name == "" {
		return false
	}
	return name == strings.TrimPrefix(domain, ".") || strings.HasPrefix(domain, ".") && strings.HasSuffix(name, domain)
}
