package socket_test

import (
	"errors"
	"fmt"
	"math"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/actor"
)

// nobody is a user without any privilege.
const nobody = 65534

// attacks are what a process without privileges does to a service, or suffers from
// it. Each makes connects that fail, or holds what is no connection.
var attacks = map[string]func(to netip.AddrPort) error{
	"no network":       func(to netip.AddrPort) error { return elsewhere("connects", to) },
	"MPTCP no network": func(to netip.AddrPort) error { return elsewhere("MPTCP connects", to) },
	"own network":      func(to netip.AddrPort) error { return elsewhere("own network", to) },
	"port taken":       portTaken,
	"IPv6 only":        ipv6Only,
	"fast open":        deferredConnects,
	"filtered":         func(to netip.AddrPort) error { return failConnects(0, to) },
}

func init() {
	clients["attack"] = attack
	clients["connects"] = func(args []string) error { return failConnects(0, netip.MustParseAddrPort(args[0])) }
	clients["MPTCP connects"] = func(args []string) error {
		return failConnects(unix.IPPROTO_MPTCP, netip.MustParseAddrPort(args[0]))
	}
	clients["own network"] = ownNetwork
	clients["holds"] = holdNothing
}

// becomeNobody gives all privileges away.
func becomeNobody() error {
	err := errors.Join(syscall.Setgroups(nil), syscall.Setresgid(nobody, nobody, nobody), syscall.Setresuid(nobody, nobody, nobody))
	if err != nil {
		return err
	}
	// So that a child may have a user namespace.
	return unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0)
}

func attack(args []string) error {
	if err := becomeNobody(); err != nil {
		return err
	}
	return attacks[args[0]](netip.MustParseAddrPort(args[1]))
}

// elsewhere plays a role in a user and a network namespace of this user's own.
func elsewhere(name string, to netip.AddrPort) error {
	cmd := actor.Command(name, to.String())
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: nobody, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: nobody, Size: 1}},
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, out)
	}
	fmt.Print(string(out))
	return nil
}

// failConnects connects a dozen times and says how that ended.
func failConnects(protocol int, to netip.AddrPort) error {
	ends := make(map[string]int)
	for range 12 {
		fd, err := unix.Socket(familyOf(to), unix.SOCK_STREAM|unix.SOCK_CLOEXEC, protocol)
		if err != nil {
			return err
		}
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Usec: 300_000}); err != nil {
			return err
		}
		ends[fmt.Sprint(unix.Connect(fd, sockaddr(to)))]++
		unix.Close(fd)
	}
	fmt.Println(ends)
	if ends["<nil>"] > 0 {
		return errors.New("connects succeeded that were to fail")
	}
	return nil
}

// ownNetwork has the addresses of the backends, and nobody there who answers.
func ownNetwork(args []string) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	for _, a := range []string{"10.0.0.1/32", "10.0.0.2/32"} {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(lo, addr); err != nil {
			return err
		}
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	return failConnects(0, netip.MustParseAddrPort(args[0]))
}

// portTaken connects from one port again and again, while a connection has it.
func portTaken(to netip.AddrPort) error {
	taken := 0
	port := 0
	for range 40 {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return err
		}
		if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{10, 0, 0, 3}, Port: port}); err != nil {
			return err
		}
		sa, err := unix.Getsockname(fd)
		if err != nil {
			return err
		}
		port = int(addrPort(sa).Port())
		if err := unix.Connect(fd, sockaddr(to)); errors.Is(err, unix.EADDRNOTAVAIL) {
			taken++
		} else if err != nil {
			return err
		}
		// It stays open until the process ends.
	}
	fmt.Println(taken, "times the port was taken")
	if taken < 10 {
		return errors.New("the attack does not work")
	}
	return nil
}

// ipv6Only is a socket that cannot connect to where it is sent.
func ipv6Only(to netip.AddrPort) error {
	mapped := netip.AddrPortFrom(netip.AddrFrom16(to.Addr().As16()), to.Port())
	for range 12 {
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			return err
		}
		if err := unix.Connect(fd, sockaddr(mapped)); err == nil {
			return errors.New("the attack does not work")
		}
		unix.Close(fd)
	}
	return nil
}

