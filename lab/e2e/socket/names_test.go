package socket_test

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/actor"
)

func init() {
	clients["all names"] = allNames
	clients["hold names"] = holdNames
}

// allNames sends to every VIP before it looks for the first answer: each comes from
// the VIP to which the question went.
func allNames(args []string) error {
	fd, err := udpSocket(unix.AF_INET)
	if err != nil {
		return err
	}
	return askAll(fd, args)
}

func askAll(fd int, vips []string) error {
	want := make(map[netip.AddrPort]bool)
	for _, text := range vips {
		vip := netip.MustParseAddrPort(text)
		want[vip] = true
		if err := unix.Sendto(fd, []byte("x"), 0, sockaddr(vip)); err != nil {
			return fmt.Errorf("sendto %s: %w", vip, err)
		}
	}
	b := make([]byte, 100)
	for range vips {
		_, sa, err := recvfrom(fd, b)
		if err != nil {
			return fmt.Errorf("recvfrom, %d are missing: %w", len(want), err)
		}
		from := addrPort(sa)
		if !want[from] {
			return fmt.Errorf("an answer from %s", from)
		}
		delete(want, from)
	}
	return nil
}

// holdNames has far more sockets with many names than the kernel keeps for one user.
func holdNames(args []string) error {
	const sockets = 1000
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 2 * sockets, Max: 2 * sockets}); err != nil {
		return err
	}
	if err := becomeNobody(); err != nil {
		return err
	}
	for range sockets {
		fd, err := udpSocket(unix.AF_INET)
		if err != nil {
			return err
		}
		for _, vip := range args {
			if err := unix.Sendto(fd, nil, 0, sockaddr(netip.MustParseAddrPort(vip))); err != nil {
				return fmt.Errorf("sendto %s: %w", vip, err)
			}
		}
	}
	fmt.Println("ready")
	select {}
}

// kept counts what one of the maps of names has.
func (w *world) kept(name string) (int, error) {
	paths, err := filepath.Glob(filepath.Join(w.Pins, "socket", "set-*", name))
	if err != nil || len(paths) != 1 {
		return 0, errors.Join(err, fmt.Errorf("pins of %s: %v", name, paths))
	}
	m, err := ebpf.LoadPinnedMap(paths[0], nil)
	if err != nil {
		return 0, err
	}
	defer m.Close()
	n := 0
	key, value := make([]byte, m.KeySize()), make([]byte, m.ValueSize())
	it := m.Iterate()
	for it.Next(&key, &value) {
		n++
	}
	return n, it.Err()
}

