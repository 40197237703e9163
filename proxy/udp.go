package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
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
	from      netip.AddrPort  // of the client; port 0: nothing has come yet
	ctx       context.Context // of the association
	end       context.CancelFunc
	asking    int // names that are being asked for
	waiting   int // bytes that wait for the addresses of names
	fragments socks5.Fragments
	peers     map[netip.Addr]time.Time // hosts that the client has sent to, and when
	names     map[string]*name
}

// name is a name of which the address is known, or asked for.
type name struct {
	addresses []netip.AddrPort // none: it is being asked for, or there is none
	asking    bool
	until     time.Time
	waiting   []socks5.Datagram
}

// Bounds of one association.
const (
	maxPeers   = 1024
	maxNames   = 256
	maxAsking  = 16      // names that are asked for at a time
	maxWaiting = 1 << 20 // bytes of datagrams that wait for the addresses of names
	nameFor    = 30 * time.Second
	nameWait   = 5 * time.Second
)

// associate serves UDP ASSOCIATE. from is where the client says that it will send from.
func (s *session) associate(from target) {
	a, err := s.newAssociation(from)
	if err != nil {
		s.fail(err)
		_ = s.reply(replyOf(err), netip.AddrPort{})
		s.hangUp()
		return
	}
	defer a.close()
	if err := s.reply(socks5.Succeeded, addrPort(a.inner.LocalAddr())); err != nil {
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
	a.ctx, a.end = context.WithCancel(s.ctx)
	// Datagrams are taken from the address that the client's connection has, whatever
	// address it names: behind a translation of addresses it does not know better. The
	// port holds if it names one.
	a.from = netip.AddrPortFrom(s.client.Addr(), 0)
	if from.IP == s.client.Addr() || from.IP.IsUnspecified() {
		a.from = netip.AddrPortFrom(s.client.Addr(), from.Port)
	}
	var err error
	if a.inner, err = listenUDP(netip.AddrPortFrom(s.local.Addr().WithZone(s.zone), 0), mark); err != nil {
		return nil, err
	}
	for i, every := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		a.outer[i], err = listenUDP(netip.AddrPortFrom(every, 0), markOne)
	}
	if a.outer[0] == nil && a.outer[1] == nil {
		a.close()
		return nil, err
	}
	return a, nil
}

// markOne is mark for a socket that sends to one host at a time: a broadcast is none.
func markOne(network, address string, raw syscall.RawConn) error {
	err := raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 0) })
	return errors.Join(err, mark(network, address, raw))
}

func listenUDP(at netip.AddrPort, control func(network, address string, raw syscall.RawConn) error) (*net.UDPConn, error) {
	l := net.ListenConfig{Control: control}
	c, err := l.ListenPacket(context.Background(), network("udp", at.Addr()), at.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.UDPConn), nil
}

func (a *association) close() {
	a.end()
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
		a.sendTo(d, []netip.AddrPort{d.Address.AddrPort()})
		return
	}
	known := a.names[d.Address.Name]
	switch {
	case known == nil || !known.asking && time.Now().After(known.until):
		a.ask(d)
	case known.asking:
		a.wait(known, d)
	default:
		a.sendTo(d, known.addresses)
	}
}

// sendTo sends a datagram to the first address that it may go to, and that there is a way
// to. What one target is, or is not, ends nothing. The caller holds the lock.
func (a *association) sendTo(d socks5.Datagram, addresses []netip.AddrPort) {
	for _, ap := range addresses {
		to := target{Name: d.Address.Name, IP: ap.Addr(), Port: d.Address.Port}
		c := a.outer[0]
		if to.IP.Is6() {
			c = a.outer[1]
		}
		if c == nil || to.Port == 0 || !a.may(to) || !a.admit(to.IP) {
			continue
		}
		n, err := c.WriteToUDPAddrPort(d.Content, to.AddrPort())
		if err == nil {
			a.flow.counts.Sent.Add(uint64(n))
			return
		}
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

// wait keeps a datagram until the address of its name is known, if there is room. The
// caller holds the lock.
func (a *association) wait(n *name, d socks5.Datagram) {
	if a.waiting+len(d.Content) <= maxWaiting {
		a.waiting += len(d.Content)
		n.waiting = append(n.waiting, d.Clone())
	}
}

// ask has a name resolved, while others are relayed. Names beyond what may be asked for
// at a time are dropped, with their datagrams. The caller holds the lock.
func (a *association) ask(d socks5.Datagram) {
	if a.asking >= maxAsking || len(a.names) >= maxNames && !a.forgetName() {
		return
	}
	n := &name{asking: true}
	a.asking++
	a.names[d.Address.Name] = n
	a.wait(n, d)
	a.tasks.Go(func() {
		ctx, cancel := context.WithTimeout(a.ctx, nameWait)
		defer cancel()
		addresses, err := a.plane.resolve(ctx, d.Address)
		a.mu.Lock()
		defer a.mu.Unlock()
		a.asking--
		n.asking, n.until = false, time.Now().Add(nameFor)
		if err == nil {
			n.addresses = addresses
		}
		for _, d := range n.waiting {
			a.waiting -= len(d.Content)
			a.sendTo(d, n.addresses)
		}
		n.waiting = nil
	})
}

// forgetName forgets one that is not being asked for, and reports whether there was one.
func (a *association) forgetName() bool {
	for text, n := range a.names {
		if !n.asking {
			delete(a.names, text)
			return true
		}
	}
	return false
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
	if _, err := a.inner.WriteToUDPAddrPort(room[at:len(room)+len(b)], netip.AddrPortFrom(client.Addr().WithZone(a.zone), client.Port())); err == nil {
		a.flow.counts.Received.Add(uint64(len(b)))
	}
}