// deferred connects, and sends nothing: not even a SYN (TCP_FASTOPEN_CONNECT and
// TCP_FASTOPEN_NO_COOKIE, linux/tcp.h).
func deferred(to netip.AddrPort) (int, error) {
	const noCookie = 34
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	return fd, errors.Join(
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1),
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, noCookie, 1),
		unix.Connect(fd, sockaddr(to)))
}

func deferredConnects(to netip.AddrPort) error {
	for range 12 {
		fd, err := deferred(to)
		if err != nil {
			return err
		}
		unix.Close(fd)
	}
	return nil
}

const trusting = `services:
- name: web
  listen: [192.0.2.10:80, 192.0.2.10:80/udp]
  balance: random
  health: {probe: none}
  breaker: {failures: 3, ejection: 30s, maxEjected: 100%, maxConnections: 50}
  connect: {timeout: 50ms}
  backends: [10.0.0.1:7000, 10.0.0.2:7000]
- name: sticky
  listen: [192.0.2.12:80]
  affinity: {timeout: 1h}
  health: {probe: none}
  breaker: {failures: 3, ejection: 30s, maxEjected: 100%}
  connect: {timeout: 50ms}
  backends: [10.0.0.1:7000, 10.0.0.2:7000]`

// trustingWorld has a service of two servers that are well.
func trustingWorld(t *testing.T) *world {
	t.Helper()
	w := newWorld(t, "10.0.0.1", "10.0.0.2", "10.0.0.3")
	w.Serve("one", "10.0.0.1:7000")
	w.Serve("two", "10.0.0.2:7000")
	w.RunAgent(trusting)
	return w
}

// honest fails the test unless another user is served as if nothing had happened.
func (w *world) honest() {
	w.T.Helper()
	if a := w.Answers("192.0.2.10:80", 40); a["one"]+a["two"] != 40 || a["one"] == 0 || a["two"] == 0 {
		w.T.Errorf("an honest client had the answers %v", a)
	}
}

// Whatever connects of one user come to, others are served as before, and nothing is
// held against a backend that did not do it.
func TestLocalBlame(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	for _, agent := range []string{"alive", "dead"} {
		for name := range attacks {
			if name == "filtered" {
				continue
			}
			t.Run(strings.ReplaceAll(name, " ", "-")+"-agent-"+agent, func(t *testing.T) {
				t.Parallel()
				w := trustingWorld(t)
				if agent == "dead" {
					w.Agent.Kill()
				}
				t.Log(w.Client("attack", name, "192.0.2.10:80"))
				for addr, l := range w.View().Loads["web"] {
					if l.Shunned || l.Ejected && name != "own network" {
						t.Errorf("%s is %+v", addr, l)
					}
				}
				w.honest()
				w.atRest()
			})
		}
	}
}

// A packet filter that means one user leaves the others alone: he alone is kept from
// the backends that he cannot reach.
func TestFilteredUser(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	for _, c := range []struct {
		name  string
		reset bool
	}{{"dropped", false}, {"reset", true}} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := trustingWorld(t)
			session := w.Answers("192.0.2.12:80", 5)
			if len(session) != 1 {
				t.Fatalf("a session goes to %v", session)
			}
			if err := w.Deny(nobody, c.reset); err != nil {
				t.Fatal(err)
			}
			t.Log(w.Client("attack", "filtered", "192.0.2.10:80"), w.Client("attack", "filtered", "192.0.2.12:80"))
			clients := 0
			for addr, l := range w.View().Loads["web"] {
				if l.Shunned {
					t.Errorf("all others avoid %s: %+v", addr, l)
				}
				clients = max(clients, l.Clients)
			}
			if clients != 1 {
				t.Errorf("backends are ejected for %d clients, want 1", clients)
			}
			w.honest()
			// Not less of it either: 14 standard deviations.
			if a := w.Answers("192.0.2.10:80", 400); a["one"] < 60 || a["two"] < 60 {
				t.Errorf("of 400 connections of others %v", a)
			}
			again := w.Answers("192.0.2.12:80", 5)
			for who := range session {
				if again[who] != 5 {
					t.Errorf("a session of another user went to %v, and now to %v", session, again)
				}
			}
			w.atRest()
		})
	}
}

