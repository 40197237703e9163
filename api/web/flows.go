package web

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/flow"
	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/view"
)

// How many flows a browser is sent at once, and how often. Nobody reads more; the others
// are counted.
const (
	maxFlows   = 200
	flowsEvery = 250 * time.Millisecond
)

// maxOpenFlows is how many connections that are open a browser is sent.
const maxOpenFlows = 1000

// flows follows connections once for all browsers, while there are any.
type flows struct {
	at   view.Places
	wake chan struct{}

	mu   sync.Mutex
	subs map[*subscriber]struct{}
	stop context.CancelFunc // ends the follower; nil: there is none
	lost uint64             // events that came too fast, so far
	err  string             // why there is no follower
}

// subscriber is one browser.
type subscriber struct {
	want flowFilter

	mu      sync.Mutex
	pending []seen // a ring of the newest
	next    int    // where the oldest is, once it is full
	skipped uint64
}

// seen is one flow of either kind. What is shown of it is made when it is sent.
type seen struct {
	kernel flow.Flow
	proxy  *view.Flow
}

// flowFilter says which flows are wanted; zero fields say nothing.
type flowFilter struct {
	service, command string
	pid              int
	failed           bool
}

func readFilter(r *http.Request) (f flowFilter) {
	q := r.URL.Query()
	f.service, f.failed = q.Get("service"), q.Get("failed") != ""
	if who := q.Get("who"); who != "" {
		if n, err := strconv.Atoi(who); err == nil {
			f.pid = n
		} else {
			f.command = who
		}
	}
	return f
}

func (f flowFilter) wants(service, command string, pid int, failed bool) bool {
	return (f.service == "" || f.service == service) && (f.pid == 0 || f.pid == pid) && (f.command == "" || strings.Contains(command, f.command)) &&
		(!f.failed || failed)
}

func hasFailed(event string) bool {
	return event == socket.Failed.String() || event == socket.Refused.String() || event == socket.Ejected.String()
}

// note offers a flow.
func (s *subscriber) note(x seen) {
	f := &x.kernel
	if p := x.proxy; p != nil {
		if !s.want.wants(p.Proxy, p.Command, p.PID, strings.HasPrefix(p.Outcome, "failed")) {
			return
		}
	} else if !s.want.wants(f.Service, f.Command, f.PID, hasFailed(f.Event)) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.pending) < maxFlows {
		s.pending = append(s.pending, x)
		return
	}
	s.pending[s.next] = x
	s.next = (s.next + 1) % maxFlows
	s.skipped++
}

// take returns what has come since it was called last, oldest first.
func (s *subscriber) take() (all []view.Flow, skipped uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.pending {
		x := s.pending[(s.next+i)%len(s.pending)]
		if x.proxy != nil {
			all = append(all, *x.proxy)
		} else {
			all = append(all, view.NewFlow(x.kernel))
		}
	}
	skipped = s.skipped
	s.pending, s.next, s.skipped = s.pending[:0], 0, 0
	return all, skipped
}

func newFlows(at view.Places) *flows {
	return &flows{at: at, wake: make(chan struct{}, 1), subs: make(map[*subscriber]struct{})}
}

func (f *flows) join(want flowFilter) (s *subscriber, leave func()) {
	s = &subscriber{want: want}
	f.mu.Lock()
	f.subs[s] = struct{}{}
	f.mu.Unlock()
	select {
	case f.wake <- struct{}{}:
	default:
	}
	return s, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if delete(f.subs, s); len(f.subs) == 0 && f.stop != nil {
			f.stop()
		}
	}
}

func (f *flows) offer(x seen) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for s := range f.subs {
		s.note(x)
	}
}

// run follows while anybody wants to see it, until the context ends.
func (f *flows) run(ctx context.Context) {
	for ctx.Err() == nil {
		f.mu.Lock()
		wanted := len(f.subs) > 0
		var following context.Context
		if wanted {
			following, f.stop = context.WithCancel(ctx)
		}
		f.mu.Unlock()
		if !wanted {
			select {
			case <-f.wake:
			case <-ctx.Done():
			}
			continue
		}
		var tasks sync.WaitGroup
		tasks.Go(func() { f.followProxies(following) })
		tasks.Go(func() { f.followKernel(following) })
		tasks.Wait()
		f.stop()
		// A follower costs a ring and the pins that are opened: it is not had in a loop.
		pause(ctx, time.Second/2)
	}
}

