package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/proxy/relay"
	"github.com/pentad/pentad/proxy/socks5"
)

// socks serves a client that speaks SOCKS, version 5.
func (s *session) socks() {
	var err error
	if s.user, err = socks5.Greet(s, s.checker()); err != nil {
		s.log.Debug("a client did not come in", "client", s.client, "user", s.user, "error", err)
		s.hangUp()
		return
	}
	q, err := socks5.ReadRequest(s)
	var reply socks5.Reply
	switch {
	case err == nil:
	case errors.As(err, &reply):
		s.refuse(q, reply, err)
		return
	case errors.Is(err, socks5.ErrMalformed):
		s.refuse(q, socks5.GeneralFailure, err)
		return
	default:
		s.conn.Close()
		return
	}
	_ = s.conn.SetDeadline(time.Time{}) // it has said all that it has to
	s.begin("socks5", q.Command.String(), q.Address.String())
	switch q.Command {
	case socks5.Connect:
		s.socksConnect(q.Address)
	case socks5.Bind:
		s.socksBind(q.Address)
	case socks5.Associate:
		s.associate(q.Address)
	}
}

// reply answers a request, within a time of its own.
func (s *session) reply(r socks5.Reply, bound netip.AddrPort) error {
	_ = s.conn.SetWriteDeadline(time.Now().Add(s.settings.Handshake))
	defer func() { _ = s.conn.SetWriteDeadline(time.Time{}) }()
	return socks5.WriteReply(s, r, bound)
}

// refuse answers a request that is none.
func (s *session) refuse(q socks5.Request, reply socks5.Reply, err error) {
	s.begin("socks5", q.Command.String(), q.Address.String())
	s.fail(err)
	_ = s.reply(reply, netip.AddrPort{})
	s.hangUp()
}

// checker returns what says who may come in; nil: everybody may.
func (s *session) checker() func(user, password string) bool {
	if s.settings.users == nil {
		return nil
	}
	return func(user, password string) bool {
		ctx, cancel := context.WithTimeout(s.ctx, s.settings.Handshake)
		defer cancel()
		ok, err := s.settings.users.check(ctx, user, password)
		if err != nil {
			s.log.Error("nobody can be let in", "error", err)
		}
		return ok
	}
}

// refuseSOCKS4 says no in the words of the version 4, whose clients expect eight bytes of
// which the second is 91: request rejected or failed.
func (s *session) refuseSOCKS4() {
	s.log.Debug("a client speaks SOCKS4, which knows neither names nor passwords", "client", s.client)
	_, _ = s.conn.Write([]byte{0, 91, 0, 0, 0, 0, 0, 0})
	s.hangUp()
}

func (s *session) socksConnect(to target) {
	c, err := s.open(to)
	if err != nil {
		s.fail(err)
		_ = s.reply(replyOf(err), netip.AddrPort{})
		s.hangUp()
		return
	}
	if err := s.reply(socks5.Succeeded, addrPort(c.LocalAddr())); err != nil {
		s.fail(err)
		relay.Abort(c)
		s.conn.Close()
		return
	}
	s.relay(c)
}

// replyOf returns what a client is told of an error: by what it is, not by its text.
func replyOf(err error) socks5.Reply {
	var reply socks5.Reply
	var status *statusError
	var dns *net.DNSError
	switch {
	case errors.As(err, &reply):
		return reply
	case errors.Is(err, errRefused), errors.Is(err, errOwn), errors.Is(err, errHost),
		errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		return socks5.NotAllowed
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.ENETDOWN):
		return socks5.NetworkUnreachable
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.EHOSTDOWN), errors.Is(err, syscall.ETIMEDOUT),
		errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded), errors.As(err, &dns):
		return socks5.HostUnreachable
	case errors.Is(err, syscall.ECONNREFUSED):
		return socks5.ConnectionRefused
	case errors.Is(err, syscall.EAFNOSUPPORT), errors.Is(err, syscall.EADDRNOTAVAIL):
		return socks5.AddressTypeNotSupported
	case errors.As(err, &status):
		return status.reply()
	}
	return socks5.GeneralFailure
}

// reply returns what the status of a proxy means for a client of SOCKS.
func (e *statusError) reply() socks5.Reply {
	switch e.code {
	case 403, 407:
		return socks5.NotAllowed
	case 502, 503, 504:
		return socks5.HostUnreachable
	}
	return socks5.GeneralFailure
}

// bindWait is how long the peer of a BIND may take to come.
const bindWait = 2 * time.Minute

