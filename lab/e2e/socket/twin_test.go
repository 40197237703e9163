package socket_test

import (
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/actor"
)

// How long call sequences are tried, always the same ones, so that a change alone can
// make them differ; others, and for longer, by hand: PENTAD_TWINS=1h.
const (
	twinsFor  = 60 * time.Second
	twinsMost = 1200 // a minute's worth on a small machine
)

// Applications see no difference between a service and a server, but for the
// address: random sequences of calls on sockets, through VIPs and without, give the
// same results; and when all is over, nothing is in flight.
//
// Not beside others: it keeps all processors busy.
func TestTwins(t *testing.T) {
	lab.Need(t)
	duration, seed, most := twinsFor, uint64(1), uint64(twinsMost)
	if text := os.Getenv("PENTAD_TWINS"); text != "" {
		d, err := time.ParseDuration(text)
		if err != nil {
			t.Fatal(err)
		}
		duration, seed, most = d, rand.Uint64(), math.MaxUint64
	}
	if testing.Short() {
		duration /= 10
	}
	if text := os.Getenv("PENTAD_TWINS_SEED"); text != "" {
		n, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seed, duration = n, 0
	}
	// Who connects to an address of its own host does so from that address, and a network
	// namespace knows eight that MPTCP connects from (MPTCP_PM_ADDR_MAX): a socket that
	// connects a second time, from a ninth, meets EHOSTUNREACH. These are eight.
	var addresses, servers []string
	for _, a := range []string{"10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "2001:db8::1", "2001:db8::2", "2001:db8::3", "2001:db8::5"} {
		addresses, servers = append(addresses, a), append(servers, net.JoinHostPort(a, "7000"))
	}
	w := newWorld(t, addresses...)
	w.StartServer(actor.Command("echo", servers...), "ready")
	w.RunAgent(`services:
- name: a
  listen: [192.0.2.1:80, 192.0.2.1:80/udp, "[2001:db8:f::1]:80", "[2001:db8:f::1]:80/udp"]
  health: {probe: none}
  backends: [10.0.0.1:7000, 10.0.0.4:7000, "[2001:db8::1]:7000"]
- name: b
  listen: [192.0.2.2:80, 192.0.2.2:80/udp, "[2001:db8:f::2]:80", "[2001:db8:f::2]:80/udp"]
  health: {probe: none}
  balance: random
  backends: [10.0.0.2:7000, "[2001:db8::2]:7000", "[2001:db8::5]:7000"]
- name: dead
  listen: [192.0.2.3:80, 192.0.2.3:80/udp, "[2001:db8:f::3]:80", "[2001:db8:f::3]:80/udp"]
  health: {probe: none}
  backends: [10.0.0.1:9, "[2001:db8::1]:9"]
- name: away
  listen: [192.0.2.4:80, 192.0.2.4:80/udp, "[2001:db8:f::4]:80", "[2001:db8:f::4]:80/udp"]
  health: {probe: none}
  backends: [203.0.113.1:80, "[2001:db8:99::1]:80"]`)
	t.Logf("%s", w.Client("twins", strconv.FormatUint(seed, 10), duration.String(), strconv.FormatUint(most, 10)))
	w.atRest()
}

func init() {
	clients["twins"] = twins
	clients["echo"] = echo
}

// echo answers what it is told, over TCP and UDP.
func echo(addresses []string) error {
	for _, a := range addresses {
		l, err := net.Listen("tcp", a)
		if err != nil {
			return err
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					_, _ = io.Copy(c, c)
				}()
			}
		}()
		u, err := net.ListenPacket("udp", a)
		if err != nil {
			return err
		}
		go func() {
			b := make([]byte, 1500)
			for {
				n, from, err := u.ReadFrom(b)
				if err != nil {
					return
				}
				_, _ = u.WriteTo(b[:n], from)
			}
		}()
	}
	fmt.Println("ready")
	select {}
}

// twinPlaces are where a sequence can go to: a VIP, and what it stands for.
var twinPlaces = []struct {
	name            string
	vip, vip6       string
	server, server6 string
}{
	{"A", "192.0.2.1:80", "[2001:db8:f::1]:80", "10.0.0.1:7000", "[2001:db8::1]:7000"},
	{"B", "192.0.2.2:80", "[2001:db8:f::2]:80", "10.0.0.2:7000", "[2001:db8::2]:7000"},
	{"dead", "192.0.2.3:80", "[2001:db8:f::3]:80", "10.0.0.1:9", "[2001:db8::1]:9"},
	{"away", "192.0.2.4:80", "[2001:db8:f::4]:80", "203.0.113.1:80", "[2001:db8:99::1]:80"},
	{"direct", "10.0.0.3:7000", "[2001:db8::3]:7000", "10.0.0.3:7000", "[2001:db8::3]:7000"},
}

