package socket_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/lab"
)

func init() { clients["keepalive"] = keepaliveClient }

// keepaliveClient connects to the VIP of an argument, with or without keepalive
// of its own, and prints what the socket has then.
func keepaliveClient(args []string) error {
	to := netip.MustParseAddrPort(args[0])
	for _, own := range []bool{false, true} {
		fd, err := unix.Socket(familyOf(to), unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		if own {
			if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1); err != nil {
				return err
			}
			if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 77); err != nil {
				return err
			}
		}
		if err := unix.Connect(fd, sockaddr(to)); err != nil {
			return err
		}
		on, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE)
		fmt.Print("on=", on)
		for _, o := range []int{unix.TCP_KEEPIDLE, unix.TCP_KEEPINTVL, unix.TCP_KEEPCNT} {
			v, err := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, o)
			if err != nil {
				return err
			}
			fmt.Print(" ", v)
		}
		fmt.Println()
		unix.Close(fd)
	}
	return nil
}

// A service's keepalive is on the socket after connect, unless the application
// has its own; services without it leave sockets alone.
func TestKeepalive(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1", "2001:db8::1")
	w.Serve("one", "10.0.0.1:7000", "[2001:db8::1]:7000")
	w.RunAgent(`services:
- name: all
  listen: [192.0.2.1:80, "[2001:db8:f::1]:80"]
  keepalive: {idle: 20s, interval: 5s, probes: 3}
  backends: [10.0.0.1:7000, "[2001:db8::1]:7000"]
- name: idle
  listen: [192.0.2.2:80]
  keepalive: {idle: 30s}
  backends: [10.0.0.1:7000]
- name: none
  listen: [192.0.2.3:80]
  backends: [10.0.0.1:7000]`)
	for vip, want := range map[string]string{
		"192.0.2.1:80":          "on=1 20 5 3\non=1 77 75 9",
		"[2001:db8:f::1]:80":    "on=1 20 5 3\non=1 77 75 9",
		"[::ffff:192.0.2.1]:80": "on=1 20 5 3\non=1 77 75 9",
		"192.0.2.2:80":          "on=1 30 75 9\non=1 77 75 9",
		"192.0.2.3:80":          "on=0 7200 75 9\non=1 77 75 9",
	} {
		if have := w.Client("keepalive", vip); have != want {
			t.Errorf("%s: %q, want %q", vip, have, want)
		}
	}
	if out := w.MustPentad("service", "show", "all"); !strings.Contains(out, "after 20s, every 5s, 3 probes") {
		t.Errorf("service show:\n%s", out)
	}
	if out := w.MustPentad("service", "show", "idle", "-o", "yaml"); !strings.Contains(out, "keepalive:\n  idle: 30s\nbreaker:") {
		t.Errorf("service show -o yaml:\n%s", out)
	}
}
