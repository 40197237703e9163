package proxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/proxy/relay"
	"github.com/pentad/pentad/proxy/socks5"
)

// session is one connection of a client.
type session struct {
	*server
	settings *settings
	conn     *net.TCPConn
	in       *bufio.Reader // of conn, while the client says what it wants
	sent     []byte        // what was read from in and is for the target
	client   netip.AddrPort
	local    netip.AddrPort // where it has come to
	zone     string         // of local
	flow     *flow          // nil: it has not said anything that makes sense
	user     string
}

// Errors of routing.
var (
	errRefused = errors.New("refused by the rules of the proxy")
	errOwn     = errors.New("refused: it is this proxy itself")
	errHost    = errors.New("refused: an address of the host itself, which no rule names")
	errLoop    = fmt.Errorf("refused: it was sent by this proxy; except what has the mark %#x from what is led here", host.ProxyMark)
)

// maxHello is how much of a client's first words is read at a time.
const maxHello = 1 << 10

// run serves the connection and closes it.
func (s *session) run() {
	_ = s.conn.SetDeadline(time.Now().Add(s.settings.Handshake))
	switch {
	case s.speaks(config.Transparent):
		s.transparent()
		return
	case s.speaks(config.Fixed):
		s.fixed()
		return
	}
	s.in = bufio.NewReaderSize(s.conn, maxHello)
	first, err := s.in.Peek(1)
	if err != nil {
		relay.Abort(s.conn) // it has said nothing
		return
	}
	switch {
	case first[0] == 5 && s.speaks(config.SOCKS5):
		s.socks()
	case first[0] == 4 && s.speaks(config.SOCKS5):
		s.refuseSOCKS4()
	case first[0] >= 'A' && first[0] <= 'Z' && s.speaks(config.HTTP):
		s.http()
	default:
		s.conn.Close()
	}
}

func (s *session) speaks(p config.ProxyProtocol) bool {
	return slices.Contains(s.settings.Protocols, p)
}

// Read and Write are the client's side while it says what it wants.
func (s *session) Read(b []byte) (int, error)  { return s.in.Read(b) }
func (s *session) Write(b []byte) (int, error) { return s.conn.Write(b) }

// begin notes what the client asks for.
func (s *session) begin(protocol, command, to string) {
	s.flow = s.plane.flows.begin(s.name, s.client)
	s.flow.set(func(f *Flow) { f.Protocol, f.Command, f.User, f.Target = protocol, command, s.user, to })
}

// fail notes that the client does not get where it wants.
func (s *session) fail(err error) {
	var file *fs.PathError
	if errors.Is(err, host.ErrLoose) || errors.As(err, &file) {
		s.log.Error("a client does not get where it wants", "error", err)
	}
	s.plane.flows.end(s.flow, true, Describe(err))
}

// linger bounds how long a client that was refused may take to read why.
const linger = 2 * time.Second

// hangUp closes the connection so that what was written last arrives: with bytes of the
// client unread the kernel would send RST, which may overtake it.
func (s *session) hangUp() {
	_ = s.conn.SetDeadline(time.Now().Add(linger))
	if s.conn.CloseWrite() == nil {
		_, _ = io.CopyN(io.Discard, s.conn, 1<<20)
	}
	s.conn.Close()
}

// early returns the client's side with what was read of it and is for the target.
func (s *session) early() relay.Conn {
	if s.in == nil {
		return s.conn
	}
	behind, _ := s.in.Peek(s.in.Buffered())
	return relay.WithEarly(s.conn, append(s.sent, behind...))
}

// open connects to a target by the way that the rules say.
func (s *session) open(to target) (relay.Conn, error) {
	ctx, cancel := context.WithTimeout(s.ctx, s.settings.Connect)
	defer cancel()
	steps, err := s.ways(ctx, to)
	if err != nil {
		return nil, err
	}
	var first error
	for _, w := range steps {
		s.flow.set(func(f *Flow) { f.Via = w.via })
		c, err := w.dial(ctx)
		if err == nil {
			return c, nil
		}
		if first == nil {
			first = err
		}
	}
	return nil, first
}

// way is one to try.
type way struct {
	via  []string
	dial func(context.Context) (relay.Conn, error)
}

