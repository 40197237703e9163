package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/proxy/socks5"
)

// association relays datagrams of one client (RFC 1928, section 7) for as long as its
// connection lasts. What it cannot or may not relay it drops without a word, as the RFC
// has it.
//
// Answers are taken from hosts that the client has sent something to, from any of their
// ports: a server may answer from another one, but a stranger that finds the relay's port
// reaches nobody.
type association struct {
	*session
	inner *net.UDPConn    // where the client sends to
	outer [2]*net.UDPConn // where answers come to: IPv4, IPv6; nil: this host has none

	mu        sync.Mutex
	from      netip.AddrPort // of the client; port 0: nothing has come yet
	fragments socks5.Fragments
	peers     map[netip.Addr]time.Time // hosts that the client has sent to, and when
	names     map[string]*name
}

// name is a name of which the address is known, or asked for.
type name struct {
	address netip.Addr // not valid: it is being asked for, or there is none
	asking  bool
	until   time.Time
	waiting []socks5.Datagram
}

// Bounds of one association.
const (
	maxPeers   = 1024
	maxNames   = 256
	maxWaiting = 16 // datagrams that wait for the address of a name
	nameFor    = 30 * time.Second
	nameWait   = 5 * time.Second
)

// associate serves UDP ASSOCIATE. from is where the client says that it will send from.
func (s *session) associate(from target) {
	a, err := s.newAssociation(from)
	if err != nil {
		s.fail(err)
		_ = socks5.WriteReply(s, replyOf(err), netip.AddrPort{})
		s.hangUp()
		return
	}
	defer a.close()
	if err := socks5.WriteReply(s, socks5.Succeeded, addrPort(a.inner.LocalAddr())); err != nil {
		s.fail(err)
		s.conn.Close()
		return
	}
	_ = s.conn.SetDeadline(time.Time{})
	s.plane.flows.reached(s.flow)
	var loops sync.WaitGroup
	loops.Go(func() { receive(a.inner, a.fromClient) })
	for _, c := range a.outer {
		if c != nil {
			loops.Go(func() { receive(c, a.fromTarget) })
		}
	}
	// What else the client says means nothing; that it ends ends the association.
	_, err = io.Copy(io.Discard, s.in)
	a.close()
	loops.Wait()
	s.conn.Close()
	s.plane.flows.end(s.flow, false, ended(s.ctx, err))
}

func (s *session) newAssociation(from target) (*association, error) {
	a := &association{session: s, peers: make(map[netip.Addr]time.Time), names: make(map[string]*name)}
	// Datagrams are taken from the address that the client's connection has, whatever
	// address it names: behind a translation of addresses it does not know better. The
	// port holds if it names one.
	a.from = netip.AddrPortFrom(s.client.Addr(), 0)
	if from.IP == s.client.Addr() || from.IP.IsUnspecified() {
		a.from = netip.AddrPortFrom(s.client.Addr(), from.Port)
	}
	var err error
	if a.inner, err = listenUDP(netip.AddrPortFrom(s.local.Addr(), 0)); err != nil {
		return nil, err
	}
	for i, every := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		a.outer[i], err = listenUDP(netip.AddrPortFrom(every, 0))
	}
	if a.outer[0] == nil && a.outer[1] == nil {
		a.close()
		return nil, err
	}
	return a, nil
}

func listenUDP(at netip.AddrPort) (*net.UDPConn, error) {
	l := net.ListenConfig{Control: mark}
	c, err := l.ListenPacket(context.Background(), network("udp", at.Addr()), at.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.UDPConn), nil
}

func (a *association) close() {
	a.inner.Close()
	for _, c := range a.outer {
		if c != nil {
			c.Close()
		}
	}
}

// packets are buffers for one datagram, with room for a header before it.
var packets = sync.Pool{New: func() any { return new([socks5.MaxHeader + 65535]byte) }}

// receive calls each for every datagram until the socket is closed. While there is none
// it holds no buffer. each gets the datagram and the buffer before it.
func receive(c *net.UDPConn, each func(room, datagram []byte, from netip.AddrPort)) {
	raw, err := c.SyscallConn()
	if err != nil {
		return
	}
	for {
		var b *[socks5.MaxHeader + 65535]byte
		var n int
		var from unix.Sockaddr
		err := raw.Read(func(fd uintptr) bool {
			b = packets.Get().(*[socks5.MaxHeader + 65535]byte)
			n, from, err = unix.Recvfrom(int(fd), b[socks5.MaxHeader:], unix.MSG_DONTWAIT)
			if errors.Is(err, unix.EAGAIN) {
				packets.Put(b)
				return false
			}
			return true
		})
		if err != nil {
			return
		}
		if from != nil {
			each(b[:socks5.MaxHeader], b[socks5.MaxHeader:socks5.MaxHeader+n], fromSockaddr(from))
		}
		packets.Put(b)
	}
}

