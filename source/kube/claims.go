package kube

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/pentad/pentad/service"
)

// claims say which Services want which listeners. Two that want the same one for
// the same clients cannot both have it: the older has it, as the API server would
// have had it, so that nobody takes a listener away from somebody.
type claims map[service.Listener][]claim

type claim struct {
	owner   types.NamespacedName
	created time.Time
	from    service.From
}

// before orders claims by precedence.
func (c claim) before(o claim) bool {
	return cmp.Or(c.created.Compare(o.created), cmp.Compare(c.owner.String(), o.owner.String())) < 0
}

// add notes what a Service wants, and remove forgets it. Both return the other
// Services that want any of the same.
func (c claims) add(s *clusterService, wanted []*service.Service) []types.NamespacedName {
	var others []types.NamespacedName
	for _, w := range wanted {
		for _, l := range w.Listeners {
			at := l.At()
			others = appendOwners(others, c[at], s.key())
			c[at] = append(c[at], claim{s.key(), s.created, l.From})
		}
	}
	return others
}

func (c claims) remove(owner types.NamespacedName, wanted []*service.Service) []types.NamespacedName {
	var others []types.NamespacedName
	for _, w := range wanted {
		for _, l := range w.Listeners {
			at := l.At()
			rest := slices.DeleteFunc(c[at], func(x claim) bool { return x.owner == owner })
			if len(rest) == 0 {
				delete(c, at)
				continue
			}
			c[at] = rest
			others = appendOwners(others, rest, owner)
		}
	}
	return others
}

func appendOwners(to []types.NamespacedName, from []claim, but types.NamespacedName) []types.NamespacedName {
	for _, x := range from {
		if x.owner != but {
			to = append(to, x.owner)
		}
	}
	return to
}

// grant returns the services with the listeners that they may have, and what is
// to be said about the others. Services that lose nothing are the same pointers.
func (c claims) grant(owner types.NamespacedName, wanted []*service.Service) (granted []*service.Service, problems []string) {
	for _, w := range wanted {
		var kept []service.Listener
		for i, l := range w.Listeners {
			holder, lost := c.loses(owner, l)
			if lost && kept == nil {
				kept = append(make([]service.Listener, 0, len(w.Listeners)), w.Listeners[:i]...)
			}
			if lost {
				problems = append(problems, fmt.Sprintf(
					"%s is not served for it: it belongs to the older Service %s; choose another address or port", l, holder))
			} else if kept != nil {
				kept = append(kept, l)
			}
		}
		if kept == nil {
			granted = append(granted, w)
		} else if len(kept) > 0 {
			lesser := *w
			lesser.Listeners = kept
			granted = append(granted, &lesser)
		}
	}
	return granted, problems
}

func (c claims) loses(owner types.NamespacedName, l service.Listener) (holder types.NamespacedName, lost bool) {
	all := c[l.At()]
	if len(all) < 2 {
		return holder, false
	}
	i := slices.IndexFunc(all, func(x claim) bool { return x.owner == owner && x.from == l.From })
	if i < 0 {
		return holder, false
	}
	mine := all[i]
	for _, x := range all {
		if x.owner != owner && x.from&l.From != 0 && x.before(mine) {
			return x.owner, true
		}
	}
	return holder, false
}
