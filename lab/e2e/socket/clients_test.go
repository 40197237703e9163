package socket_test

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/lab/actor"
)

// The services that the clients below expect; see TestSockets.
var (
	vipTCP   = netip.MustParseAddrPort("192.0.2.1:80")
	vipTCP6  = netip.MustParseAddrPort("[2001:db8:f::1]:80")
	vipUDP   = netip.MustParseAddrPort("192.0.2.1:53")
	vipUDP2  = netip.MustParseAddrPort("192.0.2.2:53")
	vipUDP6  = netip.MustParseAddrPort("[2001:db8:f::1]:53")
	vipTwice = netip.MustParseAddrPort("192.0.2.3:53") // the backend of vipUDP once more
	vipEmpty = netip.MustParseAddrPort("192.0.2.4:80")
	vipShut  = netip.MustParseAddrPort("192.0.2.5:80") // its backend refuses
	direct   = netip.MustParseAddrPort("10.0.0.3:7000")
	backend  = netip.MustParseAddrPort("10.0.0.1:7000") // of vipTCP and vipUDP
)

// clients look at what an application sees. They run inside, one process each.
var clients = map[string]actor.Role{
	"tcp names":              tcpNames,
	"refused at once":        refusedAtOnce,
	"tcp reconnect":          tcpReconnect,
	"udp disconnect":         udpDisconnect,
	"udp connected":          udpConnected,
	"udp many names at once": udpManyNames,
	"udp A and AAAA":         udpPair,
	"udp two names":          udpTwoNames,
	"udp direct after VIP":   udpDirectAfter,
	"udp mapped":             udpMapped,
	"udp sticks":             udpSticks,
	"udp more names":         udpMoreNames,
	"mptcp":                  mptcp,
	"fast open":              fastOpen,
	"crowd":                  crowd,
	"churn":                  churn,
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

func familyOf(a netip.AddrPort) int {
	if a.Addr().Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// dial connects a new socket. It never blocks for long.
func dial(kind, protocol int, to netip.AddrPort) (int, error) {
	fd, err := unix.Socket(familyOf(to), kind|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return -1, err
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
		return -1, err
	}
	return fd, unix.Connect(fd, sockaddr(to))
}

func peerIs(fd int, want netip.AddrPort) error {
	sa, err := unix.Getpeername(fd)
	if err != nil {
		return fmt.Errorf("getpeername: %w", err)
	}
	if have := addrPort(sa); have != want {
		return fmt.Errorf("getpeername says %s, want %s", have, want)
	}
	return nil
}

// recvfrom and read go on after a signal: with a time-out on the socket the kernel
// does not (signal(7)), and Go's scheduler sends itself signals.
func recvfrom(fd int, b []byte) (int, unix.Sockaddr, error) {
	for {
		if n, sa, err := unix.Recvfrom(fd, b, 0); err != unix.EINTR {
			return n, sa, err
		}
	}
}

func read(fd int, b []byte) (int, error) {
	for {
		if n, err := unix.Read(fd, b); err != unix.EINTR {
			return n, err
		}
	}
}

func receiveFrom(fd int, want netip.AddrPort) (string, error) {
	b := make([]byte, 1500)
	n, sa, err := recvfrom(fd, b)
	if err != nil {
		return "", fmt.Errorf("recvfrom, waiting for %s: %w", want, err)
	}
	if have := addrPort(sa); have != want {
		return "", fmt.Errorf("reply %q came from %s, want %s", b[:n], have, want)
	}
	return string(b[:n]), nil
}

func firstLine(fd int) string {
	b := make([]byte, 100)
	n, _ := read(fd, b)
	return strings.TrimSpace(string(b[:max(0, n)]))
}

func all(steps ...func() error) error {
	for i, step := range steps {
		if err := step(); err != nil {
			return fmt.Errorf("step %d: %w", i+1, err)
		}
	}
	return nil
}

func tcpNames([]string) error {
	for _, vip := range []netip.AddrPort{vipTCP, vipTCP6, mapped(vipTCP)} {
		fd, err := dial(unix.SOCK_STREAM, 0, vip)
		if err != nil {
			return fmt.Errorf("connect to %s: %w", vip, err)
		}
		if err := peerIs(fd, vip); err != nil {
			return err
		}
		if who := firstLine(fd); who != "one" {
			return fmt.Errorf("%s answered %q", vip, who)
		}
		unix.Close(fd)
	}
	return nil
}

func mapped(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16(a.Addr().As16()), a.Port())
}

func refusedAtOnce([]string) error {
	began := time.Now()
	for _, kind := range []int{unix.SOCK_STREAM, unix.SOCK_STREAM | unix.SOCK_NONBLOCK} {
		if _, err := dial(kind, 0, vipEmpty); err != unix.ECONNREFUSED {
			return fmt.Errorf("connect to a service without backends: %v, want ECONNREFUSED", err)
		}
	}
	udp := netip.AddrPortFrom(vipEmpty.Addr(), 53)
	if _, err := dial(unix.SOCK_DGRAM, 0, udp); err != unix.ECONNREFUSED {
		return fmt.Errorf("UDP connect to a service without backends: %v, want ECONNREFUSED", err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	if err := unix.Sendto(fd, []byte("x"), 0, sockaddr(udp)); err != unix.ECONNREFUSED {
		return fmt.Errorf("sendto a service without backends: %v, want ECONNREFUSED", err)
	}
	if d := time.Since(began); d > 5*time.Second {
		return fmt.Errorf("it took %s", d)
	}
	return nil
}

// A socket that was connected to a VIP and is connected elsewhere now must not
// keep the VIP's name.
func tcpReconnect([]string) error {
	// After a failed connect the same socket may be used again.
	fd, err := dial(unix.SOCK_STREAM, 0, vipShut)
	if err != unix.ECONNREFUSED {
		return fmt.Errorf("connect to a service whose backend refuses: %v", err)
	}
	return all(
		func() error { return unix.Connect(fd, sockaddr(direct)) },
		func() error { return peerIs(fd, direct) },
		// Disconnected by AF_UNSPEC, then to the VIP and away again.
		func() error { return disconnect(fd) },
		func() error { return unix.Connect(fd, sockaddr(vipTCP)) },
		func() error { return peerIs(fd, vipTCP) },
		func() error { return disconnect(fd) },
		func() error { return unix.Connect(fd, sockaddr(backend)) },
		func() error { return peerIs(fd, backend) },
	)
}

// disconnect connects to AF_UNSPEC, which x/sys has no type for.
func disconnect(fd int) error {
	var sa unix.RawSockaddr
	_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(rawPointer(&sa)), unsafeSize)
	if errno != 0 {
		return fmt.Errorf("connect to AF_UNSPEC: %w", errno)
	}
	return nil
}

func udpDisconnect([]string) error {
	fd, err := dial(unix.SOCK_DGRAM, 0, vipUDP)
	if err != nil {
		return err
	}
	return all(
		func() error { return peerIs(fd, vipUDP) },
		func() error { return disconnect(fd) },
		func() error { return unix.Sendto(fd, []byte("x"), 0, sockaddr(backend)) },
		func() error { _, err := receiveFrom(fd, backend); return err },
		func() error { return unix.Connect(fd, sockaddr(direct)) },
		func() error { return peerIs(fd, direct) },
		// Connected anew without a disconnect between.
		func() error { return unix.Connect(fd, sockaddr(vipUDP)) },
		func() error { return peerIs(fd, vipUDP) },
		func() error { return unix.Connect(fd, sockaddr(backend)) },
		func() error { return peerIs(fd, backend) },
	)
}

func udpConnected([]string) error {
	for _, vip := range []netip.AddrPort{vipUDP, vipUDP6, mapped(vipUDP)} {
		fd, err := dial(unix.SOCK_DGRAM, 0, vip)
		if err != nil {
			return fmt.Errorf("connect to %s: %w", vip, err)
		}
		if _, err := unix.Write(fd, []byte("x")); err != nil {
			return err
		}
		if _, err := receiveFrom(fd, vip); err != nil {
			return err
		}
		if err := peerIs(fd, vip); err != nil {
			return err
		}
	}
	return nil
}

func udpSocket(family int) (int, error) {
	fd, err := unix.Socket(family, unix.SOCK_DGRAM, 0)
	if err != nil {
		return -1, err
	}
	return fd, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5})
}

