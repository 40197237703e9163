package bfd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Port is where control packets go over a single hop (RFC 5881, section 4).
const Port = 3784

// ErrPortTaken says that another program of this host speaks BFD.
var ErrPortTaken = fmt.Errorf("UDP port %d is taken: another program of this host speaks BFD", Port)

// Neighbor is who is watched, and from where.
type Neighbor struct {
	Address netip.Addr // a link-local one has its zone
	Source  netip.Addr // invalid: as the way to it has it
}

// Event is a session that is up, or is so no more.
type Event struct {
	Neighbor Neighbor
	Up       bool
	Why      Diagnostic // of one that is not up any more
	// OnPurpose says that it was taken down by somebody, here or there: the neighbour is
	// not gone because of that (RFC 5882, section 4.2).
	OnPurpose bool
}

// Report is how a session is.
type Report struct {
	Neighbor  Neighbor
	State     State
	Since     time.Time
	Why       Diagnostic
	Detection time.Duration // after which a silent neighbour is dead; 0: it says nothing at all
	Err       error         // why packets cannot be sent; may be nil
	Ups       uint64        // how often it came up
}

// Speaker has the sessions of this host. All packets are read and sent by one thread, so
// that none that is there already is overlooked when a neighbour seems to be late.
type Speaker struct {
	log    *slog.Logger
	events func(Event)
	wake   int // eventfd

	mu       sync.Mutex
	sessions map[Neighbor]*session
	closing  []*session
}

type session struct {
	*Session
	neighbor Neighbor
	settings Settings
	socket   int // -1: not open yet
	dialed   time.Time
	index    uint32 // of the interface by which the neighbour is reached; 0: by none
	err      error
	ups      uint64
}

// NewSpeaker returns a speaker without sessions. It calls events from its thread for
// each session that comes up or goes down.
func NewSpeaker(log *slog.Logger, events func(Event)) (*Speaker, error) {
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("BFD: %w", err)
	}
	return &Speaker{log: log, events: events, wake: wake, sessions: make(map[Neighbor]*session)}, nil
}

// Set makes the sessions those that are wanted. One whose settings are others begins anew.
func (s *Speaker) Set(wanted map[Neighbor]Settings) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for n, x := range s.sessions {
		if settings, ok := wanted[n]; !ok || settings != x.settings {
			delete(s.sessions, n)
			s.closing = append(s.closing, x)
		}
	}
	for n, settings := range wanted {
		if s.sessions[n] == nil {
			s.sessions[n] = &session{Session: NewSession(settings, s.discriminator(), time.Now(), rand.Float64), neighbor: n, settings: settings, socket: -1}
		}
	}
	s.poke()
}

// discriminator returns one that no session has.
func (s *Speaker) discriminator() uint32 {
	for {
		id := rand.Uint32()
		if id != 0 && s.find(id) == nil {
			return id
		}
	}
}

func (s *Speaker) find(id uint32) *session {
	for _, x := range s.sessions {
		if x.mine == id {
			return x
		}
	}
	return nil
}

func (s *Speaker) poke() { _, _ = unix.Write(s.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0}) }

// Reports says how every session is.
func (s *Speaker) Reports() []Report {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]Report, 0, len(s.sessions))
	for n, x := range s.sessions {
		state, since := x.State()
		all = append(all, Report{Neighbor: n, State: state, Since: since, Why: x.Diagnostic(), Detection: x.Detection(), Err: x.err, Ups: x.ups})
	}
	return all
}

// Run speaks until the context ends; then it says goodbye. The error says why it cannot
// listen.
func (s *Speaker) Run(ctx context.Context) error {
	runtime.LockOSThread()
	// Not unlocked: the thread ends with the goroutine, and its priority with it.
	// A busy machine must not look like a dead one. Who may not have it goes on without.
	_ = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), -20)
	var listeners []int
	defer func() {
		for _, l := range listeners {
			unix.Close(l)
		}
	}()
	for _, domain := range []int{unix.AF_INET, unix.AF_INET6} {
		l, err := listen(domain)
		if errors.Is(err, unix.EAFNOSUPPORT) && domain == unix.AF_INET6 {
			continue // a host without IPv6
		}
		if err != nil {
			return err
		}
		listeners = append(listeners, l)
	}
	stop := context.AfterFunc(ctx, s.poke)
	defer stop()
	for ctx.Err() == nil {
		s.await(listeners)
		for _, l := range listeners {
			s.drain(l)
		}
		s.tick()
	}
	s.Set(nil)
	s.tick()
	return nil
}

