package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/proxy/relay"
)

// server is one proxy.
type server struct {
	plane *Plane
	name  string
	log   *slog.Logger
	ctx   context.Context // of its connections
	stop  context.CancelFunc
	tasks sync.WaitGroup
	webs  []*http.Server // of the connections that speak HTTP

	now atomic.Pointer[settings]

	exchanging atomic.Int64 // exchanges of datagrams that there are

	mu        sync.Mutex
	listeners map[netip.AddrPort]*net.TCPListener
	datagrams map[netip.AddrPort]*datagrams
	changed   *sync.Cond // clients have gone, or may be more
	clients   map[netip.Addr]int
	n         int
	closed    bool
}

// settings are what holds for the next connections. They are immutable.
type settings struct {
	config.Proxy
	users     *users // nil: nobody is asked
	web       *http.Server
	queue     *connQueue // what web serves
	upstreams map[string]config.Upstream
}

func newServer(p *Plane, name string) *server {
	s := &server{
		plane: p, name: name, log: p.log.With("proxy", name),
		listeners: make(map[netip.AddrPort]*net.TCPListener), datagrams: make(map[netip.AddrPort]*datagrams), clients: make(map[netip.Addr]int),
	}
	s.ctx, s.stop = context.WithCancel(context.Background())
	s.changed = sync.NewCond(&s.mu)
	return s
}

// set has settings hold, and closes listeners that are not wanted any more.
func (s *server) set(w config.Proxy, upstreams map[string]config.Upstream) {
	next := &settings{Proxy: w, upstreams: upstreams}
	before := s.now.Load()
	if before != nil && before.users != nil && before.UsersFile == w.UsersFile {
		next.users = before.users
	} else if w.UsersFile != "" {
		next.users = newUsers(w.UsersFile)
	}
	if before != nil && before.Handshake == w.Handshake {
		next.web, next.queue = before.web, before.queue
	} else {
		next.web, next.queue = newWebServer(w.Handshake), newConnQueue()
		s.webs = append(s.webs, next.web)
		s.tasks.Go(func() { _ = next.web.Serve(next.queue) })
	}
	s.now.Store(next)
	defer s.endDatagrams(func(at netip.AddrPort) bool { return !w.UDP || !slices.Contains(w.Listen, at) })
	s.mu.Lock()
	defer s.mu.Unlock()
	for at, l := range s.listeners {
		if !slices.Contains(w.Listen, at) {
			l.Close()
			delete(s.listeners, at)
		}
	}
	s.changed.Broadcast()
}

// listen opens the listeners that are missing.
func (s *server) listen() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, at := range s.now.Load().Listen {
		if err := s.listenForDatagrams(at); err != nil {
			errs = append(errs, fmt.Errorf("%s cannot be listened at for UDP: %w", at, err))
		}
		if s.listeners[at] != nil {
			continue
		}
		l, err := listenTCP(at, s.now.Load().listenerOptions())
		if err != nil {
			errs = append(errs, fmt.Errorf("%s cannot be listened at: %w", at, err))
			continue
		}
		s.listeners[at] = l
		s.tasks.Go(func() { s.accept(at, l) })
	}
	return errors.Join(errs...)
}

// control sets options of a socket that is not bound yet.
type control = func(network, address string, raw syscall.RawConn) error

// listenerOptions are those of the sockets that listen. What is accepted has them, too:
// nobody has to set keepalive each time.
func (s *settings) listenerOptions() control {
	if slices.Contains(s.Protocols, config.Transparent) {
		return captured
	}
	return keepalive
}

// captured is for a listener to which connections are led that want to go elsewhere. By
// the mark, which not everybody may set, it is known as one of ours. A socket that is
// transparent takes connections to addresses that this host has not. Who may neither
// takes what a REDIRECT leads here.
func captured(network, address string, raw syscall.RawConn) error {
	failed := raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, host.ProxyMark)
		_ = transparent(int(fd), network)
	})
	return errors.Join(failed, keepalive(network, address, raw))
}

// transparent lets a socket have addresses that this host has not.
func transparent(fd int, network string) error {
	if strings.HasSuffix(network, "4") {
		return unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1)
	}
	return unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)
}

