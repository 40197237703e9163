package view

import (
	"fmt"
	"strings"
	"time"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/plane/nat"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
)

// Service is one service as the kernel has it.
type Service struct {
	Name      string     `json:"name"`
	Source    string     `json:"source"` // file, kubernetes; unknown: an earlier version has installed it
	Listen    []string   `json:"listen"`
	Balance   string     `json:"balance"`
	Affinity  *Affinity  `json:"affinity,omitempty"`
	Keepalive *Keepalive `json:"keepalive,omitempty"`
	Breaker   *Breaker   `json:"breaker,omitempty"`
	Connect   *Connect   `json:"connect,omitempty"`
	OnDown    string     `json:"onDown"`
	SlowStart string     `json:"slowStart,omitempty"`
	Flows     bool       `json:"flows"`
	Listeners []Listener `json:"listeners"` // what becomes of connections to each
	Backends  []Backend  `json:"backends"`
	Refused   uint64     `json:"refused"` // connections and datagrams of sockets for which no backend was usable

	// What packets find that arrive from other hosts and from pods of this one.
	Packets []Packets `json:"packets,omitempty"`
}

// Verdicts on a listener.
const (
	Serving = "serving" // connections go to a backend
	Panic   = "panic"   // so much is ejected that ejection does not count
	Refused = "refused" // no backend takes connections
)

// Listener is what becomes of connections of sockets to a listener now.
type Listener struct {
	Listen  string   `json:"listen"`
	Verdict string   `json:"verdict"` // serving, panic, refused
	To      []string `json:"to"`      // backends that take the next connection
	Total   int      `json:"total"`   // backends of its family
	Why     string   `json:"why,omitempty"`

	family service.Family
}

// Affinity, Keepalive, Breaker and Connect are as in the configuration.
type (
	Affinity struct {
		Timeout string `json:"timeout"`
	}
	Keepalive struct {
		Idle     string `json:"idle"`
		Interval string `json:"interval,omitempty"`
		Probes   int    `json:"probes,omitempty"`
	}
	Breaker struct {
		MaxConnections int    `json:"maxConnections,omitempty"`
		Failures       int    `json:"failures,omitempty"`
		Ejection       string `json:"ejection,omitempty"`
		MaxEjected     string `json:"maxEjected,omitempty"`
	}
	Connect struct {
		Timeout string `json:"timeout"`
	}
)

// Probe is what the probes of a backend met with; there is none while the agent is dead.
type Probe struct {
	Probe       string    `json:"probe"`
	Result      string    `json:"result"` // success, failure; none: none has ended yet
	Message     string    `json:"message,omitempty"`
	Last        time.Time `json:"last,omitzero"`
	TookSeconds float64   `json:"tookSeconds,omitempty"`
	InARow      int       `json:"inARow,omitempty"`
	Next        time.Time `json:"next,omitzero"`
	Succeeded   uint64    `json:"succeeded"`
	Failed      uint64    `json:"failed"`
}

// Backend is one backend and what is known of it.
type Backend struct {
	Service string    `json:"service,omitempty"`
	Address string    `json:"address"`
	Weight  uint32    `json:"weight"`
	Group   uint32    `json:"group"`
	Zone    string    `json:"zone,omitempty"`
	State   string    `json:"state"` // serving, standby, ejected, full, weight 0, drained, down
	Takes   bool      `json:"takes"` // the next connection may go there
	Why     string    `json:"why,omitempty"`
	Since   time.Time `json:"since"` // of the last change of state, ejections aside

	InFlight        uint32  `json:"inFlight"`
	RTTSeconds      float64 `json:"rttSeconds,omitempty"`      // of handshakes, smoothed; absent: unknown
	ResponseSeconds float64 `json:"responseSeconds,omitempty"` // from a request to its first byte, as measured last
	MeasuredSeconds float64 `json:"measuredSecondsAgo,omitempty"`
	EjectedFor      int     `json:"ejectedForClients,omitempty"`
	FailedInARow    uint32  `json:"failedInARow"` // connects of the client with most
	Connections     uint64  `json:"connections"`
	Failed          uint64  `json:"failed"`
	Ejections       uint64  `json:"ejections"`
	Probe           *Probe  `json:"probe,omitempty"`
}