// Nobody connects more than once: what the first ones met with helps those after
// them, be they processes of many users or of one in many cgroups.
func TestManyClients(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	for _, many := range []string{"users", "cgroups"} {
		for _, balance := range []string{"least-latency", "source-hash"} {
			t.Run(many+"-"+balance, func(t *testing.T) {
				t.Parallel()
				w := newWorld(t, "10.0.0.1", "10.0.0.2")
				w.Serve("one", "10.0.0.1:7000")
				w.RunAgent("services: [{name: web, listen: [192.0.2.10:80], balance: " + balance + ", health: {probe: none}, backends: [10.0.0.1:7000, 10.0.0.2:7000]}]")
				w.Agent.Kill()
				const n = 100
				root, err := host.CgroupRoot()
				if err != nil {
					t.Fatal(err)
				}
				p, err := w.Start(actor.Command("many", many, filepath.Join(root, w.Scope()), "192.0.2.10:80", strconv.Itoa(n)), lab.Inside)
				if err != nil {
					t.Fatal(err)
				}
				if err := p.Wait(); err != nil {
					t.Fatalf("%v: %s", err, p.Log)
				}
				failed, err := strconv.Atoi(strings.TrimSpace(p.Log.String()))
				if err != nil {
					t.Fatal(err)
				}
				t.Logf("%d of %d failed", failed, n)
				// Two witnesses, and two more each time that the others have a try.
				if failed > 2+2 {
					t.Errorf("%d of %d connects failed", failed, n)
				}
				w.atRest()
			})
		}
	}
}

func init() {
	clients["many"] = many
	clients["one of many"] = oneOfMany
}

// many lets many processes connect, each once, and prints how many failed.
func many(args []string) error {
	kind, scope, to := args[0], args[1], args[2]
	n, err := strconv.Atoi(args[3])
	if err != nil {
		return err
	}
	failed := 0
	for i := range n {
		cgroup := filepath.Join(scope, fmt.Sprint("one-", i))
		uid := "0"
		if kind == "users" {
			cgroup, uid = scope, strconv.Itoa(20000+i)
		} else if err := os.Mkdir(cgroup, 0o755); err != nil {
			return err
		}
		cmd := actor.Command("one of many", cgroup, uid, to)
		if out, err := cmd.CombinedOutput(); err != nil {
			if !strings.Contains(string(out), "refused") {
				return fmt.Errorf("%w: %s", err, out)
			}
			failed++
		}
		if kind != "users" {
			if err := os.Remove(cgroup); err != nil {
				return err
			}
		}
	}
	fmt.Println(failed)
	return nil
}

// oneOfMany connects once, as a user and in a cgroup.
func oneOfMany(args []string) error {
	uid, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(args[0], "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0o600); err != nil {
		return err
	}
	if err := syscall.Setresuid(uid, uid, uid); err != nil {
		return err
	}
	fd, err := dial(unix.SOCK_STREAM, 0, netip.MustParseAddrPort(args[2]))
	if err != nil {
		return err
	}
	if firstLine(fd) == "" {
		return errors.New("no answer")
	}
	return nil
}

// holdNothing holds sockets that are no connections: UDP, deferred, and failed ones.
func holdNothing(args []string) error {
	if err := becomeNobody(); err != nil {
		return err
	}
	to := netip.MustParseAddrPort(args[0])
	for range 80 {
		if _, err := dial(unix.SOCK_DGRAM, 0, to); err != nil {
			return err
		}
		if _, err := deferred(to); err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		// Nobody comes from there to anywhere.
		if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_FREEBIND, 1); err != nil {
			return err
		}
		if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{203, 0, 113, 9}}); err != nil {
			return err
		}
		if err := unix.Connect(fd, sockaddr(to)); err == nil {
			return errors.New("a connect from a foreign address succeeded")
		}
	}
	fmt.Println("ready")
	select {}
}

// maxConnections counts connections: whatever else a user holds leaves room.
func TestHeldIsNoConnection(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := trustingWorld(t)
	p, err := w.Start(actor.Command("holds", "192.0.2.10:80"), lab.Inside)
	if err != nil {
		t.Fatal(err)
	}
	w.Eventually("all is held", func() error {
		select {
		case <-p.Done():
			t.Fatalf("it ended: %s", p.Log)
		default:
		}
		if !strings.Contains(p.Log.String(), "ready") {
			return errors.New("not yet")
		}
		return nil
	})
	w.honest()
	p.Kill()
	w.atRest()
}

