package kube

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"

	"github.com/pentad/pentad/source"
)

// cidr is a ServiceCIDR: ranges out of which ClusterIPs are taken (KEP-1880).
type cidr struct {
	meta
	ranges   []netip.Prefix
	problems []string // with what was read
}

func trimCIDR(o *networkingv1.ServiceCIDR) *cidr {
	c := &cidr{meta: keepMeta(&o.ObjectMeta)}
	for _, text := range o.Spec.CIDRs {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			c.problems = append(c.problems, fmt.Sprintf("%q is no range of addresses", text))
			continue
		}
		c.ranges = append(c.ranges, p.Masked())
	}
	return c
}

// reserve returns the ranges whose addresses only Services have, sorted. A range in
// which somebody else has an address is left out, and said: the addresses of this
// host, of its pods, and of endpoints (by Service).
func reserve(all []*cidr, own map[netip.Addr]bool, pods []netip.Prefix, endpoints map[types.NamespacedName]netip.Addr) ([]netip.Prefix, []source.Problem) {
	var reserved []netip.Prefix
	var problems []source.Problem
	for _, c := range all {
		said := c.problems
		for _, r := range c.ranges {
			who := intruder(r, own, pods, endpoints)
			if who == "" {
				reserved = append(reserved, r)
				continue
			}
			said = append(slices.Clone(said), fmt.Sprintf("%s has %s: what is sent to addresses that no Service has is not refused there; "+
				"give Services a range of their own, or, if something of this node serves a ClusterIP there, such as a DNS cache, the annotation "+
				"pentad.io/local: bypass to that Service", r, who))
		}
		for _, text := range said {
			problems = append(problems, source.Problem{Object: "ServiceCIDR " + c.Name, Message: text})
		}
	}
	slices.SortFunc(reserved, netip.Prefix.Compare)
	return slices.Compact(reserved), problems
}

// intruder names who has an address in a range that Services should have alone.
func intruder(r netip.Prefix, own map[netip.Addr]bool, pods []netip.Prefix, endpoints map[types.NamespacedName]netip.Addr) string {
	var all []string
	for a := range own {
		if r.Contains(a) {
			all = append(all, fmt.Sprintf("the address %s of this node", a))
		}
	}
	for _, g := range pods {
		if r.Overlaps(g) {
			all = append(all, fmt.Sprintf("addresses of pods (%s)", g))
		}
	}
	for owner, a := range endpoints {
		if r.Contains(a) {
			all = append(all, fmt.Sprintf("the endpoint %s of the Service %s", a, owner))
		}
	}
	if all == nil {
		return ""
	}
	return slices.Min(all)
}

// cidrs returns the ServiceCIDRs by name.
func (s *Source) cidrs() []*cidr {
	var all []*cidr
	for _, o := range s.ranges.GetStore().List() {
		all = append(all, o.(*cidr))
	}
	slices.SortFunc(all, func(a, b *cidr) int { return strings.Compare(a.Name, b.Name) })
	return all
}

// rangesFailed is for clusters that have no ServiceCIDRs (before Kubernetes 1.33) or
// do not show them: everything else works without.
func (s *Source) rangesFailed(ctx context.Context, r *cache.Reflector, err error) {
	if !apierrors.IsNotFound(err) && !apierrors.IsForbidden(err) {
		s.watchFailed(ctx, r, err)
		return
	}
	s.mu.Lock()
	first := s.noRanges == nil
	s.noRanges = err
	s.mu.Unlock()
	if first {
		s.log.Info("ServiceCIDRs cannot be read; what is sent to addresses that no Service has goes where this host's routes lead",
			"source", "kubernetes", "error", err)
		s.touchAll()
	}
}

// rangesKnown reports whether the ServiceCIDRs are known, or that they will not be.
func (s *Source) rangesKnown() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.noRanges != nil || s.rangesRegistration.HasSynced()
}

// rangesProblem says what to do about ServiceCIDRs that this node may not read.
func (s *Source) rangesProblem() []source.Problem {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !apierrors.IsForbidden(s.noRanges) || s.rangesRegistration.HasSynced() {
		return nil
	}
	return []source.Problem{{Object: "ServiceCIDRs", Message: "they may not be read, so that what is sent to addresses that no Service has is not refused: " +
		"let the ClusterRole pentad list and watch servicecidrs of networking.k8s.io"}}
}
