package nat_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/plane/nat"
	"github.com/pentad/pentad/service"
)

// network is a node between a client and the hosts of three backends:
//
//	client 192.0.2.2 --- 192.0.2.1 node 10.1.0.1 --- 10.1.0.2 guest (of the node)
//	                                    10.2.0.1 --- 10.2.0.2 far, 10.2.0.3 far
type network struct {
	t                        *testing.T
	node, client, guest, far *lab.Host
	plane                    *nat.Plane
}

func newNetwork(t *testing.T) *network {
	t.Helper()
	if os.Geteuid() != 0 {
		lab.Need(t)
	}
	n := &network{t: t, plane: nat.New(nil)}
	host := func() *lab.Host {
		h, err := lab.NewHost()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := h.Close(); err != nil {
				t.Error(err)
			}
		})
		return h
	}
	n.node, n.client, n.guest, n.far = host(), host(), host(), host()
	n.wire(n.client, "192.0.2.2/24", "2001:db8:1::2/64", "192.0.2.1/24", "2001:db8:1::1/64")
	n.wire(n.guest, "10.1.0.2/24", "2001:db8:2::2/64", "10.1.0.1/24", "2001:db8:2::1/64")
	n.wire(n.far, "10.2.0.2/24", "2001:db8:3::2/64", "10.2.0.1/24", "2001:db8:3::1/64")
	n.check(n.far.AddAddress("10.2.0.3/32", "2001:db8:3::3/128"))
	n.check(n.node.Route("10.2.0.3/32", "10.2.0.2"))
	n.check(n.node.Route("2001:db8:3::3/128", "2001:db8:3::2"))
	n.check(n.node.Forward())
	return n
}

func (n *network) check(err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
}

func (n *network) wire(h *lab.Host, v4, v6, node4, node6 string) {
	n.t.Helper()
	_, _, err := lab.Wire(h, []string{v4, v6}, n.node, []string{node4, node6})
	n.check(err)
	gateway := func(cidr string) string { return netip.MustParsePrefix(cidr).Addr().String() }
	n.check(h.Route("0.0.0.0/0", gateway(node4)))
	n.check(h.Route("::/0", gateway(node6)))
}

// serve answers connections and datagrams at an address with the name of the
// server and the address of the client.
func (n *network) serve(h *lab.Host, name string, at ...string) {
	n.t.Helper()
	for _, a := range at {
		n.check(h.Do(func() error {
			l, err := net.Listen("tcp", a)
			if err != nil {
				return err
			}
			n.t.Cleanup(func() { l.Close() })
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					fmt.Fprintf(c, "%s %s\n", name, c.RemoteAddr().(*net.TCPAddr).IP)
					c.Close()
				}
			}()
			u, err := net.ListenPacket("udp", a)
			if err != nil {
				return err
			}
			n.t.Cleanup(func() { u.Close() })
			go func() {
				b := make([]byte, 100)
				for {
					_, from, err := u.ReadFrom(b)
					if err != nil {
						return
					}
					_, _ = u.WriteTo(fmt.Appendf(nil, "%s %s\n", name, from.(*net.UDPAddr).IP), from)
				}
			}()
			return nil
		}))
	}
}

// ask connects from a host and returns what the server says.
func (n *network) ask(from *lab.Host, network, to string) (answer string, err error) {
	err = errors.Join(err, from.Do(func() error {
		d := net.Dialer{Timeout: 2 * time.Second}
		d.SetMultipathTCP(false)
		c, err := d.Dial(network, to)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(2 * time.Second))
		if network == "udp" {
			if _, err := c.Write([]byte("?")); err != nil {
				return err
			}
			b := make([]byte, 100)
			n, err := c.Read(b)
			answer = string(b[:n])
			return err
		}
		b, err := io.ReadAll(c)
		answer = string(b)
		return err
	}))
	return strings.TrimSpace(answer), err
}

func (n *network) expect(from *lab.Host, network, to, want string) {
	n.t.Helper()
	got, err := n.ask(from, network, to)
	if err != nil || got != want {
		n.t.Errorf("%s %s: %q, %v; want %q", network, to, got, err, want)
	}
}