// ways returns by which ways a target may be reached, the best first. It resolves a name
// only if a rule asks for its address, or if it goes there directly: who resolves it to
// decide goes to just that address.
func (s *session) ways(ctx context.Context, to target) ([]way, error) {
	q := question{s.client.Addr(), s.user, to}
	a, needsAddress := choose(s.settings.Rules, q)
	if !needsAddress && a.via[0] != config.Direct {
		w, err := s.indirect(a, to)
		return []way{w}, err
	}
	addresses, err := s.plane.resolve(ctx, to)
	if err != nil {
		return nil, err
	}
	return s.waysTo(q, addresses)
}

// waysTo returns the ways to the addresses of a target. All that go directly are one.
func (s *session) waysTo(q question, addresses []netip.AddrPort) (all []way, err error) {
	var direct []netip.AddrPort
	reason := errRefused
	for _, ap := range addresses {
		to := q.to
		to.IP = ap.Addr()
		a, _ := choose(s.settings.Rules, question{q.client, q.user, to})
		if a.via[0] == config.Direct {
			if err := s.mayReach(to, a); err != nil {
				reason = err
				continue
			}
			direct = append(direct, ap)
			continue
		}
		// The upstream is told the address that the decision was about.
		w, err := s.indirect(a, socks5.AddressOf(ap))
		if err != nil {
			reason = err
			continue
		}
		all = append(all, w)
	}
	if len(direct) > 0 {
		dial := func(ctx context.Context) (relay.Conn, error) { return s.dialDirect(ctx, direct) }
		all = append([]way{{[]string{config.Direct}, dial}}, all...)
	}
	if len(all) == 0 {
		return nil, reason
	}
	return all, nil
}

// dialDirect connects to the first address that answers; where the client came from may
// be kept.
func (s *session) dialDirect(ctx context.Context, addresses []netip.AddrPort) (relay.Conn, error) {
	if from := s.settings.keptSource(s.client.Addr()); from.IsValid() && len(addresses) == 1 {
		return dialTCP(ctx, addresses[0], from)
	}
	return dialAny(ctx, addresses)
}

// indirect is the way through upstreams, or none.
func (s *session) indirect(a answer, to target) (way, error) {
	if a.via[0] == config.Refuse {
		return way{}, errRefused
	}
	dial := s.plane.dialThrough(chainOf(a.via, s.settings.upstreams), s.dialUpstream)
	return way{a.via, func(ctx context.Context) (relay.Conn, error) { return dial(ctx, to) }}, nil
}

// dialUpstream connects to the first upstream of a chain: no rule is asked about it.
func (s *session) dialUpstream(ctx context.Context, to target) (relay.Conn, error) {
	addresses, err := s.plane.resolve(ctx, to)
	if err != nil {
		return nil, err
	}
	for _, ap := range addresses {
		if s.listensAt(socks5.AddressOf(ap)) {
			return nil, errOwn // without end
		}
	}
	return dialAny(ctx, addresses)
}

// mayReach refuses what only this host itself should reach: a client of elsewhere that
// names the loopback is somebody who wants to be inside.
func (s *session) mayReach(to target, a answer) error {
	here := s.plane.local.has(s.client.Addr())
	if s.plane.isOwn(to, here) && (s.speaks(config.Transparent) || !here) {
		return errOwn // it would be led here again; or somebody of elsewhere would come from here
	}
	if here || !isInside(to.IP) && !s.plane.local.has(to.IP) {
		return nil
	}
	if a.rule >= 0 && slices.ContainsFunc(s.settings.Rules[a.rule].Destinations, func(p netip.Prefix) bool { return names(p, to.IP) }) {
		return nil
	}
	return errHost
}

// isInside reports whether an address means another host, or none, to each that uses it.
func isInside(a netip.Addr) bool {
	return a.IsLoopback() || a.IsUnspecified() || a.IsLinkLocalUnicast()
}

// names reports whether a prefix means an address of this host: whoever writes 0.0.0.0/0
// thinks of others.
func names(p netip.Prefix, a netip.Addr) bool {
	switch {
	case !p.Contains(a) || p.Bits() == 0:
		return false
	case a.IsUnspecified():
		return p.IsSingleIP()
	case a.IsLoopback():
		return p.Addr().IsLoopback() && (a.Is6() || p.Bits() >= 8)
	case a.IsLinkLocalUnicast():
		return p.Addr().IsLinkLocalUnicast() && p.Bits() >= 10 && (a.Is6() || p.Bits() >= 16)
	}
	return true
}