// Close frees what a speaker has that does not run.
func (s *Speaker) Close() { unix.Close(s.wake) }

// await waits for packets, for a change of the sessions, or until something is due.
func (s *Speaker) await(listeners []int) {
	fds := []unix.PollFd{{Fd: int32(s.wake), Events: unix.POLLIN}}
	for _, l := range listeners {
		fds = append(fds, unix.PollFd{Fd: int32(l), Events: unix.POLLIN})
	}
	var timeout *unix.Timespec // nil: for ever
	if at := s.deadline(); !at.IsZero() {
		t := unix.NsecToTimespec(int64(max(0, time.Until(at))))
		timeout = &t
	}
	_, _ = unix.Ppoll(fds, timeout, nil)
	var b [8]byte
	_, _ = unix.Read(s.wake, b[:])
}

func (s *Speaker) deadline() (first time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, x := range s.sessions {
		if at := x.Deadline(); !at.IsZero() && (first.IsZero() || at.Before(first)) {
			first = at
		}
	}
	return first
}

// maxAtOnce is how many packets are taken before it is looked what has to be sent: who
// floods the port keeps nobody from being watched.
const maxAtOnce = 4096

// drain takes all packets that are there.
func (s *Speaker) drain(listener int) {
	var b, control [256]byte
	for range maxAtOnce {
		n, cn, _, from, err := unix.Recvmsg(listener, b[:], control[:], unix.MSG_DONTWAIT)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return
		}
		// Who is not on this segment cannot send a packet that arrives with 255
		// (RFC 5881, section 5).
		ttl, index := arrivalOf(control[:cn])
		if ttl != 255 {
			continue
		}
		if p, err := Parse(b[:n]); err == nil {
			s.receive(p, addressOf(from), index)
		}
	}
}

func (s *Speaker) receive(p Packet, from netip.Addr, index uint32) {
	s.mu.Lock()
	x := s.match(p, from, index)
	if x == nil {
		s.mu.Unlock()
		return
	}
	before, _ := x.State()
	answer, answers := x.Receive(p, time.Now())
	if answers {
		x.send(answer)
	}
	event := x.changed(before)
	s.mu.Unlock()
	s.tell(event)
}

// match returns the session of a packet (RFC 5880, section 6.3). A packet for a session
// that is somebody else's, or that arrives elsewhere than its neighbour is (RFC 5881,
// section 3), is nobody's.
func (s *Speaker) match(p Packet, from netip.Addr, index uint32) *session {
	for n, x := range s.sessions {
		if n.Address == from && x.index == index && (p.Yours == 0 || p.Yours == x.mine) {
			return x
		}
	}
	return nil
}

// tick sends what is due and notices who is silent.
func (s *Speaker) tick() {
	var events []*Event
	s.mu.Lock()
	for _, x := range s.closing {
		before, _ := x.State()
		p := x.Close(time.Now())
		x.send(p)
		events = append(events, x.changed(before))
		x.hangUp()
	}
	s.closing = nil
	now := time.Now()
	for _, x := range s.sessions {
		before, _ := x.State()
		if p, sends := x.Tick(now); sends {
			x.send(p)
		}
		events = append(events, x.changed(before))
	}
	s.mu.Unlock()
	for _, e := range events {
		s.tell(e)
	}
}

func (s *Speaker) tell(e *Event) {
	if e == nil {
		return
	}
	if e.Up {
		s.log.Info("the neighbour is watched", "peer", e.Neighbor.Address)
	} else {
		s.log.Warn("the neighbour is not there any more", "peer", e.Neighbor.Address, "reason", e.Why)
	}
	s.events(*e)
}

// changed returns what has to be told of a session that was in another state before.
func (x *session) changed(before State) *Event {
	now, _ := x.State()
	if (now == Up) == (before == Up) {
		return nil
	}
	if now == Up {
		x.ups++
	} else {
		x.hangUp()
	}
	remote, heard := x.Remote()
	return &Event{Neighbor: x.neighbor, Up: now == Up, Why: x.Diagnostic(), OnPurpose: now == AdminDown || now == Down && heard && remote.State == AdminDown}
}