func (n *network) apply(snap *service.Snapshot) {
	n.t.Helper()
	n.check(n.node.Do(func() error { return n.plane.Apply(context.Background(), snap) }))
}

func at(from service.From, addresses ...string) []service.Listener {
	var all []service.Listener
	for _, a := range addresses {
		for _, p := range []service.Protocol{service.TCP, service.UDP} {
			all = append(all, service.Listener{Address: netip.MustParseAddrPort(a), Protocol: p, From: from})
		}
	}
	return all
}

func to(local bool, addresses ...string) []service.Backend {
	var all []service.Backend
	for _, a := range addresses {
		all = append(all, service.Backend{Address: netip.MustParseAddrPort(a), Weight: 100, Local: local})
	}
	return all
}

func of(services ...*service.Service) *service.Snapshot {
	return (&service.Snapshot{}).Next("/", services).With([]netip.Prefix{
		netip.MustParsePrefix("10.1.0.0/24"), netip.MustParsePrefix("2001:db8:2::/64"),
	}, false)
}

// Both families and protocols; the client's address is kept where the reply
// passes here anyway and masqueraded where it would not.
func TestTranslate(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	n.serve(n.guest, "guest", "10.1.0.2:80", "[2001:db8:2::2]:80")
	n.serve(n.far, "far", "10.2.0.2:80", "[2001:db8:3::2]:80")
	n.apply(of(
		&service.Service{Name: "near", Listeners: at(service.Anywhere, "10.96.0.1:8080", "[2001:db8:96::1]:8080"),
			Backends: to(true, "10.1.0.2:80", "[2001:db8:2::2]:80")},
		&service.Service{Name: "far", Listeners: at(service.Anywhere, "10.96.0.2:8080", "[2001:db8:96::2]:8080"),
			Backends: to(false, "10.2.0.2:80", "[2001:db8:3::2]:80")},
		&service.Service{Name: "none", Listeners: at(service.Anywhere, "10.96.0.3:8080", "[2001:db8:96::3]:8080")},
		&service.Service{Name: "elsewhere", Listeners: at(service.Anywhere, "10.96.0.4:8080"), Elsewhere: true},
		&service.Service{Name: "for-guests", Listeners: at(service.FromGuests, "10.96.0.5:8080"), Backends: to(false, "10.2.0.2:80")},
		&service.Service{Name: "for-guests/external", Listeners: at(service.FromWorld, "10.96.0.5:8080"), Backends: to(true, "10.1.0.2:80")},
	))
	for _, network := range []string{"tcp", "udp"} {
		n.expect(n.client, network, "10.96.0.1:8080", "guest 192.0.2.2")
		n.expect(n.client, network, "[2001:db8:96::1]:8080", "guest 2001:db8:1::2")
		n.expect(n.client, network, "10.96.0.2:8080", "far 10.2.0.1")
		n.expect(n.client, network, "[2001:db8:96::2]:8080", "far 2001:db8:3::1")
		// A guest keeps its address: replies to it come here.
		n.expect(n.guest, network, "10.96.0.2:8080", "far 10.1.0.2")
		// A guest that reaches itself would answer itself directly.
		n.expect(n.guest, network, "10.96.0.1:8080", "guest 10.1.0.1")
		n.expect(n.guest, network, "[2001:db8:96::1]:8080", "guest 2001:db8:2::1")
		n.expect(n.client, network, "10.96.0.5:8080", "guest 192.0.2.2")
		n.expect(n.guest, network, "10.96.0.5:8080", "far 10.1.0.2")
		for _, refused := range []string{"10.96.0.3:8080", "[2001:db8:96::3]:8080"} {
			if _, err := n.ask(n.client, network, refused); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("%s %s: %v, want connection refused", network, refused, err)
			}
		}
		var timeout net.Error
		if _, err := n.ask(n.client, network, "10.96.0.4:8080"); !errors.As(err, &timeout) || !timeout.Timeout() {
			t.Errorf("%s to a service whose backends are elsewhere: %v, want a time-out", network, err)
		}
	}
}
