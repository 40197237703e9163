package proxy

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/proxy/socks5"
)

// datagrams are those that are handed to a proxy as they were sent (TPROXY). Each client
// and target has an exchange of its own; what it is answered comes from the address that
// it has sent to.
type datagrams struct {
	*server
	conn *net.UDPConn

	mu        sync.Mutex
	exchanges map[ends]*exchange
	perClient map[netip.Addr]int
	closed    bool
}

// exchange is the datagrams between one client and one target.
type exchange struct {
	*datagrams
	key    ends
	flow   *flow
	inner  *net.UDPConn // has the address of the target, and is connected to the client
	outer  *net.UDPConn // is connected to the target
	last   atomic.Int64 // when something came, in nanoseconds since process start
	sent   atomic.Uint64
	idle   *time.Timer
	ending sync.Once
}

// shortIdle is how long an exchange of one question lasts, at most: a name is asked for
// once from each port.
const shortIdle = 30 * time.Second

// started is what times of exchanges count from.
var started = time.Now()

// listenForDatagrams opens the listener at an address, if it is wanted and missing. The
// caller holds the lock.
func (s *server) listenForDatagrams(at netip.AddrPort) error {
	if !s.now.Load().UDP || s.datagrams[at] != nil {
		return nil
	}
	c, err := listenUDP(at, handed)
	if err != nil {
		return err
	}
	d := &datagrams{server: s, conn: c, exchanges: make(map[ends]*exchange), perClient: make(map[netip.Addr]int)}
	s.datagrams[at] = d
	s.tasks.Go(d.run)
	return nil
}

// endDatagrams closes the listeners of some addresses, and ends what they have begun.
// The caller does not hold the lock: who relays a datagram may wait for it.
func (s *server) endDatagrams(of func(netip.AddrPort) bool) {
	var gone []*datagrams
	s.mu.Lock()
	for at, d := range s.datagrams {
		if of(at) {
			gone = append(gone, d)
			delete(s.datagrams, at)
		}
	}
	s.mu.Unlock()
	for _, d := range gone {
		d.close()
	}
}

// handed is for a listener to which datagrams are handed: it is told where each wanted to
// go.
func handed(network, _ string, raw syscall.RawConn) error {
	var err error
	failed := raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, host.ProxyMark)
		level, option := unix.SOL_IP, unix.IP_RECVORIGDSTADDR
		if network == "udp6" {
			level, option = unix.SOL_IPV6, unix.IPV6_RECVORIGDSTADDR
		}
		// Many clients may begin at once, and each begins with the making of two sockets.
		_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20)
		err = errors.Join(transparent(int(fd), network), unix.SetsockoptInt(int(fd), level, option, 1))
	})
	return errors.Join(failed, err)
}

// run takes datagrams until the listener is closed.
func (d *datagrams) run() {
	defer d.close()
	b, control := make([]byte, 65535), make([]byte, unix.CmsgSpace(unix.SizeofSockaddrInet6))
	for {
		n, cn, _, from, err := d.conn.ReadMsgUDPAddrPort(b, control)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // of one datagram
		}
		if to, ok := wantedBy(control[:cn]); ok {
			d.take(ends{netip.AddrPortFrom(from.Addr().Unmap().WithZone(""), from.Port()), to}, b[:n])
		}
	}
}

// wantedBy returns where a datagram wanted to go (ip(7), IP_RECVORIGDSTADDR: its control
// message holds a socket address).
func wantedBy(control []byte) (netip.AddrPort, bool) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return netip.AddrPort{}, false
	}
	for _, m := range messages {
		port := func() uint16 { return uint16(m.Data[2])<<8 | uint16(m.Data[3]) }
		switch {
		case m.Header.Level == unix.SOL_IP && m.Header.Type == unix.IP_RECVORIGDSTADDR && len(m.Data) >= unix.SizeofSockaddrInet4:
			return netip.AddrPortFrom(netip.AddrFrom4([4]byte(m.Data[4:8])), port()), true
		case m.Header.Level == unix.SOL_IPV6 && m.Header.Type == unix.IPV6_RECVORIGDSTADDR && len(m.Data) >= unix.SizeofSockaddrInet6:
			return netip.AddrPortFrom(netip.AddrFrom16([16]byte(m.Data[8:24])).Unmap(), port()), true
		}
	}
	return netip.AddrPort{}, false
}