// followKernel follows again and again, until the context ends.
func (f *flows) followKernel(ctx context.Context) {
	for ctx.Err() == nil {
		if err := f.follow(ctx); err != nil && ctx.Err() == nil {
			f.say(err.Error())
			pause(ctx, time.Second)
		}
	}
}

// say notes why there is no follower.
func (f *flows) say(err string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
}

// follow follows the kernel.
func (f *flows) follow(ctx context.Context) error {
	follower, err := socket.Follow(f.at.Pins)
	if err != nil {
		return err
	}
	defer follower.Close()
	f.say("")
	tracker := flow.NewTracker()
	tracker.Agent = host.Holder(f.at.Pins)
	var checked time.Time
	before := uint64(0)
	return follower.Run(ctx, func(e socket.Event) {
		f.offer(seen{kernel: tracker.Note(e)})
		if e.Time.Sub(checked) > time.Second {
			checked, tracker.Agent = e.Time, host.Holder(f.at.Pins)
			now := follower.Lost()
			f.mu.Lock()
			f.lost += now - before
			f.mu.Unlock()
			before = now
		}
	})
}

// followProxies follows clients of the agent's proxies.
func (f *flows) followProxies(ctx context.Context) {
	for ctx.Err() == nil {
		_ = api.NewClient(f.at.RunDir).FollowProxies(ctx, func() {}, func(x api.ProxyFlow) {
			v := view.NewProxyFlow(x)
			f.offer(seen{proxy: &v})
		})
		pause(ctx, time.Second)
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// flowMessage is what a browser is sent of flows.
type flowMessage struct {
	Flows   []view.Flow `json:"flows"`
	Skipped uint64      `json:"skipped,omitempty"` // more came than are shown
	Lost    uint64      `json:"lost,omitempty"`    // and more than could be followed, since it began
	Error   string      `json:"error,omitempty"`
}

func (p *Page) serveFlows(s Settings) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) { p.sendFlows(s, w, r) }
}

func (p *Page) sendFlows(s Settings, w http.ResponseWriter, r *http.Request) {
	out, ctx, done := p.open(w, r)
	defer done()
	sub, leave := p.flows.join(readFilter(r))
	defer leave()
	ticker := time.NewTicker(flowsEvery)
	defer ticker.Stop()
	said := flowMessage{Error: "-"} // the first message is sent whatever it says
	for quiet := 0; ; {
		var m flowMessage
		m.Flows, m.Skipped = sub.take()
		p.flows.mu.Lock()
		m.Lost, m.Error = p.flows.lost, p.flows.err
		p.flows.mu.Unlock()
		// A browser that is gone is found out by being written to.
		if quiet++; len(m.Flows) > 0 || m.Lost != said.Lost || m.Error != said.Error || quiet > 40 {
			if !s.Knows(r) || out.sendJSON("flows", m) != nil {
				return
			}
			said, quiet = m, 0
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
}

func (p *Page) serveOpen(w http.ResponseWriter, r *http.Request) {
	done, err := p.alone(r.Context())
	if err != nil {
		return
	}
	defer done()
	want := readFilter(r)
	all := struct {
		Flows []view.Flow `json:"flows"`
		More  int         `json:"more"` // that are open, too
	}{Flows: []view.Flow{}}
	open, err := flow.Open(r.Context(), p.opts.At.Pins)
	if errors.Is(err, socket.ErrNothingInstalled) {
		err = nil
	}
	if open == nil && err != nil {
		answer(w, nil, err)
		return
	}
	for _, f := range open {
		switch {
		case !want.wants(f.Service, f.Command, f.PID, false):
		case len(all.Flows) == maxOpenFlows:
			all.More++
		default:
			all.Flows = append(all.Flows, view.NewFlow(f))
		}
	}
	answer(w, all, nil)
}