func listenTCP(at netip.AddrPort, options control) (*net.TCPListener, error) {
	c := net.ListenConfig{KeepAlive: -1, Control: options}
	c.SetMultipathTCP(false) // what is spliced has to be plain TCP
	l, err := c.Listen(context.Background(), network("tcp", at.Addr()), at.String())
	if err != nil {
		return nil, err
	}
	return l.(*net.TCPListener), nil
}

// network has an address mean itself: 0.0.0.0 is every IPv4 address and nothing else.
func network(name string, a netip.Addr) string {
	if a.Is4() {
		return name + "4"
	}
	return name + "6"
}

func (s *server) intact() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now.Load()
	for _, at := range now.Listen {
		if s.listeners[at] == nil || now.UDP && s.datagrams[at] == nil {
			return false
		}
	}
	return true
}

// shut lets nobody new in.
func (s *server) shut() {
	defer s.endDatagrams(func(netip.AddrPort) bool { return true })
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for at, l := range s.listeners {
		l.Close()
		delete(s.listeners, at)
	}
	s.changed.Broadcast()
}

// drain lets nobody new in, and waits as long as it may for those who are.
func (s *server) drain() {
	s.shut()
	over := false
	limit := time.AfterFunc(s.now.Load().Drain, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		over = true
		s.changed.Broadcast()
	})
	defer limit.Stop()
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.n > 0 && !over {
		s.changed.Wait()
	}
}

// close ends the server and its connections.
func (s *server) close() {
	s.shut()
	s.stop()
	for _, w := range s.webs {
		w.Close()
	}
	s.tasks.Wait()
}

// maxPause bounds how long a listener pauses that is out of file descriptors.
const maxPause = time.Second

// accept takes clients until the listener is closed. What there is no room for waits in
// the kernel.
func (s *server) accept(at netip.AddrPort, l *net.TCPListener) {
	pause := time.Duration(0)
	for s.awaitRoom() {
		c, err := l.AcceptTCP()
		switch {
		case err == nil:
			pause = 0
			s.count()
			s.tasks.Go(func() { s.serve(c) })
		case errors.Is(err, net.ErrClosed):
			s.gone(at, l)
			return
		default:
			// Out of descriptors, or of memory: the next one fares no better at once.
			if pause == 0 {
				s.log.Warn("no client can be taken", "error", err)
			}
			pause = min(max(2*pause, 5*time.Millisecond), maxPause)
			if !sleep(s.ctx, pause) {
				return
			}
		}
	}
}

// gone notes that a listener is not there any more, whoever has closed it.
func (s *server) gone(at netip.AddrPort, l *net.TCPListener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.listeners[at] == l {
		delete(s.listeners, at)
	}
}

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// awaitRoom waits until there may be one more client. Several listeners may find the
// same room: there can be one more client than may be for each of them.
func (s *server) awaitRoom() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for !s.closed && s.n >= s.now.Load().MaxConnections {
		s.changed.Wait()
	}
	return !s.closed
}

// count counts a client.
func (s *server) count() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.n++
}

// leave counts a client back. The zero address is one that has never come.
func (s *server) leave(client netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.n--
	if client.IsValid() {
		if s.clients[client]--; s.clients[client] == 0 {
			delete(s.clients, client)
		}
	}
	s.changed.Broadcast()
}

// enter counts a client and reports whether it may come in.
func (s *server) enter(client netip.Addr) bool {
	now := s.now.Load()
	s.mu.Lock()
	defer s.mu.Unlock()
	// All processes of this host that know of no proxy have one address.
	if s.clients[client] >= now.MaxPerClient && (s.asks() || !s.plane.local.has(client)) {
		return false
	}
	s.clients[client]++
	return true
}

