package socket_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/actor"
	"github.com/pentad/pentad/plane/socket"
)

func init() {
	clients["lives"] = lives
	clients["hold all"] = holdAll
}

// The services of the in-flight tests: TCP and UDP over both families, one whose
// backend refuses, and one whose backend has no route.
const livesServices = `services:
- name: web
  listen: [192.0.2.1:80, "[2001:db8:f::1]:80", 192.0.2.1:53/udp, "[2001:db8:f::1]:53/udp"]
  health: {probe: none}
  backends: [10.0.0.1:7000, 10.0.0.2:7000, "[2001:db8::1]:7000"]
- name: shut
  listen: [192.0.2.5:80]
  health: {probe: none}
  breaker: {failures: 100, ejection: 10ms}
  backends: [10.0.0.1:7]
- name: nowhere
  listen: [192.0.2.6:80]
  health: {probe: none}
  backends: [10.99.0.1:80]`

var (
	vipNowhere = netip.MustParseAddrPort("192.0.2.6:80")
	vipMapped  = netip.MustParseAddrPort("[::ffff:192.0.2.1]:80")
)

// ends are the ways in which the life of a socket goes on after it was made; each
// returns with the socket closed or leaves it to close.
var ends = []struct {
	name string
	live func(fd int) error
}{
	{"close", func(int) error { return nil }},
	{"reset", func(fd int) error {
		return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	}},
	{"shutdown", func(fd int) error { return ignore(unix.Shutdown(fd, unix.SHUT_RDWR), unix.ENOTCONN) }},
	{"disconnect", disconnect},
	{"disconnect and connect again", func(fd int) error {
		return all(func() error { return disconnect(fd) }, func() error { return connectAgain(fd) })
	}},
	{"a child holds it longer", func(fd int) error {
		child := exec.Command("sleep", "0.01")
		child.ExtraFiles = []*os.File{os.NewFile(uintptr(dup(fd)), "socket")}
		defer child.ExtraFiles[0].Close()
		if err := child.Start(); err != nil {
			return err
		}
		go func() { _ = child.Wait() }()
		return nil
	}},
	{"talk", func(fd int) error {
		if _, err := unix.Write(fd, []byte("x")); err != nil {
			return ignore(err, unix.ECONNREFUSED, unix.ENOTCONN, unix.EPIPE, unix.EAGAIN)
		}
		return nil
	}},
}

func dup(fd int) int {
	other, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return -1
	}
	return other
}

func connectAgain(fd int) error {
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return err
	}
	kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return err
	}
	to := map[[2]int]netip.AddrPort{
		{unix.AF_INET, unix.SOCK_STREAM}: vipTCP, {unix.AF_INET6, unix.SOCK_STREAM}: vipTCP6,
		{unix.AF_INET, unix.SOCK_DGRAM}: vipUDP, {unix.AF_INET6, unix.SOCK_DGRAM}: vipUDP6,
	}[[2]int{domain, kind}]
	return ignore(unix.Connect(fd, sockaddr(to)), unix.EINPROGRESS, unix.EINTR, unix.EALREADY, unix.EADDRNOTAVAIL)
}

func ignore(err error, expected ...error) error {
	for _, e := range expected {
		if errors.Is(err, e) {
			return nil
		}
	}
	return err
}

// beginnings are the ways in which a socket gets its connection.
var beginnings = []struct {
	name     string
	to       netip.AddrPort
	kind     int
	protocol int
	expect   error
}{
	{"tcp", vipTCP, unix.SOCK_STREAM, 0, nil},
	{"tcp, not waiting", vipTCP, unix.SOCK_STREAM | unix.SOCK_NONBLOCK, 0, unix.EINPROGRESS},
	{"tcp6", vipTCP6, unix.SOCK_STREAM, 0, nil},
	{"mapped", vipMapped, unix.SOCK_STREAM, 0, nil},
	{"mptcp", vipTCP, unix.SOCK_STREAM, unix.IPPROTO_MPTCP, nil},
	{"udp", vipUDP, unix.SOCK_DGRAM, 0, nil},
	{"udp6", vipUDP6, unix.SOCK_DGRAM, 0, nil},
	{"refused", vipShut, unix.SOCK_STREAM, 0, unix.ECONNREFUSED},
	{"refused, not waiting", vipShut, unix.SOCK_STREAM | unix.SOCK_NONBLOCK, 0, unix.EINPROGRESS},
	{"no route", vipNowhere, unix.SOCK_STREAM, 0, unix.ENETUNREACH},
}

// lives makes sockets of every beginning with every end, by lot, on several
// threads, until its standard input ends or it is killed.
func lives([]string) error {
	done := make(chan struct{})
	go func() {
		_, _ = os.Stdin.Read(make([]byte, 1))
		close(done)
	}()
	var tasks sync.WaitGroup
	failed := make(chan error, 100)
	for range 8 {
		tasks.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				if err := life(rand.IntN(len(beginnings)), rand.IntN(len(ends))); err != nil {
					failed <- err
					return
				}
			}
		})
	}
	tasks.Wait()
	close(failed)
	return <-failed
}

