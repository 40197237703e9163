package kube

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/pentad/pentad/service"
)

// asked is by which field of a Service a listener is wanted.
type asked uint8

// The fields, in the order in which they count. What the API server or a controller
// has given to a Service is its own, however old others are that name it: a
// ClusterIP and a NodePort are unique, an ingress was allocated. Who names an
// address in externalIPs was given nothing.
const (
	asClusterIP asked = iota
	asNodePort
	asIngress
	asExternalIP
)

// String names what a listener is to its holder.
func (a asked) String() string {
	return [...]string{"a ClusterIP", "a NodePort", "an address of the load balancer", "an externalIP"}[a]
}

// want is a service with how each of its listeners is asked for.
type want struct {
	*service.Service
	as []asked
}

// claimed returns whose listener it is, if it is this one's: a ClusterIP is nobody
// else's also for clients that it does not serve.
func (w want) claimed(i int) service.From {
	if w.as[i] == asClusterIP {
		return service.Anywhere
	}
	return w.Listeners[i].From
}

// sockets are the clients that find one listener at an address, and not two.
const sockets = service.FromSockets | service.FromHost

// common returns the clients of both.
func common(a, b service.From) service.From {
	both := a & b
	if a&sockets != 0 && b&sockets != 0 {
		both |= b & sockets
	}
	return both
}

// claims say who wants which listeners. Of two that want the same one for the same
// clients one has it: by what it is to them, and where it is the same to both, the
// older. Clients whom only one of them wants are its own.
type claims map[service.Listener][]claim

type claim struct {
	as      asked
	owner   types.NamespacedName
	created time.Time
	service string // of the owner's, by name
	from    service.From
}

// before orders claims by precedence.
func (c claim) before(o claim) bool {
	return cmp.Or(cmp.Compare(c.as, o.as), c.created.Compare(o.created), cmp.Compare(c.owner.String(), o.owner.String()),
		cmp.Compare(c.service, o.service), cmp.Compare(c.from, o.from)) < 0
}

// add notes what a Service wants, and remove forgets it. Both return the other
// Services that want any of the same.
func (c claims) add(s *clusterService, wanted []want) []types.NamespacedName {
	var others []types.NamespacedName
	for _, w := range wanted {
		for i, l := range w.Listeners {
			at := l.At()
			others = appendOwners(others, c[at], s.key())
			c[at] = append(c[at], claim{w.as[i], s.key(), s.created, w.Name, w.claimed(i)})
		}
	}
	return others
}

func (c claims) remove(owner types.NamespacedName, wanted []want) []types.NamespacedName {
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
func (c claims) grant(owner types.NamespacedName, wanted []want) (granted []*service.Service, problems []string) {
	for _, w := range wanted {
		kept := make([]service.Listener, 0, len(w.Listeners))
		for i, l := range w.Listeners {
			left, holder := c.left(owner, w, i)
			if holder != nil && holder.owner != owner {
				problems = append(problems, fmt.Sprintf("%s %s it is %s of %s Service %s; choose another address or port",
					l, lostMark, holder.as, older(holder.as == w.as[i]), holder.owner))
			}
			if left != 0 {
				l.From = left
				kept = append(kept, l)
			}
		}
		switch {
		case slices.Equal(kept, w.Listeners):
			granted = append(granted, w.Service)
		case len(kept) > 0:
			lesser := *w.Service
			lesser.Listeners = kept
			granted = append(granted, &lesser)
		}
	}
	return granted, problems
}

func older(by bool) string {
	if by {
		return "the older"
	}
	return "the"
}

// left returns the clients of a listener that nobody else has, and who has others of
// them first.
func (c claims) left(owner types.NamespacedName, w want, i int) (left service.From, holder *claim) {
	l := w.Listeners[i]
	all := c[l.At()]
	left = l.From
	if len(all) < 2 {
		return left, nil
	}
	mine := slices.IndexFunc(all, func(x claim) bool {
		return x.owner == owner && x.service == w.Name && x.as == w.as[i] && x.from == w.claimed(i)
	})
	if mine < 0 {
		return left, nil
	}
	for _, x := range all {
		if common(x.from, l.From) == 0 || !x.before(all[mine]) {
			continue
		}
		left &^= common(x.from, l.From)
		if holder == nil || x.before(*holder) {
			holder = &x
		}
	}
	return left, holder
}