// What is kept of the names of one user's UDP sockets is bounded, and takes nothing
// from others.
func TestNamesAreShared(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	const backends = 30
	var addresses, servers, vips []string
	text := "services:"
	for i := range backends {
		addresses = append(addresses, fmt.Sprintf("10.0.1.%d", i+1))
		servers = append(servers, fmt.Sprintf("10.0.1.%d:7000", i+1))
		vips = append(vips, fmt.Sprintf("192.0.2.%d:53", i+1))
		text += fmt.Sprintf("\n- {name: s-%d, listen: [%s/udp], health: {probe: none}, backends: [%s]}", i, vips[i], servers[i])
	}
	w := newWorld(t, addresses...)
	w.Serve("one", servers...)
	w.RunAgent(text)
	w.Client("all names", vips...)
	p := w.holdNames(vips)
	n, err := w.kept("udp_more")
	if err != nil {
		t.Fatal(err)
	}
	const share = 1 << 15 / 4 // UDP_SHARE
	if n < share*9/10 || n > share {
		t.Errorf("%d entries are kept of one user, want up to %d", n, share)
	}
	w.Client("all names", vips...)
	if v := w.View(); v.Counters.Untracked != 0 {
		t.Errorf("%d sockets were not tracked", v.Counters.Untracked)
	}
	p.Kill()
	w.nothingKept()

	// Closed while nobody was told: the next agent finds out.
	p = w.holdNames(vips)
	w.Agent.Kill()
	l, err := link.LoadPinnedLink(filepath.Join(w.Pins, "socket", "links", "sock_release"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.(interface{ Detach() error }).Detach(); err != nil {
		t.Fatal(err)
	}
	l.Close()
	p.Kill()
	if n, err := w.kept("udp_more"); err != nil || n == 0 {
		t.Fatalf("%d entries are kept, %v", n, err)
	}
	w.Launch()
	w.Ready()
	w.nothingKept()
	w.Client("all names", vips...)
}

// holdNames starts a process that holds names, and waits until it does.
func (w *world) holdNames(vips []string) *lab.Process {
	w.T.Helper()
	p, err := w.Start(actor.Command("hold names", vips...), lab.Inside)
	if err != nil {
		w.T.Fatal(err)
	}
	w.Eventually("the names are held", func() error {
		select {
		case <-p.Done():
			w.T.Fatalf("it ended: %s", p.Log)
		default:
		}
		if !strings.Contains(p.Log.String(), "ready") {
			return errors.New("not yet")
		}
		return nil
	})
	return p
}

func (w *world) nothingKept() {
	w.T.Helper()
	w.Eventually("nothing is kept of sockets that are gone", func() error {
		more, err := w.kept("udp_more")
		if err == nil && more > 0 {
			err = fmt.Errorf("%d entries", more)
		}
		return err
	})
}

func init() { clients["reconnects"] = reconnects }

// reconnects connects a UDP socket of IPv6 to IPv4 servers again and again, and where
// that must fail, and looks from where an answer comes that was sent on the way: what
// it is sent to by its own name answers by that, all else by the VIP.
func reconnects([]string) error {
	to := map[string]netip.AddrPort{
		"vip": netip.MustParseAddrPort("[::ffff:192.0.2.1]:80"), "other": netip.MustParseAddrPort("[::ffff:192.0.2.3]:80"),
		"no":  netip.MustParseAddrPort("[2001:db8:f::3]:80"), // IPv6, from a socket that has an IPv4 address
		"own": netip.MustParseAddrPort("[::ffff:10.0.0.1]:7000"), "direct": netip.MustParseAddrPort("[::ffff:10.0.0.3]:7000"),
	}
	for _, sequence := range []string{
		"vip send other", "vip no send other", "direct vip no send other", "vip no send no other", "vip no send direct",
		"vip no send none", "vip send none", "vip send no", "vip no no send none",
		"vip no own send", "vip no own send direct", "vip no own send none", "vip send own send none",
	} {
		fd, err := udpSocket(unix.AF_INET6)
		if err != nil {
			return err
		}
		want := to["vip"]
		for _, step := range strings.Fields(sequence) {
			switch step {
			case "send":
				if err := unix.Send(fd, []byte("x"), 0); err != nil {
					return fmt.Errorf("%s: send: %w", sequence, err)
				}
				// Here before what comes next.
				if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 5000); err != nil {
					return err
				}
				continue
			case "none":
				_, _, err := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&unix.RawSockaddrInet6{})), unix.SizeofSockaddrInet6)
				if err != 0 {
					return fmt.Errorf("%s: disconnect: %w", sequence, err)
				}
				continue
			case "own":
				want = to["own"]
			}
			if err := unix.Connect(fd, sockaddr(to[step])); (err != nil) != (step == "no") {
				return fmt.Errorf("%s: connect(%s): %w", sequence, step, err)
			}
		}
		b := make([]byte, 100)
		_, sa, err := recvfrom(fd, b)
		if err != nil {
			return fmt.Errorf("%s: %w", sequence, err)
		}
		if addrPort(sa) != want {
			return fmt.Errorf("%s: an answer from %s, want %s", sequence, addrPort(sa), want)
		}
		unix.Close(fd)
	}
	return nil
}

// A socket that gets another peer, or not, knows by which name it reached the former.
func TestNamesAfterReconnects(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "10.0.0.3", "2001:db8::1")
	w.Serve("one", "10.0.0.1:7000")
	w.RunAgent(`services:
- {name: vip, listen: [192.0.2.1:80/udp], health: {probe: none}, backends: [10.0.0.1:7000]}
- {name: other, listen: [192.0.2.3:80/udp, "[2001:db8:f::3]:80/udp"], health: {probe: none}, backends: [10.0.0.1:9, "[2001:db8::1]:9"]}`)
	w.Client("reconnects")
}