// twins tries sequences for some time, and so many at most, each through VIPs and without. With no time
// at all it tries one, and prints what it does.
func twins(args []string) error {
	seed, err := strconv.ParseUint(args[0], 10, 64)
	if err != nil {
		return err
	}
	duration, err := time.ParseDuration(args[1])
	if err != nil {
		return err
	}
	most, err := strconv.ParseUint(args[2], 10, 64)
	if err != nil {
		return err
	}
	if duration == 0 {
		fmt.Println(strings.Join(newTwin(seed, false, 100*time.Millisecond).run(), "\n"))
		return compareTwins(seed)
	}
	const workers = 4
	end := time.Now().Add(duration)
	var tasks sync.WaitGroup
	var mu sync.Mutex
	tried, found := 0, error(nil)
	for i := range uint64(workers) {
		tasks.Go(func() {
			for n := i; n < most && time.Now().Before(end); n += workers {
				err := compareTwins(seed + n)
				mu.Lock()
				tried++
				if err != nil && found == nil {
					found, end = err, time.Now()
				}
				mu.Unlock()
			}
		})
	}
	tasks.Wait()
	fmt.Println(tried, "sequences")
	return found
}

// compareTwins returns how a sequence differs through VIPs. What differs once may be
// late: it must differ each time, with more and more patience.
func compareTwins(seed uint64) error {
	var through, without []string
	for _, wait := range []time.Duration{20 * time.Millisecond, 100 * time.Millisecond, 500 * time.Millisecond, time.Second} {
		without = newTwin(seed, false, wait).run()
		through = newTwin(seed, true, wait).run()
		if slices.Equal(through, without) {
			return nil
		}
	}
	text := fmt.Sprintf("PENTAD_TWINS_SEED=%d differs:", seed)
	for i := range through {
		text += "\n  " + through[i]
		if through[i] != without[i] {
			text += "\n  without a VIP: " + without[i]
		}
	}
	return fmt.Errorf("%s", text)
}

// twin runs one sequence.
type twin struct {
	rng     *rand.Rand
	vip     bool
	wait    time.Duration
	sockets []*twinSocket
	sent    uint64
	log     []string
}

type twinSocket struct {
	fd     int
	number int
	six    bool
	udp    bool
}

func newTwin(seed uint64, vip bool, wait time.Duration) *twin {
	return &twin{rng: rand.New(rand.NewPCG(seed, 1)), vip: vip, wait: wait}
}

func (w *twin) run() []string {
	steps := 3 + w.rng.IntN(20)
	for range steps {
		w.step()
	}
	for _, s := range w.sockets {
		unix.Close(s.fd)
	}
	return w.log
}

func (w *twin) note(s *twinSocket, format string, args ...any) {
	w.log = append(w.log, fmt.Sprintf("%d: ", s.number)+fmt.Sprintf(format, args...))
}

// step is one call, or a few that belong together. Whatever its outcome, it takes
// the same numbers from the generator.
func (w *twin) step() {
	if len(w.sockets) == 0 || len(w.sockets) < 3 && w.rng.IntN(8) == 0 {
		w.open()
		return
	}
	i := w.rng.IntN(len(w.sockets))
	s := w.sockets[i]
	switch w.rng.IntN(20) {
	case 0, 1, 2, 3, 4:
		w.connect(s)
	case 5:
		w.disconnect(s)
	case 6, 7, 8:
		w.send(s)
	case 9, 10, 11, 12:
		w.sendTo(s)
	case 13, 14:
		w.receive(s)
	case 15, 16:
		w.name(s)
	case 17:
		w.pass(s)
	case 18:
		how := w.rng.IntN(3)
		w.note(s, "shutdown(%d): %v", how, unix.Shutdown(s.fd, how))
		if how != unix.SHUT_RD && !s.udp {
			// Until the server has closed its side, too: what the socket is then is its doing.
			time.Sleep(w.wait)
		}
	case 19:
		w.note(s, "close: %v", unix.Close(s.fd))
		w.sockets = slices.Delete(w.sockets, i, i+1)
	}
}

func (w *twin) open() {
	s := &twinSocket{number: len(w.log), six: w.rng.IntN(2) == 0}
	family, kind, protocol, what := unix.AF_INET, unix.SOCK_STREAM, 0, "TCP"
	if s.six {
		family = unix.AF_INET6
	}
	switch w.rng.IntN(7) {
	case 0, 1, 2:
		kind, what, s.udp = unix.SOCK_DGRAM, "UDP", true
	case 3:
		protocol, what = unix.IPPROTO_MPTCP, "MPTCP"
	}
	if w.rng.IntN(3) == 0 {
		kind |= unix.SOCK_NONBLOCK
		what += ", not blocking"
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		w.note(s, "socket(%s): %v", what, err)
		return
	}
	s.fd = fd
	option := w.rng.IntN(6)
	switch {
	case option == 0 && s.six:
		what += fmt.Sprint(", V6ONLY ", unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1))
	case option == 1 && !s.udp:
		const noCookie = 34 // TCP_FASTOPEN_NO_COOKIE (linux/tcp.h)
		what += fmt.Sprint(", FASTOPEN ", unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1),
			unix.SetsockoptInt(fd, unix.IPPROTO_TCP, noCookie, 1))
	case option == 2:
		what += fmt.Sprint(", bound ", unix.Bind(fd, w.any(s)))
	}
	// What blocks must not block for long.
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Sec: 2})
	w.note(s, "socket(%s), IPv6: %v", what, s.six)
	w.sockets = append(w.sockets, s)
}