// One unconnected socket talks to several VIPs and to others at once.
func udpManyNames([]string) error {
	fd, err := udpSocket(unix.AF_INET)
	if err != nil {
		return err
	}
	for range 200 {
		want := map[netip.AddrPort]string{vipUDP: "one", vipUDP2: "two", direct: "three"}
		for to, who := range want {
			if err := unix.Sendto(fd, []byte(who), 0, sockaddr(to)); err != nil {
				return fmt.Errorf("sendto %s: %w", to, err)
			}
		}
		b := make([]byte, 100)
		for range len(want) {
			n, sa, err := recvfrom(fd, b)
			if err != nil {
				return fmt.Errorf("recvfrom, still waiting for %v: %w", want, err)
			}
			from := addrPort(sa)
			if who := want[from]; string(b[:n]) != who+" "+who {
				return fmt.Errorf("%q came from %s", b[:n], from)
			}
			delete(want, from)
		}
	}
	return nil
}

// What the glibc resolver does, with sockets of both kinds: two datagrams in one
// sendmmsg, both replies must come, from the VIP.
func udpPair([]string) error {
	for range 200 {
		for _, connected := range []bool{true, false} {
			fd, err := udpSocket(unix.AF_INET)
			if err != nil {
				return err
			}
			to := sockaddr(vipUDP)
			if connected {
				if err := unix.Connect(fd, to); err != nil {
					return err
				}
				to = nil
			}
			if err := sendmmsg(fd, to, "A", "AAAA"); err != nil {
				return err
			}
			var got []string
			for range 2 {
				text, err := receiveFrom(fd, vipUDP)
				if err != nil {
					return err
				}
				got = append(got, text)
			}
			if strings.Join(got, ",") != "one A,one AAAA" {
				return fmt.Errorf("replies %q", got)
			}
			unix.Close(fd)
		}
	}
	return nil
}