// send sends a packet. What fails is tried again with the next.
func (x *session) send(p Packet) {
	if p.State != Up && time.Since(x.dialed) > redial {
		x.hangUp()
	}
	if x.socket < 0 {
		if x.index, x.err = interfaceTo(x.neighbor.Address); x.err != nil {
			return
		}
		if x.socket, x.err = dial(x.neighbor); x.err != nil {
			return
		}
		x.dialed = time.Now()
	}
	_, err := unix.Write(x.socket, p.Append(nil))
	if err == nil || errors.Is(err, unix.ECONNREFUSED) { // nobody listens there yet
		x.err = nil
		return
	}
	// The address that it was sent from may have gone, or the route.
	x.err = fmt.Errorf("nothing can be sent to %s: %w", x.neighbor.Address, err)
	x.hangUp()
}

// redial is after how long a session that is not up looks for its way again: the address
// that it sends from may be another by now.
const redial = 5 * time.Second

func (x *session) hangUp() {
	if x.socket >= 0 {
		unix.Close(x.socket)
		x.socket = -1
	}
}

// listen opens the socket at which packets of one family arrive.
func listen(domain int) (int, error) {
	l, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, fmt.Errorf("BFD: %w", err)
	}
	if domain == unix.AF_INET {
		err = errors.Join(unix.SetsockoptInt(l, unix.IPPROTO_IP, unix.IP_RECVTTL, 1), unix.SetsockoptInt(l, unix.IPPROTO_IP, unix.IP_PKTINFO, 1), unix.Bind(l, &unix.SockaddrInet4{Port: Port}))
	} else {
		err = errors.Join(unix.SetsockoptInt(l, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1),
			unix.SetsockoptInt(l, unix.IPPROTO_IPV6, unix.IPV6_RECVHOPLIMIT, 1),
			unix.SetsockoptInt(l, unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1), unix.Bind(l, &unix.SockaddrInet6{Port: Port}))
	}
	if err == nil {
		return l, nil
	}
	unix.Close(l)
	if errors.Is(err, unix.EADDRINUSE) {
		return -1, ErrPortTaken
	}
	return -1, fmt.Errorf("BFD: %w", err)
}

// Ports that a session is sent from (RFC 5881, section 4).
const (
	firstSource = 49152
	sources     = 65536 - firstSource
)

// dial opens the socket from which packets go to a neighbour.
func dial(n Neighbor) (int, error) {
	domain := unix.AF_INET
	if n.Address.Is6() {
		domain = unix.AF_INET6
	}
	c, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	if err := prepare(c, n); err != nil {
		unix.Close(c)
		return -1, fmt.Errorf("there is no way to %s: %w", n.Address, err)
	}
	return c, nil
}

// prepare binds and connects a socket. Its packets are the first that a full queue of a
// device lets through: 7 is the priority of what keeps a network together.
func prepare(c int, n Neighbor) error {
	var err error
	if n.Address.Is4() {
		err = errors.Join(unix.SetsockoptInt(c, unix.IPPROTO_IP, unix.IP_TTL, 255), unix.SetsockoptInt(c, unix.IPPROTO_IP, unix.IP_TOS, 0xc0))
	} else {
		err = errors.Join(unix.SetsockoptInt(c, unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, 255), unix.SetsockoptInt(c, unix.IPPROTO_IPV6, unix.IPV6_TCLASS, 0xc0))
	}
	if err = errors.Join(err, unix.SetsockoptInt(c, unix.SOL_SOCKET, unix.SO_PRIORITY, 7)); err != nil {
		return err
	}
	start := rand.IntN(sources)
	for i := range 64 {
		err = unix.Bind(c, sockaddr(n.Source, n.Address, uint16(firstSource+(start+i)%sources)))
		if !errors.Is(err, unix.EADDRINUSE) {
			break
		}
	}
	if err != nil {
		return err
	}
	return unix.Connect(c, sockaddr(n.Address, n.Address, Port))
}

// sockaddr is an address of the family of like; an invalid one is any.
func sockaddr(a, like netip.Addr, port uint16) unix.Sockaddr {
	if like.Is4() {
		s := &unix.SockaddrInet4{Port: int(port)}
		if a.IsValid() {
			s.Addr = a.As4()
		}
		return s
	}
	s := &unix.SockaddrInet6{Port: int(port)}
	if a.IsValid() {
		s.Addr, s.ZoneId = a.As16(), zoneID(a.Zone())
	}
	return s
}