func fromSockaddr(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

// fromClient relays a datagram of the client.
func (a *association) fromClient(_, b []byte, from netip.AddrPort) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if from.Addr() != a.from.Addr() || a.from.Port() != 0 && from.Port() != a.from.Port() {
		return
	}
	d, err := socks5.ParseDatagram(b)
	if err != nil {
		return
	}
	a.from = from
	if d, whole := a.fragments.Add(d, time.Now()); whole {
		a.send(d)
	}
}

// send sends a datagram to where it is for, when the address of that is known. The
// caller holds the lock.
func (a *association) send(d socks5.Datagram) {
	if d.Address.Name == "" {
		a.sendTo(d)
		return
	}
	known := a.names[d.Address.Name]
	switch {
	case known == nil || !known.asking && time.Now().After(known.until):
		a.ask(d)
	case known.asking && len(known.waiting) < maxWaiting:
		known.waiting = append(known.waiting, d.Clone())
	case !known.asking && known.address.IsValid():
		d.Address.IP = known.address
		a.sendTo(d)
	}
}

// sendTo sends a datagram to an address, if that may be. What one target is, or is not,
// ends nothing. The caller holds the lock.
func (a *association) sendTo(d socks5.Datagram) {
	to := d.Address
	c := a.outer[0]
	if to.IP.Is6() {
		c = a.outer[1]
	}
	if c == nil || to.Port == 0 || !a.may(to) || !a.admit(to.IP) {
		return
	}
	if n, err := c.WriteToUDPAddrPort(d.Content, to.AddrPort()); err == nil {
		a.flow.counts.Sent.Add(uint64(n))
	}
}

// may reports whether the rules let a datagram go there. Upstreams are for connections.
func (a *association) may(to target) bool {
	way, _ := choose(a.settings.Rules, question{a.client.Addr(), a.user, to})
	return way.via[0] == config.Direct && !to.IP.IsMulticast() && a.mayReach(to, way) == nil
}

// admit notes that answers of a host are wanted, and reports whether there is room.
func (a *association) admit(host netip.Addr) bool {
	now := time.Now()
	if _, known := a.peers[host]; !known && len(a.peers) >= maxPeers {
		for h, last := range a.peers {
			if now.Sub(last) > a.settings.IdleUDP {
				delete(a.peers, h)
			}
		}
		if len(a.peers) >= maxPeers {
			return false
		}
	}
	a.peers[host] = now
	return true
}

// ask has a name resolved, while others are relayed. The caller holds the lock.
func (a *association) ask(d socks5.Datagram) {
	if len(a.names) >= maxNames {
		clear(a.names) // what is being asked for is asked for again
	}
	n := &name{asking: true, waiting: []socks5.Datagram{d.Clone()}}
	a.names[d.Address.Name] = n
	go func() {
		ctx, cancel := context.WithTimeout(a.ctx, nameWait)
		defer cancel()
		addresses, err := a.plane.resolve(ctx, d.Address)
		a.mu.Lock()
		defer a.mu.Unlock()
		n.asking, n.until = false, time.Now().Add(nameFor)
		if err == nil {
			n.address = a.reachable(addresses)
		}
		waiting := n.waiting
		n.waiting = nil
		for _, d := range waiting {
			d.Address.IP = n.address
			if n.address.IsValid() {
				a.sendTo(d)
			}
		}
	}()
}

// reachable returns the first address of a family that this host has.
func (a *association) reachable(addresses []netip.AddrPort) netip.Addr {
	for _, ap := range addresses {
		if ap.Addr().Is4() && a.outer[0] != nil || ap.Addr().Is6() && a.outer[1] != nil {
			return ap.Addr()
		}
	}
	return netip.Addr{}
}

// fromTarget relays an answer to the client, with the address that it really came from.
func (a *association) fromTarget(room, b []byte, from netip.AddrPort) {
	a.mu.Lock()
	last, known := a.peers[from.Addr()]
	client := a.from
	a.mu.Unlock()
	if !known || time.Since(last) > a.settings.IdleUDP || client.Port() == 0 {
		return
	}
	var head [socks5.MaxHeader]byte
	h := socks5.AppendHeader(head[:0], socks5.AddressOf(from))
	at := len(room) - len(h)
	copy(room[at:], h)
	if _, err := a.inner.WriteToUDPAddrPort(room[at:len(room)+len(b)], client); err == nil {
		a.flow.counts.Received.Add(uint64(len(b)))
	}
}