// Packets is what the kernel does with packets to a listener.
type Packets struct {
	Listen   string   `json:"listen"`
	From     []string `json:"from"` // pods, world
	Balance  string   `json:"balance"`
	Guarded  bool     `json:"guarded"`
	Sources  []string `json:"sources,omitempty"` // of guarded ones: who may come
	Dropped  bool     `json:"dropped"`           // without backends: dropped, else refused
	Backends []string `json:"backends"`
}

func (h *Host) service(s *service.Service) Service {
	out := Service{
		Name: s.Name, Source: s.Source.String(), Balance: s.Balance.String(), Listen: []string{}, Listeners: []Listener{},
		Refused: h.Kernel.Refusals[s.Name], OnDown: s.OnDown.String(), Flows: !s.Silent, Keepalive: newKeepalive(s.Keepalive), Breaker: newBreaker(s.Breaker),
	}
	if s.Affinity > 0 {
		out.Affinity = &Affinity{config.Duration(s.Affinity)}
	}
	if s.ConnectTimeout > 0 {
		out.Connect = &Connect{config.Duration(s.ConnectTimeout)}
	}
	if s.SlowStart > 0 {
		out.SlowStart = config.Duration(s.SlowStart)
	}
	choices := make(map[service.Family]service.Choice)
	for _, f := range service.EachFamily {
		choices[f] = h.choose(s, f)
	}
	for _, l := range s.Listeners {
		f := service.FamilyOf(l.Address.Addr())
		out.Listen = append(out.Listen, l.String())
		out.Listeners = append(out.Listeners, newListener(l, choices[f], f))
	}
	out.Backends = h.backends(s, choices)
	return out
}

func newKeepalive(k service.Keepalive) *Keepalive {
	if k.Idle == 0 {
		return nil
	}
	out := &Keepalive{Idle: config.Duration(k.Idle), Probes: k.Probes}
	if k.Interval > 0 {
		out.Interval = config.Duration(k.Interval)
	}
	return out
}

func newBreaker(b service.Breaker) *Breaker {
	if b == (service.Breaker{}) {
		return nil
	}
	out := &Breaker{MaxConnections: b.MaxConnections, Failures: b.Failures}
	if b.Failures > 0 {
		out.Ejection, out.MaxEjected = config.Duration(b.Ejection), fmt.Sprintf("%d%%", b.MaxEjected)
	}
	return out
}

func newListener(l service.Listener, c service.Choice, f service.Family) Listener {
	out := Listener{Listen: l.String(), Verdict: Serving, To: []string{}, Total: len(c.Candidates), family: f}
	for _, b := range c.Takers() {
		out.To = append(out.To, b.Address.String())
	}
	switch {
	case len(out.To) == 0:
		out.Verdict, out.Why = Refused, whyRefused(c)
	case c.Panic:
		out.Verdict, out.Why = Panic, "so much is ejected that ejection does not count"
	}
	return out
}

// whyRefused says what is the matter with all backends of a family.
func whyRefused(c service.Choice) string {
	if len(c.Candidates) == 0 {
		return "it has no backend"
	}
	count := make(map[service.State]int)
	for _, b := range c.Candidates {
		count[b.State]++
	}
	var parts []string
	for _, s := range service.EachState {
		if n := count[s]; n == len(c.Candidates) && n > 1 {
			return fmt.Sprintf("all %d backends: %s", n, s)
		} else if n > 0 {
			parts = append(parts, fmt.Sprintf("%s: %s", Count(n, "backend"), s))
		}
	}
	return strings.Join(parts, ", ")
}

func (h *Host) backends(s *service.Service, choices map[service.Family]service.Choice) []Backend {
	out := make([]Backend, 0, len(s.Backends))
	next := make(map[service.Family]int)
	for _, b := range s.Backends {
		f := service.FamilyOf(b.Address.Addr())
		x := choices[f].Candidates[next[f]]
		next[f]++
		out = append(out, h.backend(s, x))
	}
	return out
}

