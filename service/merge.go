package service

import (
	"fmt"
	"slices"
)

// Source is where a service comes from.
type Source uint8

// The sources, in the order of their word on an address that several want.
const (
	// SourceUnknown is that of a service that an earlier version has installed.
	SourceUnknown Source = iota
	// SourceFile is the configuration file of this host.
	SourceFile
	// SourceKubernetes is a Kubernetes cluster.
	SourceKubernetes
	// SourceEtcd is the etcd of a fleet.
	SourceEtcd
)

// sources are how people call them, by Source.
var sources = []string{"unknown", "file", "kubernetes", "etcd"}

// String returns the word for the source.
func (s Source) String() string {
	if int(s) < len(sources) {
		return sources[s]
	}
	return fmt.Sprintf("source %d", uint8(s))
}

// Sources is a set of sources.
type Sources uint8

// With returns the set with a source in it.
func (s Sources) With(x Source) Sources { return s | 1<<x }

// Without returns the set without a source.
func (s Sources) Without(x Source) Sources { return s &^ (1 << x) }

// Has reports whether a source is in the set. What comes from an unknown one may come
// from any.
func (s Sources) Has(x Source) bool {
	if x == SourceUnknown {
		return s != 0
	}
	return s&(1<<x) != 0
}

// Merge puts the services of several sources together, those of the one that has the
// first word first. A listener that an earlier source has is not served for a later one,
// nor is a service whose name an earlier source has; lost says so, a sentence each.
// Services that lose nothing are the same pointers.
func Merge(bySource ...[]*Service) (merged []*Service, lost []string) {
	bySource = slices.DeleteFunc(slices.Clone(bySource), func(all []*Service) bool { return len(all) == 0 })
	switch len(bySource) {
	case 0:
		return nil, nil
	case 1:
		return bySource[0], nil
	}
	owners := make(map[Listener]*Service)
	names := make(map[string]*Service)
	for i, all := range bySource {
		for _, s := range all {
			if other := names[s.Name]; other != nil {
				lost = append(lost, fmt.Sprintf("service %s of the source %s is not served on this host: the source %s has one of that name", s.Name, s.Source, other.Source))
				continue
			}
			kept, losses := s.without(owners)
			lost = append(lost, losses...)
			if kept != nil {
				merged = append(merged, kept)
			}
		}
		if i == len(bySource)-1 {
			break
		}
		for _, s := range all {
			if names[s.Name] != nil {
				continue
			}
			names[s.Name] = s
			for _, l := range s.Listeners {
				if owners[l.At()] == nil {
					owners[l.At()] = s
				}
			}
		}
	}
	return merged, lost
}

// without returns the service without the listeners that others own, nil if it has no
// other, and what it has lost.
func (s *Service) without(owners map[Listener]*Service) (kept *Service, lost []string) {
	isTaken := func(l Listener) bool { return owners[l.At()] != nil }
	if !slices.ContainsFunc(s.Listeners, isTaken) {
		return s, nil
	}
	c := *s
	c.Listeners = nil
	for _, l := range s.Listeners {
		owner := owners[l.At()]
		if owner == nil {
			c.Listeners = append(c.Listeners, l)
			continue
		}
		lost = append(lost, fmt.Sprintf("service %s: %s is not served for it on this host: it belongs to the service %s of the source %s",
			s.Name, l, owner.Name, owner.Source))
	}
	if len(c.Listeners) == 0 {
		return nil, lost
	}
	return &c, lost
}