func (w *twin) any(s *twinSocket) unix.Sockaddr {
	if s.six {
		return &unix.SockaddrInet6{}
	}
	return &unix.SockaddrInet4{}
}

// place draws where to go, in a form that fits the socket.
func (w *twin) place(s *twinSocket) (string, unix.Sockaddr) {
	p := twinPlaces[w.rng.IntN(len(twinPlaces))]
	mapped := w.rng.IntN(3) == 0
	four, six := p.server, p.server6
	if w.vip {
		four, six = p.vip, p.vip6
	}
	if !s.six {
		return p.name, sockaddr(netip.MustParseAddrPort(four))
	}
	if !mapped {
		return p.name + "(6)", sockaddr(netip.MustParseAddrPort(six))
	}
	a := netip.MustParseAddrPort(four)
	return p.name + "(mapped)", sockaddr(netip.AddrPortFrom(netip.AddrFrom16(a.Addr().As16()), a.Port()))
}

// called is the name of an address that the kernel told.
func (w *twin) called(sa unix.Sockaddr) string {
	a := addrPort(sa)
	form := "(6)"
	switch {
	case a.Addr().Is4():
		form = ""
	case a.Addr().Is4In6():
		form = "(mapped)"
	}
	plain := netip.AddrPortFrom(a.Addr().Unmap(), a.Port()).String()
	for _, p := range twinPlaces {
		shown := []string{p.server, p.server6}
		if w.vip {
			shown = []string{p.vip, p.vip6}
		}
		if slices.Contains(shown, plain) {
			return p.name + form
		}
	}
	return "somebody else, " + a.String()
}

// settle waits until what a call began has ended.
func (w *twin) settle(s *twinSocket) {
	_, _ = unix.Poll([]unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLOUT}}, int(w.wait.Milliseconds()))
}

// expect waits for an answer, and for those of others to come as well.
func (w *twin) expect(s *twinSocket) {
	_, _ = unix.Poll([]unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN}}, int(w.wait.Milliseconds()))
	time.Sleep(w.wait / 20)
}

func (w *twin) connect(s *twinSocket) {
	name, to := w.place(s)
	err := unix.Connect(s.fd, to)
	for err == unix.EINTR {
		w.settle(s)
		err = unix.Connect(s.fd, to)
	}
	w.note(s, "connect(%s): %v", name, err)
	w.settle(s)
}

func (w *twin) disconnect(s *twinSocket) {
	w.note(s, "connect(AF_UNSPEC): %v", disconnect(s.fd))
}

func (w *twin) message() []byte {
	w.sent++
	return fmt.Appendf(nil, "<%d>", w.sent)
}

func (w *twin) send(s *twinSocket) {
	err := unix.Send(s.fd, w.message(), unix.MSG_NOSIGNAL)
	w.note(s, "send: %v", err)
	if err == nil {
		w.expect(s)
	}
}

func (w *twin) sendTo(s *twinSocket) {
	name, to := w.place(s)
	if !s.udp {
		w.send(s)
		return
	}
	err := unix.Sendto(s.fd, w.message(), unix.MSG_NOSIGNAL, to)
	w.note(s, "sendto(%s): %v", name, err)
	if err == nil {
		w.expect(s)
	}
}

// receive takes all that is there. The order is that of the network.
func (w *twin) receive(s *twinSocket) {
	var all []string
	stream := ""
	for {
		b := make([]byte, 1500)
		n, from, err := unix.Recvfrom(s.fd, b, unix.MSG_DONTWAIT)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 {
			slices.Sort(all)
			w.note(s, "received %s%v, then %v", stream, all, err)
			return
		}
		if !s.udp {
			stream += string(b[:n])
			continue
		}
		all = append(all, string(b[:n])+" from "+w.called(from))
	}
}

func (w *twin) name(s *twinSocket) {
	pending, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_ERROR)
	peer := ""
	if sa, err := unix.Getpeername(s.fd); err != nil {
		peer = err.Error()
	} else {
		peer = w.called(sa)
	}
	w.note(s, "SO_ERROR %d %v, getpeername: %s", pending, err, peer)
}

// pass hands the socket over, as between processes, and closes what was handed over.
func (w *twin) pass(s *twinSocket) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		w.note(s, "socketpair: %v", err)
		return
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	if err := unix.Sendmsg(pair[0], []byte{0}, unix.UnixRights(s.fd), nil, 0); err != nil {
		w.note(s, "passing it: %v", err)
		return
	}
	unix.Close(s.fd)
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(pair[1], make([]byte, 1), oob, unix.MSG_CMSG_CLOEXEC)
	if err == nil {
		var messages []unix.SocketControlMessage
		if messages, err = unix.ParseSocketControlMessage(oob[:n]); err == nil {
			var fds []int
			if fds, err = unix.ParseUnixRights(&messages[0]); err == nil {
				s.fd = fds[0]
			}
		}
	}
	w.note(s, "passed: %v", err)
}