func life(b, e int) error {
	beginning, end := beginnings[b], ends[e]
	fd, err := dial(beginning.kind, beginning.protocol, beginning.to)
	if fd < 0 {
		return err
	}
	defer unix.Close(fd)
	// The backend that refuses is ejected now and then, or trusted all the same.
	if err := ignore(err, beginning.expect, unix.ECONNREFUSED, unix.EINTR); err != nil {
		return fmt.Errorf("%s: %w", beginning.name, err)
	}
	// A socket that went to a mapped address cannot go to another one (net/ipv6/tcp_ipv6.c).
	if beginning.expect != nil || beginning.protocol == unix.IPPROTO_MPTCP || beginning.to == vipMapped {
		return nil
	}
	if err := end.live(fd); err != nil {
		return fmt.Errorf("%s, %s: %w", beginning.name, end.name, err)
	}
	return nil
}

// holdAll makes N sockets of each of a few kinds, says so, and holds them until it
// is killed.
func holdAll(args []string) error {
	n, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	for range n {
		for _, b := range beginnings {
			if b.expect != nil {
				continue
			}
			if _, err := dial(b.kind, b.protocol, b.to); err != nil {
				return fmt.Errorf("%s: %w", b.name, err)
			}
		}
	}
	fmt.Println("holding")
	_, _ = os.Stdin.Read(make([]byte, 1))
	return nil
}

// inFlight sums what is in flight to the backends of a service.
func inFlight(v *socket.View, name string) int {
	n := 0
	for _, l := range v.Loads[name] {
		n += int(l.InFlight)
	}
	return n
}

// However sockets live and die, what is in flight is exact: as many as are held,
// and none when all are gone.
func TestInFlight(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.2", "2001:db8::1")
	w.Serve("one", "10.0.0.1:7000", "[2001:db8::1]:7000")
	w.Serve("two", "10.0.0.2:7000")
	w.RunAgent(livesServices)
	length := 10 * time.Second
	if testing.Short() {
		length = 2 * time.Second
	}
	soak := actor.Command("lives")
	stop, err := soak.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	p, err := w.Start(soak, lab.Inside)
	if err != nil {
		t.Fatal(err)
	}
	// Others are killed in the middle of it, and so is the agent.
	for end := time.Now().Add(length); time.Now().Before(end); {
		victim := actor.Command("lives")
		if _, err := victim.StdinPipe(); err != nil {
			t.Fatal(err)
		}
		v, err := w.Start(victim, lab.Inside)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(100+rand.IntN(300)) * time.Millisecond)
		v.Kill()
		w.Agent.Kill()
		w.Agent = w.Launch()
		w.Ready()
	}
	stop.Close()
	if err := p.Wait(); err != nil {
		t.Errorf("lives: %v: %s", err, p.Log)
	}
	w.atRest()
	v := w.View()
	var made, failed uint64
	for _, loads := range v.Loads {
		for _, l := range loads {
			made, failed = made+l.Connections, failed+l.Failed
		}
	}
	t.Logf("%d connections, %d failed, nothing in flight", made, failed)
	w.Eventually("no socket is remembered", func() error {
		if n := remembered(t, w); n != 0 {
			return fmt.Errorf("%d are, though all are closed", n)
		}
		return nil
	})

	const each = 20
	hold := actor.Command("hold all", fmt.Sprint(each))
	if _, err := hold.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	holder, err := w.Start(hold, lab.Inside)
	if err != nil {
		t.Fatal(err)
	}
	w.Eventually("the sockets are held", func() error {
		if !strings.Contains(holder.Log.String(), "holding") {
			return errors.New(holder.Log.String())
		}
		return nil
	})
	kinds := 0
	for _, b := range beginnings {
		if b.expect == nil {
			kinds++
		}
	}
	if n := inFlight(w.View(), "web"); n != each*kinds {
		t.Errorf("%d sockets are held, %d are in flight", each*kinds, n)
	}
	holder.Kill()
	w.atRest()
}

// A socket that is disconnected and lives on is counted back, too: of TCP at once,
// with the agent dead, of UDP by the agent.
func TestDisconnected(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	for _, kind := range []string{"tcp", "udp"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			disconnectedIsCountedBack(t, kind)
		})
	}
}

func disconnectedIsCountedBack(t *testing.T, kind string) {
	t.Helper()
	w := newWorld(t, "10.0.0.1", "10.0.0.2", "2001:db8::1")
	w.Serve("one", "10.0.0.1:7000", "[2001:db8::1]:7000")
	w.RunAgent(livesServices)
	if kind == "tcp" {
		w.Agent.Kill()
	}
	holder := actor.Command("hold disconnected", kind)
	if _, err := holder.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Start(holder, lab.Inside); err != nil {
		t.Fatal(err)
	}
	w.Eventually("the socket is made", func() error {
		for _, l := range w.View().Loads["web"] {
			if l.Connections > 0 {
				return nil
			}
		}
		return errors.New("no connection yet")
	})
	w.atRest()
}

func init() { clients["hold disconnected"] = holdDisconnected }

func holdDisconnected(args []string) error {
	kind, to := unix.SOCK_DGRAM, vipUDP
	if args[0] == "tcp" {
		kind, to = unix.SOCK_STREAM, vipTCP
	}
	fd, err := dial(kind, 0, to)
	if err != nil {
		return err
	}
	if err := disconnect(fd); err != nil {
		return err
	}
	_, _ = os.Stdin.Read(make([]byte, 1))
	return nil
}
