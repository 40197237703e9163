package view

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"github.com/pentad/pentad/service"
)

// Rate is what a service does, from one look at the kernel to the next.
type Rate struct {
	Service              string  `json:"service"`
	ConnectionsPerSecond float64 `json:"connectionsPerSecond"`
	FailuresPerSecond    float64 `json:"failuresPerSecond"`
	InFlight             uint64  `json:"inFlight"`
	RTTSeconds           float64 `json:"rttSeconds,omitempty"`      // of the slowest backend that takes connections
	ResponseSeconds      float64 `json:"responseSeconds,omitempty"` // the same
	Usable               int     `json:"usable"`                    // backends that take the next connection
	Backends             int     `json:"backends"`
}

// Tally is what backends had done at one moment, of which rates are made.
type Tally map[string]map[netip.AddrPort]counts

// Tally returns what the backends of this look had done.
func (h *Host) Tally() Tally {
	t := make(Tally, len(h.Kernel.Loads))
	for name, loads := range h.Kernel.Loads {
		of := make(map[netip.AddrPort]counts, len(loads))
		for a, l := range loads {
			of[a] = counts{l.Connections, l.Failed}
		}
		t[name] = of
	}
	return t
}

// Rates returns what every service did since an earlier moment, the busiest first. A
// backend that was not there before counts from nothing.
func Rates(before Tally, after *Host, elapsed time.Duration) []Rate {
	all := make([]Rate, 0, len(after.Kernel.Services))
	for _, s := range after.Kernel.Services {
		r := Rate{Service: s.Name}
		had := before[s.Name]
		var begun, failed uint64
		for _, f := range service.EachFamily {
			for _, b := range after.choose(s, f).Candidates {
				l := after.Kernel.Loads[s.Name][b.Address]
				begun += since(had[b.Address].begun, l.Connections)
				failed += since(had[b.Address].failed, l.Failed)
				r.InFlight += uint64(l.InFlight)
				r.Backends++
				if b.Takes {
					r.Usable++
					r.RTTSeconds, r.ResponseSeconds = max(r.RTTSeconds, l.RTT.Seconds()), max(r.ResponseSeconds, l.Response.Seconds())
				}
			}
		}
		r.ConnectionsPerSecond, r.FailuresPerSecond = float64(begun)/elapsed.Seconds(), float64(failed)/elapsed.Seconds()
		all = append(all, r)
	}
	slices.SortStableFunc(all, func(a, b Rate) int {
		return cmp.Or(cmp.Compare(b.ConnectionsPerSecond, a.ConnectionsPerSecond), cmp.Compare(b.InFlight, a.InFlight))
	})
	return all
}

// counts are those of one backend.
type counts struct{ begun, failed uint64 }

// since is by how much a counter has grown; one that began anew has grown by what it is.
func since(before, now uint64) uint64 {
	if now < before {
		return now
	}
	return now - before
}
