package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/proxy/relay"
)

// forward keeps one forward up, for as long as it is wanted.
type forward struct {
	plane *Plane
	config.Forward
	chain chain
	log   *slog.Logger
	stop  context.CancelFunc
	tasks sync.WaitGroup

	mu      sync.Mutex
	up      bool
	changed time.Time // since when it is so
	err     error     // why it is not up
}

// ForwardState is how a forward is.
type ForwardState struct {
	config.Forward
	Up    bool
	Since time.Time
	Err   error // why it is not up
}

// Bounds of the time between attempts to get a forward up again: the path may be back at
// any moment, and somebody waits for it.
const (
	firstRetry = 100 * time.Millisecond
	lastRetry  = time.Second
	rejected   = 10 * time.Second // somebody has to change something before it can be
)

func (p *Plane) startForward(f config.Forward, c chain) *forward {
	ctx, stop := context.WithCancel(context.Background())
	w := &forward{plane: p, Forward: f, chain: c, log: p.log.With("forward", f.Name), stop: stop, changed: time.Now()}
	w.tasks.Go(func() { w.run(ctx) })
	return w
}

func (f *forward) close() {
	f.stop()
	f.tasks.Wait()
}

func (f *forward) state() ForwardState {
	f.mu.Lock()
	defer f.mu.Unlock()
	return ForwardState{f.Forward, f.up, f.changed, f.err}
}

// set notes how it is, and says so once.
func (f *forward) set(up bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	changed := f.up != up
	if changed {
		f.up, f.changed = up, time.Now()
	}
	said := f.err != nil && err != nil && f.err.Error() == err.Error()
	f.err = err
	switch {
	case changed && up:
		f.log.Info("a forward is up")
	case !up && !said && err != nil:
		f.log.Warn("a forward is not up; it is tried until it is", "error", err)
	}
}

// run keeps the way open until the context ends.
func (f *forward) run(ctx context.Context) {
	l := f.plane.lastLink(f.chain)
	if l == nil {
		f.set(true, nil) // nothing on its way stays open between connections
		return
	}
	for pause := firstRetry; ctx.Err() == nil; {
		began := time.Now()
		err := f.once(ctx, l)
		if ctx.Err() != nil {
			return
		}
		f.set(false, err)
		if time.Since(began) > lastRetry {
			pause = firstRetry // it was up for a while
		}
		if !sleep(ctx, pause) {
			return
		}
		most := lastRetry
		if errors.Is(err, errRejected) {
			most = rejected
		}
		pause = min(2*pause, most)
	}
}