// socksBind waits for one connection of the host that the client names, of any port:
// servers of FTP, for which BIND is made, come from another than the one they listen at.
func (s *session) socksBind(from target) {
	peers, err := s.peers(from)
	if err != nil {
		s.failBind(err)
		return
	}
	l, err := listenTCP(netip.AddrPortFrom(s.outside(peers), 0), keepalive)
	if err != nil {
		s.failBind(err)
		return
	}
	defer l.Close()
	if err := s.reply(socks5.Succeeded, addrPort(l.Addr())); err != nil {
		s.fail(err)
		s.conn.Close()
		return
	}
	c, err := s.awaitPeer(l, peers)
	l.Close() // one connection only
	if err != nil {
		s.failBind(err)
		return
	}
	s.flow.set(func(f *Flow) { f.Target = c.RemoteAddr().String() })
	if err := s.reply(socks5.Succeeded, addrPort(c.RemoteAddr())); err != nil {
		s.fail(err)
		relay.Abort(c)
		s.conn.Close()
		return
	}
	s.relay(c)
}

func (s *session) failBind(err error) {
	s.fail(err)
	_ = s.reply(replyOf(err), netip.AddrPort{})
	s.hangUp()
}

// peers returns who may come; nobody named: everybody. Who may not be reached may not
// come either.
func (s *session) peers(from target) ([]netip.AddrPort, error) {
	if from.Name == "" && from.IP.IsUnspecified() {
		a, needsAddress := choose(s.settings.Rules, question{s.client.Addr(), s.user, target{Port: from.Port}})
		if needsAddress || a.via[0] != config.Direct {
			return nil, errRefused
		}
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(s.ctx, s.settings.Connect)
	defer cancel()
	addresses, err := s.plane.resolve(ctx, from)
	if err != nil {
		return nil, err
	}
	q := question{s.client.Addr(), s.user, from}
	var may []netip.AddrPort
	for _, ap := range addresses {
		q.to.IP = ap.Addr()
		if a, _ := choose(s.settings.Rules, q); a.via[0] == config.Direct && s.mayReach(q.to, a) == nil {
			may = append(may, ap)
		}
	}
	if len(may) == 0 {
		return nil, errRefused
	}
	return may, nil
}

// discard is a port of which it does not matter whether anybody is there (RFC 863).
const discard = 9

// outside returns the address of this host at which those peers reach it.
func (s *session) outside(peers []netip.AddrPort) netip.Addr {
	if len(peers) > 0 {
		// It sends nothing: the kernel chooses a source address.
		c, err := net.Dial("udp", netip.AddrPortFrom(peers[0].Addr(), discard).String())
		if err == nil {
			defer c.Close()
			return addrPort(c.LocalAddr()).Addr()
		}
	}
	return s.local.Addr().WithZone(s.zone)
}

// errGone says that the client has closed its connection while it waited.
var errGone = errors.New("the client has gone")

// awaitPeer takes the first connection of those who may come. The client's end ends the
// wait.
func (s *session) awaitPeer(l *net.TCPListener, peers []netip.AddrPort) (*net.TCPConn, error) {
	until := time.Now().Add(bindWait)
	_ = l.SetDeadline(until)
	ctx, stop := context.WithCancel(s.ctx)
	defer stop()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	watched := make(chan error, 1)
	var came atomic.Bool
	go func() {
		err := s.awaitEnd()
		if err != nil && !came.Load() {
			l.Close()
		}
		watched <- err
	}()
	c, err := acceptFrom(l, peers)
	came.Store(true)
	_ = s.conn.SetReadDeadline(time.Unix(1, 0)) // the watch is over
	gone := <-watched
	_ = s.conn.SetReadDeadline(time.Time{})
	if err != nil && (errors.Is(gone, io.EOF) || errors.Is(gone, syscall.ECONNRESET)) {
		err = errGone
	}
	return c, err
}

// awaitEnd waits until the client has ended or aborted. What it says meanwhile is for the
// peer, and stays where it is; who says more than a little is not watched any more.
func (s *session) awaitEnd() error {
	for n := 1; n <= maxHello; n = s.in.Buffered() + 1 {
		if _, err := s.in.Peek(n); err != nil {
			return err
		}
	}
	return nil
}

func acceptFrom(l *net.TCPListener, peers []netip.AddrPort) (*net.TCPConn, error) {
	for {
		c, err := l.AcceptTCP()
		if err != nil {
			return nil, err
		}
		if len(peers) == 0 || isAmong(peers, addrPort(c.RemoteAddr()).Addr()) {
			return c, nil
		}
		relay.Abort(c)
	}
}

func isAmong(peers []netip.AddrPort, a netip.Addr) bool {
	for _, p := range peers {
		if p.Addr() == a {
			return true
		}
	}
	return false
}