// Two names for one backend: nobody can tell the replies apart, the last wins.
func udpTwoNames([]string) error {
	fd, err := udpSocket(unix.AF_INET)
	if err != nil {
		return err
	}
	for range 10 {
		for _, vip := range []netip.AddrPort{vipUDP, vipTwice} {
			if err := unix.Sendto(fd, []byte("x"), 0, sockaddr(vip)); err != nil {
				return err
			}
			if _, err := receiveFrom(fd, vip); err != nil {
				return err
			}
		}
	}
	return nil
}

// A backend that the application then names itself is itself.
func udpDirectAfter([]string) error {
	fd, err := udpSocket(unix.AF_INET)
	if err != nil {
		return err
	}
	for _, to := range []netip.AddrPort{vipUDP, backend, vipUDP, backend} {
		if err := unix.Sendto(fd, []byte("x"), 0, sockaddr(to)); err != nil {
			return err
		}
		if _, err := receiveFrom(fd, to); err != nil {
			return err
		}
	}
	return nil
}

func udpMapped([]string) error {
	fd, err := udpSocket(unix.AF_INET6)
	if err != nil {
		return err
	}
	for range 10 {
		for _, vip := range []netip.AddrPort{mapped(vipUDP), mapped(vipUDP2), vipUDP6} {
			if err := unix.Sendto(fd, []byte("x"), 0, sockaddr(vip)); err != nil {
				return err
			}
			if _, err := receiveFrom(fd, vip); err != nil {
				return err
			}
		}
	}
	return nil
}

// The datagrams of one socket go to one backend, as those of a QUIC connection
// must. The argument is a VIP with several backends.
func udpSticks(args []string) error {
	vip := netip.MustParseAddrPort(args[0])
	seen := make(map[string]bool)
	for range 40 {
		fd, err := udpSocket(unix.AF_INET)
		if err != nil {
			return err
		}
		first := ""
		for range 20 {
			if err := unix.Sendto(fd, []byte("x"), 0, sockaddr(vip)); err != nil {
				return err
			}
			text, err := receiveFrom(fd, vip)
			if err != nil {
				return err
			}
			if first == "" {
				first = text
			}
			if text != first {
				return fmt.Errorf("%q after %q on one socket", text, first)
			}
		}
		seen[first] = true
		unix.Close(fd)
	}
	if len(seen) < 2 {
		return fmt.Errorf("40 sockets reached only %v", seen)
	}
	return nil
}

// One socket that uses more names than it can remember goes on working.
func udpMoreNames(args []string) error {
	fd, err := udpSocket(unix.AF_INET)
	if err != nil {
		return err
	}
	for round := range 3 {
		for _, text := range args {
			vip := netip.MustParseAddrPort(text)
			if err := unix.Sendto(fd, []byte("x"), 0, sockaddr(vip)); err != nil {
				return err
			}
			if _, err := receiveFrom(fd, vip); err != nil {
				return fmt.Errorf("round %d: %w", round, err)
			}
		}
	}
	return nil
}

func mptcp([]string) error {
	fd, err := dial(unix.SOCK_STREAM, unix.IPPROTO_MPTCP, vipTCP)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		fmt.Println("no MPTCP in this kernel")
		return nil
	}
	if err != nil {
		return err
	}
	if who := firstLine(fd); who != "one" {
		return fmt.Errorf("answer %q", who)
	}
	return nil
}

// TCP Fast Open connects inside sendto.
func fastOpen([]string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	if err := unix.Sendto(fd, []byte("x"), unix.MSG_FASTOPEN, sockaddr(vipTCP)); err != nil {
		return err
	}
	if err := peerIs(fd, vipTCP); err != nil {
		return err
	}
	if who := firstLine(fd); who != "one" {
		return fmt.Errorf("answer %q", who)
	}
	return nil
}

// crowd makes far more sockets than the table of sockets has places, some of
// them long-lived, so that places are shared; every one must keep its own name.
func crowd([]string) error {
	var old []int
	for range 100 {
		fd, err := dial(unix.SOCK_DGRAM, 0, vipUDP)
		if err != nil {
			return err
		}
		old = append(old, fd)
	}
	// Cookies count up by one a socket and by thousands a CPU: after two
	// rounds of the table every place of the old ones was wanted again.
	for i := range 1 << 18 {
		vip := vipUDP2
		if i%2 == 0 {
			vip = vipUDP
		}
		fd, err := dial(unix.SOCK_DGRAM, 0, vip)
		if err != nil {
			return err
		}
		if err := peerIs(fd, vip); err != nil {
			return fmt.Errorf("socket %d: %w", i, err)
		}
		unix.Close(fd)
	}
	for i, fd := range old {
		if err := peerIs(fd, vipUDP); err != nil {
			return fmt.Errorf("old socket %d: %w", i, err)
		}
	}
	return nil
}