func (h *Host) backend(s *service.Service, x service.Candidate) Backend {
	l := h.Kernel.Loads[s.Name][x.Address]
	out := Backend{
		Address: x.Address.String(), Weight: x.Weight, Group: x.Group, Zone: x.Zone, State: x.State.String(), Takes: x.Takes,
		Since: h.Kernel.Since[s.Name][x.Address].UTC(), InFlight: l.InFlight, RTTSeconds: l.RTT.Seconds(), ResponseSeconds: l.Response.Seconds(),
		MeasuredSeconds: l.Measured.Seconds(), EjectedFor: l.Clients, FailedInARow: l.Failures, Connections: l.Connections,
		Failed: l.Failed, Ejections: l.Ejections, Probe: h.probe(s.Name, x.Backend),
	}
	out.Why = why(x, l, out.Probe)
	return out
}

func (h *Host) probe(name string, b service.Backend) *Probe {
	r, known := h.probes[backendKey{name, b.Address}]
	if !known {
		return nil
	}
	p := &Probe{
		Probe: r.Probe, Result: "success", Message: r.Error, Last: r.Last, TookSeconds: r.TookSeconds, InARow: r.InARow, Next: r.Next,
		Succeeded: r.Succeeded, Failed: r.Failed,
	}
	switch {
	case r.Last.IsZero():
		p.Result = "none"
	case r.Error != "":
		p.Result = "failure"
	}
	return p
}

// why says in a few words what keeps a backend from taking connections, or nothing.
func why(x service.Candidate, l socket.Load, p *Probe) string {
	switch x.State {
	case service.Down:
		return "its probe fails" + failure(p)
	case service.Drained:
		if left := time.Until(time.Unix(int64(x.DrainUntil), 0)); x.DrainUntil > 0 && !x.DrainOver && left > 0 {
			return fmt.Sprintf("drained; what is left is closed in %s", left.Round(time.Second))
		}
		return "drained"
	case service.WeightZero:
		return "its weight is 0"
	case service.Full:
		return fmt.Sprintf("it has %s, as many as maxConnections allows", Count(int(l.InFlight), "connection"))
	case service.Ejected:
		return blamed(l, x.Takes)
	case service.Standby:
		return "a lower group serves"
	}
	return ""
}

// failure says what the last probe met with.
func failure(p *Probe) string {
	if p == nil || p.Result != "failure" {
		return ""
	}
	text := fmt.Sprintf(": %s after %s", p.Message, Latency(p.TookSeconds))
	if p.InARow > 1 {
		text += fmt.Sprintf(", %d times in a row", p.InARow)
	}
	if next := time.Until(p.Next); next > 0 {
		text += fmt.Sprintf("; again in %s", next.Round(100*time.Millisecond))
	}
	return text
}

// blamed says for whom a backend is ejected, and what ends it.
func blamed(l socket.Load, takes bool) string {
	of := "failed connects of " + Count(l.Clients, "client")
	if l.FailedAgo > 0 {
		of += fmt.Sprintf(", the last %s ago", max(l.FailedAgo, 100*time.Millisecond).Round(100*time.Millisecond))
	}
	if l.Shunned {
		of += ", and others avoid it"
	}
	switch {
	case takes:
		return of + "; it is used all the same, because too many are ejected"
	case l.Trial:
		return of + "; a connection is trying it"
	case l.For > 0:
		return fmt.Sprintf("%s; tried again in %s", of, l.For.Round(100*time.Millisecond))
	}
	return of + "; tried again by one of their next connections"
}

func newPackets(m nat.Mapping) Packets {
	out := Packets{
		Listen: m.Listener.String(), From: []string{}, Balance: service.Random.String(),
		Guarded: m.Listener.Guarded, Dropped: m.Dropped, Backends: []string{},
	}
	if m.Listener.From&service.FromPods != 0 {
		out.From = append(out.From, "pods")
	}
	if m.Listener.From&service.FromWorld != 0 {
		out.From = append(out.From, "world")
	}
	if m.Hashed {
		out.Balance = service.SourceHash.String()
	}
	for _, r := range m.Sources {
		out.Sources = append(out.Sources, r.String())
	}
	for _, b := range m.Backends {
		out.Backends = append(out.Backends, b.Address.String())
	}
	return out
}
