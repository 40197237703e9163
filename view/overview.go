package view

import (
	"cmp"
	"slices"
	"time"

	"github.com/pentad/pentad/plane/nat"
	"github.com/pentad/pentad/service"
)

// Row is a service at a glance.
type Row struct {
	Rate
	Source  string         `json:"source"`
	Balance string         `json:"balance"`
	Listen  []string       `json:"listen"`
	Verdict string         `json:"verdict"`          // the worst of its listeners' for sockets; of a service for packets alone, of those
	Why     string         `json:"why,omitempty"`    // of that
	States  map[string]int `json:"states,omitempty"` // backends by state
	Out     int            `json:"out"`              // backends that do not take connections and should
}

// severity says which verdict is worse.
var severity = map[string]int{Serving: 0, Panic: 1, Refused: 2}

// Overview returns what every service is and did since an earlier moment, by name. A nil
// before knows nothing of what they did.
func Overview(before Tally, after *Host, elapsed time.Duration) []Row {
	rates := make(map[string]Rate, len(after.Kernel.Services))
	if before == nil {
		before, elapsed = after.Tally(), time.Second
	}
	for _, r := range Rates(before, after, elapsed) {
		rates[r.Service] = r
	}
	rows := make([]Row, 0, len(rates))
	for _, s := range after.Kernel.Services {
		rows = append(rows, after.row(s, rates[s.Name]))
	}
	return append(rows, packetRows(rates, after.Packets.Mappings)...)
}

func (h *Host) row(s *service.Service, r Rate) Row {
	row := Row{Rate: r, Source: s.Source.String(), Balance: s.Balance.String(), Listen: []string{}, Verdict: Serving, States: make(map[string]int)}
	choices := make(map[service.Family]service.Choice)
	for _, f := range service.EachFamily {
		choices[f] = h.choose(s, f)
		for _, b := range choices[f].Candidates {
			row.States[b.State.String()]++
			if isOut(b.State) {
				row.Out++
			}
		}
	}
	for _, l := range s.Listeners {
		f := service.FamilyOf(l.Address.Addr())
		out := newListener(l, choices[f], f)
		row.Listen = append(row.Listen, out.Listen)
		if severity[out.Verdict] > severity[row.Verdict] {
			row.Verdict, row.Why = out.Verdict, out.Why
		}
	}
	return row
}

// isOut reports whether a backend takes no connections though its configuration does not
// say so.
func isOut(s service.State) bool {
	return s == service.Down || s == service.Ejected || s == service.Full
}

// packetRows are those of services that only packets find.
func packetRows(known map[string]Rate, mappings []nat.Mapping) []Row {
	at := make(map[string]int)
	backends := make(map[string]map[string]bool)
	var rows []Row
	for _, m := range mappings {
		if _, is := known[m.Service]; is {
			continue
		}
		p := newPackets(m)
		i, is := at[m.Service]
		if !is {
			i = len(rows)
			at[m.Service], backends[m.Service] = i, make(map[string]bool)
			rows = append(rows, Row{Rate: Rate{Service: m.Service}, Balance: p.Balance, Verdict: Serving})
		}
		row := &rows[i]
		row.Listen = append(row.Listen, p.Listen)
		for _, b := range p.Backends {
			backends[m.Service][b] = true
		}
		row.Usable, row.Backends = len(backends[m.Service]), len(backends[m.Service])
		if len(p.Backends) == 0 {
			row.Verdict, row.Why = Refused, "it has no backend"
		}
	}
	slices.SortFunc(rows, func(a, b Row) int { return cmp.Compare(a.Service, b.Service) })
	return rows
}