// serve is one connection of a client, from the first byte to the last.
func (s *server) serve(c *net.TCPConn) {
	now := s.now.Load()
	from := addrPort(c.RemoteAddr())
	client := from.Addr()
	if !s.enter(client) {
		s.leave(netip.Addr{})
		relay.Abort(c)
		return
	}
	defer s.leave(client)
	if !permitted(now.Proxy, client) {
		relay.Abort(c)
		return
	}
	stop := context.AfterFunc(s.ctx, func() { relay.Abort(c) })
	defer stop()
	(&session{server: s, settings: now, conn: c, client: from, local: addrPort(c.LocalAddr()), zone: zoneOf(c.LocalAddr())}).run()
}

// keptSource returns the address of a client as which its targets are to be reached; the
// zero address: as this host.
func (s *settings) keptSource(client netip.Addr) netip.Addr {
	if !s.KeepSource || isInside(client) {
		return netip.Addr{}
	}
	return client
}

func permitted(p config.Proxy, client netip.Addr) bool {
	return !contains(p.Deny, client) && (len(p.Allow) == 0 || contains(p.Allow, client))
}

func addrPort(a net.Addr) netip.AddrPort {
	var ap netip.AddrPort
	switch a := a.(type) {
	case *net.TCPAddr:
		ap = a.AddrPort()
	case *net.UDPAddr:
		ap = a.AddrPort()
	}
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}

// zoneOf returns the zone of a link-local address: without it nobody can be answered there.
func zoneOf(a net.Addr) string {
	if t, ok := a.(*net.TCPAddr); ok {
		return t.Zone
	}
	return ""
}

// asks reports whether clients say where they want to go.
func (s *server) asks() bool {
	p := s.now.Load().Protocols
	return !slices.Contains(p, config.Transparent) && !slices.Contains(p, config.Fixed)
}

// listensAt reports whether one of the listeners is meant by an address.
func (s *server) listensAt(to target) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.listeners {
		at := addrPort(l.Addr())
		if at.Port() != to.Port {
			continue
		}
		if at.Addr() == to.IP || at.Addr().IsUnspecified() && s.plane.local.has(to.IP) || to.IP.IsUnspecified() && at.Addr().IsLoopback() {
			return true
		}
	}
	return false
}

// localAddresses are the addresses of this host, read again when they are asked for a
// while later.
type localAddresses struct {
	mu   sync.Mutex
	read time.Time
	all  map[netip.Addr]bool
}

// localFor is how long they are taken for right.
const localFor = time.Second

func (l *localAddresses) has(a netip.Addr) bool {
	if a.IsLoopback() || a.IsUnspecified() {
		return true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Since(l.read) > localFor {
		l.read = time.Now()
		l.all, _ = host.Addresses() // on an error there is none
	}
	return l.all[a]
}

// originalAddress returns where a connection went before a firewall led it here.
func originalAddress(c *net.TCPConn) (netip.AddrPort, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, err
	}
	var to netip.AddrPort
	var failed error
	err = raw.Control(func(fd uintptr) { to, failed = originalOf(int(fd), addrPort(c.LocalAddr())) })
	if err == nil {
		err = failed
	}
	return to, err
}

// originalOf asks conntrack (SO_ORIGINAL_DST; IP6T_SO_ORIGINAL_DST has the same number).
// A connection that was not translated is what TPROXY leads here: its own address is
// where it went.
func originalOf(fd int, local netip.AddrPort) (netip.AddrPort, error) {
	if local.Addr().Is4() {
		// struct sockaddr_in is no longer than the first part of what this call reads.
		r, err := unix.GetsockoptIPv6Mreq(fd, unix.IPPROTO_IP, unix.SO_ORIGINAL_DST)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOPROTOOPT) {
			return local, nil
		}
		if err != nil {
			return netip.AddrPort{}, err
		}
		a := r.Multiaddr // family, port and address in network order
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(a[4:8])), uint16(a[2])<<8|uint16(a[3])), nil
	}
	r, err := unix.GetsockoptIPv6MTUInfo(fd, unix.IPPROTO_IPV6, unix.SO_ORIGINAL_DST)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOPROTOOPT) {
		return local, nil
	}
	if err != nil {
		return netip.AddrPort{}, err
	}
	port := r.Addr.Port<<8 | r.Addr.Port>>8
	return netip.AddrPortFrom(netip.AddrFrom16(r.Addr.Addr).Unmap(), port), nil
}
