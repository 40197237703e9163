package proxy

import (
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pentad/pentad/proxy/relay"
)

// Flow is one connection of a client, or one association for datagrams.
type Flow struct {
	ID       uint64
	Proxy    string
	Protocol string // socks5, http, transparent
	Command  string // CONNECT, BIND, UDP ASSOCIATE, a method of HTTP
	Client   netip.AddrPort
	User     string
	Target   string   // as the client has named it
	Via      []string // upstreams; direct, refuse
	Began    time.Time
	Ended    time.Time // zero: it has not
	Sent     uint64    // bytes, by the client
	Received uint64
	Outcome  string // in words
}

// flow is one that goes on.
type flow struct {
	counts relay.Counts

	mu sync.Mutex
	Flow
}

func (f *flow) set(change func(*Flow)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(&f.Flow)
}

// snapshot returns how it stands.
func (f *flow) snapshot() Flow {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.Flow
	s.Sent, s.Received = f.counts.Sent.Load(), f.counts.Received.Load()
	return s
}

// table is all flows of this host's proxies.
type table struct {
	next atomic.Uint64

	mu        sync.Mutex
	open      map[uint64]*flow
	followers map[chan Flow]bool
	totals    map[string]*Totals // by proxy
}

// Totals count what a proxy has done since it is there.
type Totals struct {
	Connections uint64 // of clients
	Failed      uint64 // that reached no target
	Sent        uint64 // bytes, by clients
	Received    uint64
}

func newTable() *table {
	return &table{open: make(map[uint64]*flow), followers: make(map[chan Flow]bool), totals: make(map[string]*Totals)}
}

// begin notes a client.
func (t *table) begin(proxy string, client netip.AddrPort) *flow {
	f := &flow{Flow: Flow{ID: t.next.Add(1), Proxy: proxy, Client: client, Began: time.Now(), Outcome: "asking"}}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.open[f.ID] = f
	t.of(proxy).Connections++
	return f
}

func (t *table) of(proxy string) *Totals {
	if t.totals[proxy] == nil {
		t.totals[proxy] = &Totals{}
	}
	return t.totals[proxy]
}

// reached notes that a flow has got to its target.
func (t *table) reached(f *flow) {
	f.set(func(s *Flow) { s.Outcome = "connected" })
	t.tell(f.snapshot())
}

// end notes what has become of a flow.
func (t *table) end(f *flow, failed bool, outcome string) {
	f.set(func(s *Flow) { s.Ended, s.Outcome = time.Now(), outcome })
	s := f.snapshot()
	t.mu.Lock()
	delete(t.open, s.ID)
	total := t.of(s.Proxy)
	if failed {
		total.Failed++
	}
	total.Sent += s.Sent
	total.Received += s.Received
	t.mu.Unlock()
	t.tell(s)
}

// tell tells followers. Who is slow misses some.
func (t *table) tell(s Flow) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for c := range t.followers {
		select {
		case c <- s:
		default:
		}
	}
}

// Flows returns those that are open, the oldest first.
func (p *Plane) Flows() []Flow {
	p.flows.mu.Lock()
	open := make([]*flow, 0, len(p.flows.open))
	for _, f := range p.flows.open {
		open = append(open, f)
	}
	p.flows.mu.Unlock()
	all := make([]Flow, len(open))
	for i, f := range open {
		all[i] = f.snapshot()
	}
	slices.SortFunc(all, func(a, b Flow) int { return int(a.ID) - int(b.ID) })
	return all
}

// followed is how many flows a follower may lag behind.
const followed = 1024

// Follow returns a channel of flows, each when it gets to its target and when it ends,
// and what ends that.
func (p *Plane) Follow() (<-chan Flow, func()) {
	c := make(chan Flow, followed)
	p.flows.mu.Lock()
	p.flows.followers[c] = true
	p.flows.mu.Unlock()
	return c, func() {
		p.flows.mu.Lock()
		delete(p.flows.followers, c)
		p.flows.mu.Unlock()
	}
}

// Totals returns what each proxy has done, with what goes on, and how much that is.
func (p *Plane) Totals() (totals map[string]Totals, open map[string]int) {
	totals, open = make(map[string]Totals), make(map[string]int)
	p.mu.Lock()
	for name := range p.servers {
		totals[name] = Totals{}
	}
	p.mu.Unlock()
	p.flows.mu.Lock()
	defer p.flows.mu.Unlock()
	for name, t := range p.flows.totals {
		if _, is := totals[name]; is {
			totals[name] = *t
		}
	}
	for _, f := range p.flows.open {
		if t, is := totals[f.Proxy]; is {
			t.Sent += f.counts.Sent.Load()
			t.Received += f.counts.Received.Load()
			totals[f.Proxy] = t
			open[f.Proxy]++
		}
	}
	return totals, open
}