// take relays a datagram of a client. What may not go, or has no way, is dropped.
func (d *datagrams) take(key ends, b []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	x := d.exchanges[key]
	if x == nil {
		if d.closed || !d.admit(key.own.Addr()) {
			return
		}
		var err error
		if x, err = d.begin(key); err != nil {
			return
		}
	}
	x.relay(b)
}

// admit reports whether there is room for an exchange of a client. Where there is none
// at all one that has been silent makes room. The caller holds the lock.
func (d *datagrams) admit(client netip.Addr) bool {
	now := d.now.Load()
	if !permitted(now.Proxy, client) {
		return false
	}
	// Addresses can be invented: whoever uses that of another takes no more from him than
	// what has been silent.
	if d.perClient[client] >= now.MaxPerClient {
		d.endSilent(func(x *exchange) bool { return x.key.own.Addr() == client })
	}
	if most := maxExchanges(now.MaxConnections); int(d.exchanging.Load()) >= most {
		d.endSilent(ofAnybody)
		return int(d.exchanging.Load()) < most
	}
	return true
}

// maxExchanges is how many exchanges all listeners of a proxy may have. Each has two file
// descriptors, of which most are for connections and for the agent itself.
func maxExchanges(connections int) int {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return min(connections, 1024)
	}
	return min(connections, int(min(limit.Cur, 1<<20)/8))
}

// lookedAt is how many exchanges are looked at to find one that has been silent.
const lookedAt = 16

func ofAnybody(*exchange) bool { return true }

// endSilent ends the one that has been silent for longest, of some. The caller holds the
// lock.
func (d *datagrams) endSilent(of func(*exchange) bool) {
	var silent *exchange
	n := 0
	for _, x := range d.exchanges {
		if !of(x) {
			continue
		}
		if silent == nil || x.last.Load() < silent.last.Load() {
			silent = x
		}
		if n++; n == lookedAt {
			break
		}
	}
	if silent != nil {
		d.forget(silent)
		go silent.end("closed: others needed the room")
	}
}

// forget has an exchange take nothing more. The caller holds the lock.
func (d *datagrams) forget(x *exchange) {
	if d.exchanges[x.key] != x {
		return
	}
	delete(d.exchanges, x.key)
	d.exchanging.Add(-1)
	client := x.key.own.Addr()
	if d.perClient[client]--; d.perClient[client] == 0 {
		delete(d.perClient, client)
	}
}

// begin begins an exchange. The caller holds the lock.
func (d *datagrams) begin(key ends) (*exchange, error) {
	now := d.now.Load()
	s := &session{server: d.server, settings: now, client: key.own}
	s.begin("transparent", "UDP", key.target.String())
	x := &exchange{datagrams: d, key: key, flow: s.flow}
	err := x.open(s)
	if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) {
		d.endSilent(ofAnybody)
	}
	if err != nil {
		s.fail(err)
		return nil, err
	}
	x.touch()
	x.idle = time.AfterFunc(min(now.IdleUDP, shortIdle), func() { x.lookIdle(now.IdleUDP) })
	d.exchanges[key] = x
	d.exchanging.Add(1)
	d.perClient[key.own.Addr()]++
	d.plane.flows.reached(x.flow)
	d.tasks.Go(func() { receive(x.inner, x.toTarget) })
	d.tasks.Go(func() { receive(x.outer, x.toClient) })
	return x, nil
}

// errUpstream says that the way goes by others, which are for connections.
var errUpstream = errors.New("refused: the rules name an upstream, and those are for TCP")

