package view

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/service"
)

// Diff is what a set of services would change.
type Diff struct {
	Changes []Change `json:"changes"`
	Closes  int      `json:"closes"` // connections
}

// Change is one difference.
type Change struct {
	Sign    string `json:"sign"` // + it comes, - it goes, ~ it changes
	Service string `json:"service"`
	What    string `json:"what"`
}

// Empty reports whether nothing would change.
func (d Diff) Empty() bool { return len(d.Changes) == 0 }

func (d *Diff) add(sign, name, format string, args ...any) {
	d.Changes = append(d.Changes, Change{sign, name, fmt.Sprintf(format, args...)})
}

// Diff compares what sockets find with the services of a file. Those of other sources
// are left out. What the kernel does not know of a service, as its probes, is not
// compared.
func (h *Host) Diff(next []*service.Service) Diff {
	d := Diff{Changes: []Change{}}
	have := make(map[string]*service.Service)
	for _, s := range h.Kernel.Services {
		if s.Source == service.SourceFile || s.Source == service.SourceUnknown {
			have[s.Name] = s
		}
	}
	wanted := make(map[string]bool)
	renamed := service.Renamed(h.Kernel.Services, next)
	for _, s := range next {
		old := have[s.Name]
		wanted[s.Name] = true
		if before := renamed[s.Name]; before != "" && have[before] != nil {
			d.add("~", s.Name, "it was called %s", before)
			wanted[before], old = true, have[before]
		}
		if old == nil {
			d.add("+", s.Name, "%s, %s", listening(s.Listeners), Count(len(s.Backends), "backend"))
			continue
		}
		h.diffService(&d, old, s)
	}
	for _, s := range h.Kernel.Services {
		if have[s.Name] != nil && !wanted[s.Name] {
			n := h.closes(s, s.Backends)
			d.Closes += n
			d.add("-", s.Name, "%s, %s, %s", listening(s.Listeners), Count(len(s.Backends), "backend"), closing(n))
		}
	}
	return d
}

func listening(all []service.Listener) string {
	words := make([]string, len(all))
	for i, l := range all {
		words[i] = l.String()
	}
	return strings.Join(words, ", ")
}

func closing(n int) string { return Count(n, "connection") + " would be closed" }

// closes counts the connections that are closed with backends.
func (h *Host) closes(s *service.Service, gone []service.Backend) int {
	if s.OnDown == service.Keep {
		return 0
	}
	n := 0
	for _, b := range gone {
		n += int(h.Kernel.Loads[s.Name][b.Address].InFlight)
	}
	return n
}

func (h *Host) diffService(d *Diff, old, s *service.Service) {
	for _, l := range s.Listeners {
		if !slices.Contains(ats(old), l.At()) {
			d.add("+", s.Name, "listens at %s", l)
		}
	}
	for _, l := range old.Listeners {
		if !slices.Contains(ats(s), l.At()) {
			d.add("-", s.Name, "listens at %s no more", l)
		}
	}
	before := make(map[netip.AddrPort]service.Backend)
	for _, b := range old.Backends {
		before[b.Address] = b
	}
	for _, b := range s.Backends {
		o, known := before[b.Address]
		delete(before, b.Address)
		switch {
		case !known:
			d.add("+", s.Name, "backend %s", b.Address)
		case o.Drained != b.Drained && b.Drained:
			d.add("~", s.Name, "backend %s is drained", b.Address)
		case o.Weight != b.Weight || o.Group != b.Group || o.Zone != b.Zone:
			d.add("~", s.Name, "backend %s: weight %d, group %d, zone %s -> weight %d, group %d, zone %s",
				b.Address, o.Weight, o.Group, orNone(o.Zone), b.Weight, b.Group, orNone(b.Zone))
		}
	}
	for _, b := range old.Backends {
		if _, gone := before[b.Address]; gone {
			n := h.closes(old, []service.Backend{b})
			d.Closes += n
			d.add("-", s.Name, "backend %s, %s", b.Address, closing(n))
		}
	}
	for _, x := range []struct {
		what      string
		old, next any
	}{
		{"balance", old.Balance, s.Balance}, {"affinity", old.Affinity, s.Affinity}, {"keepalive", keepaliveText(old.Keepalive), keepaliveText(s.Keepalive)},
		{"breaker", breakerText(old.Breaker), breakerText(s.Breaker)}, {"connect.timeout", old.ConnectTimeout, s.ConnectTimeout}, {"onDown", old.OnDown, s.OnDown},
		{"slowStart", old.SlowStart, s.SlowStart}, {"flows", !old.Silent, !s.Silent},
	} {
		if x.old != x.next {
			d.add("~", s.Name, "%s: %v -> %v", x.what, x.old, x.next)
		}
	}
}

// breakerText and keepaliveText write them as the configuration does.
func breakerText(b service.Breaker) string {
	if b == (service.Breaker{}) {
		return "off"
	}
	var parts []string
	if b.MaxConnections > 0 {
		parts = append(parts, fmt.Sprintf("maxConnections: %d", b.MaxConnections))
	}
	parts = append(parts, fmt.Sprintf("failures: %d", b.Failures))
	if b.Failures > 0 {
		parts = append(parts, "ejection: "+config.Duration(b.Ejection), fmt.Sprintf("maxEjected: %d%%", b.MaxEjected))
	}
	return "{" + strings.Join(parts, ", ") + "}"
}

func keepaliveText(k service.Keepalive) string {
	if k == (service.Keepalive{}) {
		return "none"
	}
	return fmt.Sprintf("{idle: %s, interval: %s, probes: %d}", config.Duration(k.Idle), config.Duration(k.Interval), k.Probes)
}

func ats(s *service.Service) []service.Listener {
	all := make([]service.Listener, len(s.Listeners))
	for i, l := range s.Listeners {
		all[i] = l.At()
	}
	return all
}

func orNone(text string) string {
	if text == "" {
		return "none"
	}
	return text
}