// once has it up until something is lost.
func (f *forward) once(ctx context.Context, l *link) error {
	client, err := l.get(ctx)
	if err != nil {
		return err
	}
	if f.Remote == "" {
		f.set(true, nil)
		select {
		case <-l.lostOf(client):
		case <-ctx.Done():
		}
		return l.why()
	}
	at, err := f.listen(ctx, client)
	if err != nil {
		return fmt.Errorf("the server does not listen at %s: %w", f.Remote, err)
	}
	f.set(true, nil)
	// The server is told once, and nobody waits for its answer.
	shut := sync.OnceFunc(func() { go at.Close() })
	defer shut()
	stop := context.AfterFunc(ctx, shut)
	defer stop()
	for {
		c, err := at.Accept()
		if err != nil {
			select {
			case <-l.lostOf(client):
				return l.why()
			case <-time.After(lastRetry):
				return fmt.Errorf("the server listens at %s no more: %w", f.Remote, err)
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		f.tasks.Go(func() { f.serve(ctx, c.(relay.Conn)) })
	}
}

// listen has the server listen. One that does not answer is not waited for beyond the
// context.
func (f *forward) listen(ctx context.Context, client *ssh.Client) (net.Listener, error) {
	type result struct {
		at  net.Listener
		err error
	}
	done := make(chan result, 1)
	go func() {
		at, err := client.Listen("tcp", f.Remote)
		done <- result{at, err}
	}()
	select {
	case r := <-done:
		return r.at, r.err
	case <-ctx.Done():
		go func() {
			if r := <-done; r.err == nil {
				r.at.Close()
			}
		}()
		return nil, ctx.Err()
	}
}

// serve leads a connection from the server to the target of a remote forward.
func (f *forward) serve(ctx context.Context, c relay.Conn) {
	defer c.Close()
	from, _ := netip.ParseAddrPort(c.RemoteAddr().String())
	flow := f.plane.flows.begin(f.Name, from)
	flow.set(func(s *Flow) { s.Protocol, s.Command, s.Target, s.Via = "forward", "CONNECT", f.To, f.Via })
	to, err := hostTarget(f.To)
	var t relay.Conn
	if err == nil {
		dialing, cancel := context.WithTimeout(ctx, config.DefaultProxy.Connect)
		t, err = f.plane.dialDirect(dialing, to)
		cancel()
	}
	if err != nil {
		f.plane.flows.end(flow, true, Describe(err))
		return
	}
	f.plane.flows.reached(flow)
	stop := context.AfterFunc(ctx, func() { relay.Abort(t); c.Close() })
	defer stop()
	err = relay.Relay(c, t, config.DefaultProxy.Idle, &flow.counts)
	f.plane.flows.end(flow, false, ended(ctx, err))
}

// proxyOf is a forward with a local address, as a proxy whose clients cannot say where
// they want to go.
func proxyOf(f config.Forward) config.Proxy {
	p := config.DefaultProxy
	p.Name, p.Protocols, p.Target = f.Name, []config.ProxyProtocol{config.Fixed}, f.To
	p.Listen, p.Rules = []netip.AddrPort{f.Listen}, []config.ProxyRule{{Via: f.Via}}
	return p
}

// fixed serves a client of a forward.
func (s *session) fixed() {
	s.begin("forward", "CONNECT", s.settings.Target)
	to, err := hostTarget(s.settings.Target)
	var c relay.Conn
	if err == nil {
		c, err = s.open(to)
	}
	if err != nil {
		s.fail(err)
		relay.Abort(s.conn)
		return
	}
	s.relay(c)
}

// Forwards returns how the forwards are.
func (p *Plane) Forwards() []ForwardState {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := make([]ForwardState, 0, len(p.forwards))
	for _, f := range p.forwards {
		all = append(all, f.state())
	}
	return all
}

// Warnings says which forwards are not up.
func (p *Plane) Warnings() []string {
	var all []string
	for _, f := range p.Forwards() {
		if !f.Up && f.Err != nil {
			all = append(all, fmt.Sprintf("forward %s is not up, since %s: %s", f.Name, f.Since.Format(time.RFC3339), Describe(f.Err)))
		}
	}
	return all
}

// chain is the upstreams of a way, the nearest first.
type chain []config.Upstream

// key names the way as far as its upstream number n.
func (c chain) key(n int) string {
	names := make([]string, n+1)
	for i := range names {
		names[i] = c[i].Name
	}
	return strings.Join(names, " ")
}

func (c chain) equal(o chain) bool { return fmt.Sprintf("%+v", c) == fmt.Sprintf("%+v", o) }

// chainOf returns the upstreams of a way. Direct has none.
func chainOf(via []string, upstreams map[string]config.Upstream) chain {
	if via[0] == config.Direct || via[0] == config.Refuse {
		return nil
	}
	c := make(chain, len(via))
	for i, name := range via {
		c[i] = upstreams[name]
	}
	return c
}

// dialThrough returns what connects by way of a chain, of which first reaches the first.
func (p *Plane) dialThrough(c chain, first dialer) dialer {
	dial := first
	for i, u := range c {
		if u.Protocol != config.SSH {
			dial = through(u, dial)
			continue
		}
		// The connection to the server outlives who has asked for it.
		key := c.key(i)
		dial = func(ctx context.Context, to target) (relay.Conn, error) {
			l := p.linkOf(key)
			if l == nil {
				return nil, net.ErrClosed
			}
			return l.dial(ctx, to)
		}
	}
	return dial
}

func (p *Plane) linkOf(key string) *link {
	p.linksMu.Lock()
	defer p.linksMu.Unlock()
	return p.links[key]
}

// lastLink returns the link of the last SSH server of a chain; nil: it has none.
func (p *Plane) lastLink(c chain) *link {
	for i := len(c) - 1; i >= 0; i-- {
		if c[i].Protocol == config.SSH {
			return p.linkOf(c.key(i))
		}
	}
	return nil
}

// setLinks has exactly the links be there that chains need. One whose way is another now
// is another link.
func (p *Plane) setLinks(chains []chain) {
	p.linksMu.Lock()
	defer p.linksMu.Unlock()
	wanted := make(map[string]chain)
	for _, c := range chains {
		for i, u := range c {
			if u.Protocol == config.SSH {
				wanted[c.key(i)] = c[:i+1]
			}
		}
	}
	for key, l := range p.links {
		if c, is := wanted[key]; !is || !c.equal(l.chain) {
			l.close()
			delete(p.links, key)
		}
	}
	for key, c := range wanted {
		if p.links[key] == nil {
			last := len(c) - 1
			p.links[key] = &link{upstream: c[last], chain: c, log: p.log, changed: time.Now(), before: p.dialThrough(c[:last], p.dialServer)}
		}
	}
}

// dialDirect connects to a target that no rule is asked about.
func (p *Plane) dialDirect(ctx context.Context, to target) (relay.Conn, error) {
	addresses, err := p.resolve(ctx, to)
	if err != nil {
		return nil, err
	}
	return dialAny(ctx, addresses)
}

// connectTry is how long one attempt to reach a server may take before the next: the
// kernel asks again after 1 s, and then ever later.
const connectTry = 2 * time.Second

// dialServer connects to the first server of a way to an SSH server. While nobody answers
// it begins anew, so that one whose path is back is found at once.
func (p *Plane) dialServer(ctx context.Context, to target) (relay.Conn, error) {
	for {
		try, cancel := context.WithTimeout(ctx, connectTry)
		c, err := p.dialDirect(try, to)
		cancel()
		if err == nil {
			tuneServer(c)
			return c, nil
		}
		if ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) && !isTimeout(err) {
			return nil, err
		}
	}
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}