// open opens both sockets of an exchange, if the rules let its datagrams go directly.
func (x *exchange) open(s *session) error {
	to := socks5.AddressOf(x.key.target)
	a, _ := choose(s.settings.Rules, question{x.key.own.Addr(), "", to})
	switch {
	case a.via[0] == config.Refuse || to.IP.IsMulticast() || to.Port == 0:
		return errRefused
	case a.via[0] != config.Direct:
		return errUpstream
	}
	s.flow.set(func(f *Flow) { f.Via = a.via })
	if err := s.mayReach(to, a); err != nil {
		return err
	}
	var err error
	if x.inner, err = dialUDP(x.key.target, x.key.own, transparentUDP); err != nil {
		return err
	}
	from := netip.AddrPort{}
	options := markOne
	if kept := s.settings.keptSource(x.key.own.Addr()); kept.IsValid() {
		from, options = netip.AddrPortFrom(kept, 0), transparentUDP
	}
	if x.outer, err = dialUDP(from, x.key.target, options); err != nil {
		x.inner.Close()
	}
	return err
}

// transparentUDP is for a socket that has an address that this host has not, as others
// may have it, too: those are connected to other clients.
func transparentUDP(network, address string, raw syscall.RawConn) error {
	var err error
	failed := raw.Control(func(fd uintptr) {
		err = errors.Join(transparent(int(fd), network), unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
	})
	return errors.Join(failed, err, markOne(network, address, raw))
}

// dialUDP connects a socket to an address, from another one if that is valid.
func dialUDP(from, to netip.AddrPort, options control) (*net.UDPConn, error) {
	d := net.Dialer{Control: options}
	if from.IsValid() {
		d.LocalAddr = net.UDPAddrFromAddrPort(from)
	}
	c, err := d.DialContext(context.Background(), network("udp", to.Addr()), to.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.UDPConn), nil
}

// toTarget relays a datagram of the client, toClient one of the target. An error is of
// the datagram before, or of this one: it ends nothing.
//
// A socket has its address a moment before it is connected, and takes what anybody has
// sent to that meanwhile: what is of another client is its business, what is of another
// target nobody's.
func (x *exchange) toTarget(_, b []byte, from netip.AddrPort) {
	if from != x.key.own {
		x.take(ends{from, x.key.target}, b)
		return
	}
	x.relay(b)
}

// relay sends a datagram of the client.
func (x *exchange) relay(b []byte) {
	x.sent.Add(1)
	x.touch()
	if write(x.outer, b) {
		x.flow.counts.Sent.Add(uint64(len(b)))
	}
}

func (x *exchange) toClient(_, b []byte, from netip.AddrPort) {
	if from != x.key.target {
		return
	}
	x.touch()
	if write(x.inner, b) {
		x.flow.counts.Received.Add(uint64(len(b)))
	}
}

// write sends a datagram. What ICMP has said of one before is told first, by an error.
func write(c *net.UDPConn, b []byte) bool {
	_, err := c.Write(b)
	if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.ENETUNREACH) {
		_, err = c.Write(b)
	}
	return err == nil
}

func (x *exchange) touch() { x.last.Store(int64(time.Since(started))) }

// lookIdle ends the exchange if nothing has come for as long as it may be silent, and
// else looks again when that could be so.
func (x *exchange) lookIdle(idle time.Duration) {
	if x.sent.Load() < 2 {
		idle = min(idle, shortIdle)
	}
	silent := time.Since(started) - time.Duration(x.last.Load())
	if silent < idle {
		x.idle.Reset(idle - silent)
		return
	}
	x.datagrams.mu.Lock()
	x.forget(x)
	x.datagrams.mu.Unlock()
	x.end("closed: nothing was sent")
}

// end closes the sockets of an exchange that takes nothing more.
func (x *exchange) end(outcome string) {
	x.ending.Do(func() {
		x.idle.Stop()
		x.inner.Close()
		x.outer.Close()
		x.plane.flows.end(x.flow, false, outcome)
	})
}

// close ends all exchanges.
func (d *datagrams) close() {
	d.conn.Close()
	d.mu.Lock()
	d.closed = true
	all := d.exchanges
	d.exchanging.Add(-int64(len(all)))
	d.exchanges = make(map[ends]*exchange)
	clear(d.perClient)
	d.mu.Unlock()
	for _, x := range all {
		x.end("closed with the proxy")
	}
}