// ends are both addresses of a connection of ours. The kernel uses a port for several
// connections that go to different targets.
type ends struct{ own, target netip.AddrPort }

// relay copies between the client and its target until both have ended.
func (s *session) relay(to relay.Conn) {
	_ = s.conn.SetDeadline(time.Time{})
	s.plane.flows.reached(s.flow)
	own := ends{addrPort(to.LocalAddr()), addrPort(to.RemoteAddr())}
	s.plane.outgoing.Store(own, true)
	defer s.plane.outgoing.Delete(own)
	stop := context.AfterFunc(s.ctx, func() { relay.Abort(to) })
	defer stop()
	err := relay.Relay(s.early(), to, s.settings.Idle, &s.flow.counts)
	s.plane.flows.end(s.flow, false, ended(s.ctx, err))
}

func ended(ctx context.Context, err error) string {
	switch {
	case err == nil:
		return "closed"
	case ctx.Err() != nil:
		return "closed with the proxy"
	case errors.Is(err, relay.ErrIdle):
		return "closed: " + err.Error()
	}
	return "aborted: " + Describe(err)
}

// Describe says in words what went wrong, without the names of system calls.
func Describe(err error) string {
	var dns *net.DNSError
	var status *statusError
	var reply socks5.Reply
	var file *fs.PathError
	switch {
	case errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded):
		return "no answer in time"
	case errors.As(err, &dns) && dns.IsNotFound:
		return fmt.Sprintf("no such host %s", dns.Name)
	case errors.Is(err, host.ErrLoose) || errors.As(err, &file):
		return "the proxy itself is not set up well; its log says why"
	case errors.As(err, &dns):
		return fmt.Sprintf("%s cannot be resolved: %s", dns.Name, dns.Err)
	}
	prefix := ""
	if text := err.Error(); strings.HasPrefix(text, "upstream ") {
		prefix, _, _ = strings.Cut(text, ": ")
		prefix += ": "
	}
	var errno syscall.Errno
	switch {
	case errors.As(err, &reply):
		return prefix + reply.Error()
	case errors.As(err, &status):
		return prefix + status.Error()
	case errors.As(err, &errno):
		return prefix + errno.Error()
	}
	return err.Error()
}

// transparent serves a connection that was led here.
func (s *session) transparent() {
	to, err := originalAddress(s.conn)
	if err != nil {
		s.log.Debug("where a connection went is not known", "client", s.client, "error", err)
		relay.Abort(s.conn)
		return
	}
	s.begin("transparent", "CONNECT", to.String())
	if _, is := s.plane.outgoing.Load(ends{s.client, to}); is {
		s.fail(errLoop)
		relay.Abort(s.conn)
		return
	}
	if to == s.local && s.plane.isOwn(socks5.AddressOf(to), false) {
		s.fail(errors.New("it was not led here: the client named the proxy itself"))
		relay.Abort(s.conn)
		return
	}
	dest := socks5.AddressOf(to)
	dest.Name, err = s.sniff()
	var c relay.Conn
	if err == nil {
		c, err = s.openNamed(dest)
	}
	if err != nil {
		s.fail(err)
		relay.Abort(s.conn)
		return
	}
	s.relay(c)
}

// openNamed connects to an address of which the client's own words say which name it
// means. The name decides about the way; who goes directly goes to the address.
func (s *session) openNamed(to target) (relay.Conn, error) {
	if to.Name == "" {
		return s.open(to)
	}
	ctx, cancel := context.WithTimeout(s.ctx, s.settings.Connect)
	defer cancel()
	a, _ := choose(s.settings.Rules, question{s.client.Addr(), s.user, to})
	if a.via[0] != config.Direct {
		// A name that no rule has asked for is only what the client says.
		if a.rule >= 0 && len(s.settings.Rules[a.rule].Domains) > 0 {
			to.IP = netip.Addr{}
		} else {
			to.Name = ""
		}
		w, err := s.indirect(a, to)
		if err != nil {
			return nil, err
		}
		s.flow.set(func(f *Flow) { f.Via, f.Target = w.via, to.String() })
		return w.dial(ctx)
	}
	s.flow.set(func(f *Flow) { f.Via = a.via })
	to.Name = ""
	if err := s.mayReach(to, a); err != nil {
		return nil, err
	}
	return s.dialDirect(ctx, []netip.AddrPort{to.AddrPort()})
}