// A dead backend never gets more than its share, and soon next to nothing: without a
// breaker written, without a probe, without an agent.
func TestShareOfDeadBackend(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	for _, fault := range []string{"refuses", "hangs up", "resets", "answers errors"} {
		for _, n := range []int{2, 4, 10} {
			for _, balance := range []string{"random", "least-connections", "least-latency", "source-hash"} {
				// All balances where it refuses; the others differ in what they are told.
				if fault != "refuses" && (n == 4 || balance != "least-latency" && balance != "random") ||
					fault == "answers errors" && balance != "least-latency" || n == 4 && balance != "least-latency" {
					continue
				}
				t.Run(fmt.Sprintf("%s-%d-%s", strings.ReplaceAll(fault, " ", "-"), n, balance), func(t *testing.T) {
					t.Parallel()
					shareOfDead(t, fault, n, balance)
				})
			}
		}
	}
}

func shareOfDead(t *testing.T, fault string, n int, balance string) {
	var addresses, good []string
	list := ""
	for i := 1; i <= n; i++ {
		a := fmt.Sprintf("10.0.0.%d", i)
		addresses = append(addresses, a)
		if i < n {
			good = append(good, a+":7000")
		}
		list += a + ":7000, "
	}
	w := newWorld(t, addresses...)
	w.StartServer(actor.Command("pages", append([]string{"200"}, good...)...), "ready")
	dead := netip.MustParseAddrPort(addresses[n-1] + ":7000")
	switch fault {
	case "hangs up", "resets":
		w.StartServer(actor.Command("hang up", dead.String(), strconv.FormatBool(fault == "resets")), "ready")
	case "answers errors":
		w.StartServer(actor.Command("pages", "500", dead.String()), "ready")
	}
	w.RunAgent("services:\n- name: web\n  listen: [192.0.2.10:80]\n  balance: " + balance + "\n  health: {probe: none}\n  backends: [" + list + "]\n")
	w.Agent.Kill()
	// The agent counts as alive for a few seconds more; nothing follows from it here.
	share := func(r actor.StormReport) float64 {
		bad := len(r.Failed)
		for who, times := range r.Answers {
			if !strings.HasSuffix(who, "fine") {
				bad += times
			}
		}
		return float64(bad) / float64(max(1, r.Attempts))
	}
	storm := func() actor.StormReport {
		end := w.startStorm("192.0.2.10:80", 1, time.Millisecond)
		time.Sleep(time.Second)
		return end()
	}
	first, later := storm(), storm()
	// Four standard deviations of a draw by lot.
	even := func(r actor.StormReport) float64 {
		p := 1 / float64(n)
		return p + 4*math.Sqrt(p*(1-p)/float64(max(1, r.Attempts)))
	}
	most, afterwards := 1/float64(n)+3/float64(max(1, first.Attempts)), 0.02
	if fault == "answers errors" {
		// It answers: all that can be had is that it is not preferred.
		most, afterwards = even(first), even(later)
	}
	if s := share(first); s > most {
		t.Errorf("%.3f in the first second, want at most %.3f: %v", s, most, first)
	}
	if s := share(later); s > afterwards {
		t.Errorf("%.3f after it, want at most %.3f: %v", s, afterwards, later)
	}
	if later.Attempts < 20 {
		t.Errorf("that was no test: %v", later)
	}
}

func init() {
	clients["pages"] = pages
	clients["hang up"] = hangUp
}

// pages serves HTTP: pages that take a while to make and have some length, or errors,
// which have neither.
func pages(args []string) error {
	status, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	for _, a := range args[1:] {
		l, err := net.Listen("tcp", a)
		if err != nil {
			return err
		}
		go http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			if status != http.StatusOK {
				w.WriteHeader(status)
				return
			}
			time.Sleep(5 * time.Millisecond)
			fmt.Fprintln(w, "fine"+strings.Repeat(" ", 3000))
		}))
	}
	fmt.Println("ready")
	select {}
}

// hangUp accepts connections and closes them at once, without a word or by a reset.
func hangUp(args []string) error {
	l, err := net.Listen("tcp", args[0])
	if err != nil {
		return err
	}
	fmt.Println("ready")
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		if args[1] == "true" {
			err = c.(*net.TCPConn).SetLinger(0)
		}
		if err = errors.Join(err, c.Close()); err != nil {
			return err
		}
	}
}
