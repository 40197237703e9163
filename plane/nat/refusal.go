package nat

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/service"
)

// isRefusal reports whether the kernel will not have a change, however often it is
// asked. The rest, such as a lack of memory or of permission, concerns every change.
func isRefusal(err error) bool {
	if err == nil {
		return false
	}
	for _, passes := range []error{unix.EPERM, unix.EACCES, unix.ENOMEM, unix.ENOBUFS, unix.EINTR, unix.EAGAIN, unix.EOPNOTSUPP, unix.EPROTONOSUPPORT} {
		if errors.Is(err, passes) {
			return false
		}
	}
	return true
}

// commitSafely is commit, except that what the kernel refuses keeps nothing else from
// being served: one object of a cluster must not stop the others.
func (p *Plane) commitSafely(k *kernel, c *change, needed map[string]chain) error {
	err := p.commit(k, c, needed)
	if !isRefusal(err) {
		return err
	}
	// Some of a large change may be in the kernel.
	have, err := k.elements()
	if err != nil {
		return err
	}
	return p.divide(k, c.since(have), needed)
}

// since is what of a change is left to be done, given what the kernel has.
func (c *change) since(have []element) *change {
	there := make(map[element]bool, len(have))
	for _, e := range have {
		there[e] = true
	}
	var left change
	for _, e := range c.remove {
		if there[e] {
			left.remove = append(left.remove, e)
		}
	}
	for _, e := range c.add {
		if !there[e] {
			left.add = append(left.add, e)
		}
	}
	return &left
}

// part is what a change has of one listener.
type part struct {
	at service.Listener
	change
}

// divide commits a change that the kernel refuses as a whole: first what services
// have in common, then the listeners, of which those that are refused are noted.
func (p *Plane) divide(k *kernel, c *change, needed map[string]chain) error {
	common, parts := c.parts()
	if err := p.commitAtOnce(k, &common, needed); err != nil {
		return err
	}
	return p.commitParts(k, parts, needed)
}

// parts sorts a change by listeners; common is what has none.
func (c *change) parts() (common change, parts []part) {
	byListener := make(map[service.Listener]*part)
	of := func(e element) *change {
		switch e.in.name {
		case setServices, setPodsTo, setSlots, setChoices, setMembers, setSources:
		default:
			return &common
		}
		at, _ := splitListener(e.key, e.in.family)
		x := byListener[at]
		if x == nil {
			x = &part{at: at}
			byListener[at] = x
		}
		return &x.change
	}
	for _, e := range c.remove {
		to := of(e)
		to.remove = append(to.remove, e)
	}
	for _, e := range c.add {
		to := of(e)
		to.add = append(to.add, e)
	}
	for _, x := range byListener {
		parts = append(parts, *x)
	}
	slices.SortFunc(parts, func(a, b part) int { return a.at.Compare(b.at) })
	return common, parts
}

func (p *Plane) commitParts(k *kernel, parts []part, needed map[string]chain) error {
	if len(parts) == 0 {
		return nil
	}
	var whole change
	for _, x := range parts {
		whole.remove = append(whole.remove, x.remove...)
		whole.add = append(whole.add, x.add...)
	}
	err := p.commitAtOnce(k, &whole, needed)
	if !isRefusal(err) {
		return err
	}
	if len(parts) == 1 {
		return p.refuse(k, parts[0], err)
	}
	half := len(parts) / 2
	if err := p.commitParts(k, parts[:half], needed); err != nil {
		return err
	}
	return p.commitParts(k, parts[half:], needed)
}

// refuse notes that a listener is not served, and takes away what the kernel has of it.
func (p *Plane) refuse(k *kernel, x part, why error) error {
	p.refused[x.at] = why
	p.log.Error("the kernel refuses a listener, which is not served to packets", "table", TableName,
		"listener", x.at.String(), "services", p.namesAt(x.at), "error", why)
	return p.commitAtOnce(k, &change{remove: x.remove}, nil)
}

func (p *Plane) namesAt(at service.Listener) string {
	var names []string
	for _, s := range p.holders[at] {
		names = append(names, s.Name)
	}
	return strings.Join(names, ", ")
}

// say puts into words what is refused, so that nobody who asks waits for a change.
func (p *Plane) say() {
	var all []string
	for _, at := range slices.SortedFunc(maps.Keys(p.refused), service.Listener.Compare) {
		all = append(all, fmt.Sprintf("%s of %s is not served to packets from elsewhere: the kernel refuses it: %v",
			at, cmp.Or(p.namesAt(at), "no service"), p.refused[at]))
	}
	p.saidMu.Lock()
	p.said = all
	p.saidMu.Unlock()
}

// Warnings say which listeners the kernel would not have, and why, sorted; and which
// setting of the host keeps packets from their backends.
func (p *Plane) Warnings() []string {
	p.saidMu.Lock()
	defer p.saidMu.Unlock()
	all := slices.Clone(p.said)
	for _, f := range service.EachFamily {
		if s, ok := p.passed[f]; ok {
			all = append(all, warnOfForwarding(f, s)...)
		}
	}
	return all
}
