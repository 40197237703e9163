package nat_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/actor"
	"github.com/pentad/pentad/plane/nat"
	"github.com/pentad/pentad/service"
)

// network is a node between a client and the hosts of three backends:
//
//	client 192.0.2.2 --- 192.0.2.1 node 10.1.0.1 --- 10.1.0.2 pod (of the node)
//	                                    10.2.0.1 --- 10.2.0.2 far, 10.2.0.3 far
type network struct {
	t                      *testing.T
	node, client, pod, far *lab.Host
	plane                  *nat.Plane
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
	n.node, n.client, n.pod, n.far = host(), host(), host(), host()
	n.wire(n.client, "192.0.2.2/24", "2001:db8:1::2/64", "192.0.2.1/24", "2001:db8:1::1/64")
	n.wire(n.pod, "10.1.0.2/24", "2001:db8:2::2/64", "10.1.0.1/24", "2001:db8:2::1/64")
	n.wire(n.far, "10.2.0.2/24", "2001:db8:3::2/64", "10.2.0.1/24", "2001:db8:3::1/64")
	n.check(n.far.AddAddress("10.2.0.3/32", "2001:db8:3::3/128"))
	n.check(n.node.Route("10.2.0.3/32", "10.2.0.2"))
	n.check(n.node.Route("2001:db8:3::3/128", "2001:db8:3::2"))
	n.check(n.node.Forward())
	for _, h := range []*lab.Host{n.pod, n.far, n.client} {
		// The neighbours of IPv6 have found each other.
		n.check(lab.Eventually(10*time.Second, func() error {
			if _, err := n.ask(h, "tcp", "[2001:db8:3::2]:9"); !errors.Is(err, unix.ECONNREFUSED) {
				return fmt.Errorf("nobody is reached: %w", err)
			}
			return nil
		}))
	}
	return n
}

func (n *network) check(err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
}

func (n *network) wire(h *lab.Host, family, v6, node4, node6 string) {
	n.t.Helper()
	_, _, err := lab.Wire(h, []string{family, v6}, n.node, []string{node4, node6})
	n.check(err)
	gateway := func(cidr string) string { return netip.MustParsePrefix(cidr).Addr().String() }
	n.check(h.Route("0.0.0.0/0", gateway(node4)))
	n.check(h.Route("::/0", gateway(node6)))
}

// serve answers connections and datagrams at an address with the name of the
// server and the address of the client.
func (n *network) serve(h *lab.Host, name string, at ...string) {
	n.t.Helper()
	n.check(h.Do(func() error {
		open, err := actor.Server{Name: name, Sees: true, Hangs: true, MPTCP: true}.Listen(at...)
		for _, c := range open {
			n.t.Cleanup(func() { c.Close() })
		}
		return err
	}))
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

func (n *network) apply(want nat.Want) {
	n.t.Helper()
	n.check(n.node.Do(func() error { return n.plane.Apply(context.Background(), want) }))
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

func of(services ...*service.Service) nat.Want {
	return nat.Want{Services: (&service.Snapshot{}).Next(services), Ranges: nat.Ranges{
		Pods:     []netip.Prefix{netip.MustParsePrefix("10.1.0.0/24"), netip.MustParsePrefix("2001:db8:2::/64")},
		Reserved: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("2001:db8:96::/64")},
	}}
}

// Both families and protocols; the client's address is kept where the reply
// passes here anyway and masqueraded where it would not.
func TestTranslate(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	n.serve(n.pod, "pod", "10.1.0.2:80", "[2001:db8:2::2]:80")
	n.serve(n.far, "far", "10.2.0.2:80", "[2001:db8:3::2]:80")
	n.apply(of(
		&service.Service{Name: "near", Listeners: at(service.Anywhere, "10.96.0.1:8080", "[2001:db8:96::1]:8080"),
			Backends: to(true, "10.1.0.2:80", "[2001:db8:2::2]:80")},
		&service.Service{Name: "far", Listeners: at(service.Anywhere, "10.96.0.2:8080", "[2001:db8:96::2]:8080"),
			Backends: to(false, "10.2.0.2:80", "[2001:db8:3::2]:80")},
		&service.Service{Name: "none", Listeners: at(service.Anywhere, "10.96.0.3:8080", "[2001:db8:96::3]:8080")},
		&service.Service{Name: "elsewhere", Listeners: at(service.Anywhere, "10.96.0.4:8080"), Elsewhere: service.Families{V4: true, V6: true}},
		&service.Service{Name: "for-pods", Listeners: at(service.FromPods, "10.96.0.5:8080"), Backends: to(false, "10.2.0.2:80")},
		&service.Service{Name: "for-pods/external", Listeners: at(service.FromWorld, "10.96.0.5:8080"), Backends: to(true, "10.1.0.2:80")},
	))
	for _, network := range []string{"tcp", "udp"} {
		n.expect(n.client, network, "10.96.0.1:8080", "pod 192.0.2.2")
		n.expect(n.client, network, "[2001:db8:96::1]:8080", "pod 2001:db8:1::2")
		n.expect(n.client, network, "10.96.0.2:8080", "far 10.2.0.1")
		n.expect(n.client, network, "[2001:db8:96::2]:8080", "far 2001:db8:3::1")
		// A pod keeps its address: replies to it come here.
		n.expect(n.pod, network, "10.96.0.2:8080", "far 10.1.0.2")
		// A pod that reaches itself would answer itself directly.
		n.expect(n.pod, network, "10.96.0.1:8080", "pod 10.1.0.1")
		n.expect(n.pod, network, "[2001:db8:96::1]:8080", "pod 2001:db8:2::1")
		n.expect(n.client, network, "10.96.0.5:8080", "pod 192.0.2.2")
		n.expect(n.pod, network, "10.96.0.5:8080", "far 10.1.0.2")
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

// The guarded listeners of a service answer its sources alone.
func TestSources(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	n.serve(n.pod, "pod", "10.1.0.2:80", "[2001:db8:2::2]:80")
	guarded := at(service.Anywhere, "10.96.0.1:8080", "[2001:db8:96::1]:8080")
	for i := range guarded {
		guarded[i].Guarded = true
	}
	svc := func(sources ...string) nat.Want {
		s := &service.Service{Name: "web", Listeners: guarded, Backends: to(true, "10.1.0.2:80", "[2001:db8:2::2]:80")}
		for _, p := range sources {
			s.Sources = append(s.Sources, netip.MustParsePrefix(p))
		}
		return of(s)
	}
	n.apply(svc("198.51.100.0/24"))
	for _, network := range []string{"tcp", "udp"} {
		var timeout net.Error
		if _, err := n.ask(n.client, network, "10.96.0.1:8080"); !errors.As(err, &timeout) || !timeout.Timeout() {
			t.Errorf("%s from elsewhere: %v, want a time-out", network, err)
		}
	}
	n.apply(svc("192.0.0.0/16", "192.0.2.0/24", "192.0.2.2/32", "198.51.100.0/24", "2001:db8::/32"))
	for _, network := range []string{"tcp", "udp"} {
		n.expect(n.client, network, "10.96.0.1:8080", "pod 192.0.2.2")
		n.expect(n.client, network, "[2001:db8:96::1]:8080", "pod 2001:db8:1::2")
	}
}

// With source-hash a client's address leads it to the same backend for as long as
// that is there, and clients are shared out.
func TestSourceHash(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	far4, far6 := "10.2.0.2:80", "[2001:db8:3::2]:80"
	n.serve(n.pod, "pod", "10.1.0.2:80", "[2001:db8:2::2]:80")
	n.serve(n.far, "far", far4, far6)
	web := &service.Service{
		Name: "web", Balance: service.SourceHash, Listeners: at(service.Anywhere, "10.96.0.1:8080", "[2001:db8:96::1]:8080"),
		Backends: append(to(true, "10.1.0.2:80", "[2001:db8:2::2]:80"), to(false, far4, far6)...),
	}
	// look returns to which server each client is led.
	look := func() map[string]string {
		n.apply(of(web))
		now := make(map[string]string)
		for i := range 24 {
			for vip, client := range map[string]string{
				"10.96.0.1:8080": fmt.Sprintf("192.0.2.%d", 100+i), "[2001:db8:96::1]:8080": fmt.Sprintf("2001:db8:1::%x", 0x100+i),
			} {
				answer, err := n.askFrom(n.client, client, vip)
				n.check(err)
				for range 3 {
					if again, err := n.askFrom(n.client, client, vip); err != nil || again != answer {
						t.Errorf("%s to %s: %s, then %s (%v)", client, vip, answer, again, err)
					}
				}
				now[client], _, _ = strings.Cut(answer, " ")
			}
		}
		return now
	}
	n.check(n.node.Route("2001:db8:1::100/120", "2001:db8:1::2"))
	for i := range 24 {
		n.check(n.client.AddAddress(fmt.Sprintf("192.0.2.%d/32", 100+i)))
		n.check(n.client.AddAddress(fmt.Sprintf("2001:db8:1::%x/128", 0x100+i)))
	}
	chosen := look()
	counts := make(map[string]int)
	for _, server := range chosen {
		counts[server]++
	}
	// 48 clients: that one of two has less than 8 happens once in a million.
	if counts["pod"] < 8 || counts["far"] < 8 {
		t.Errorf("not shared out: %v", counts)
	}
	// A third one takes clients from both, and hardly anybody else changes: in a
	// table of 251 places a few do.
	n.serve(n.far, "third", "10.2.0.3:80", "[2001:db8:3::3]:80")
	web = &service.Service{
		Name: "web", Balance: service.SourceHash, Listeners: web.Listeners,
		Backends: append(slices.Clone(web.Backends), to(false, "10.2.0.3:80", "[2001:db8:3::3]:80")...),
	}
	moved, needlessly := 0, 0
	for client, server := range look() {
		switch server {
		case chosen[client]:
		case "third":
			moved++
		default:
			needlessly++
		}
	}
	if moved < 4 || needlessly > 3 {
		t.Errorf("of 48 clients %d moved to the third backend, and %d between the others", moved, needlessly)
	}
}

// askFrom connects from one of the addresses of a host.
func (n *network) askFrom(h *lab.Host, client, to string) (answer string, err error) {
	err = errors.Join(err, h.Do(func() error {
		d := net.Dialer{Timeout: 2 * time.Second, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(client), 0))}
		d.SetMultipathTCP(false)
		c, err := d.Dial("tcp", to)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(2 * time.Second))
		b, err := io.ReadAll(c)
		answer = strings.TrimSpace(string(b))
		return err
	}))
	return answer, err
}

// What is sent to the address of a service, and to no listener, is refused; what is
// sent to an address that only a service could have is dropped, until one has it.
func TestReserved(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	n.serve(n.pod, "pod", "10.1.0.2:80", "[2001:db8:2::2]:80")
	// The host itself would reach these by a route that it has.
	n.serve(n.far, "lost", "10.2.0.2:9000")
	n.check(n.node.Route("10.96.0.0/16", "10.2.0.2"))
	n.check(n.node.Route("2001:db8:96::/64", "2001:db8:3::2"))
	n.check(n.far.RouteLocal("10.96.0.0/16"))
	n.serve(n.far, "lost", "10.96.0.2:8080", "10.96.0.1:9000")
	web := &service.Service{Name: "web", Listeners: at(service.Anywhere, "10.96.0.1:8080", "[2001:db8:96::1]:8080"),
		Backends: to(true, "10.1.0.2:80", "[2001:db8:2::2]:80")}
	outside := &service.Service{Name: "outside", Listeners: at(service.FromWorld, "198.51.100.1:8080"), Backends: to(true, "10.1.0.2:80")}
	n.apply(of(web, outside))
	refused := func(from *lab.Host, network, to string) {
		t.Helper()
		if answer, err := n.ask(from, network, to); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%s %s: %s (%v), want connection refused", network, to, answer, err)
		}
	}
	dropped := func(from *lab.Host, network, to string) {
		t.Helper()
		var timeout net.Error
		if answer, err := n.ask(from, network, to); !errors.As(err, &timeout) || !timeout.Timeout() {
			t.Errorf("%s %s: %s (%v), want a time-out", network, to, answer, err)
		}
	}
	for _, network := range []string{"tcp", "udp"} {
		for _, from := range []*lab.Host{n.client, n.pod} {
			refused(from, network, "10.96.0.1:9000")
			refused(from, network, "[2001:db8:96::1]:9000")
		}
		dropped(n.client, network, "10.96.0.2:8080")
		dropped(n.pod, network, "[2001:db8:96::2]:8080")
	}
	// A process of the host: a datagram that is dropped there fails at once.
	refused(n.node, "tcp", "10.96.0.1:9000")
	refused(n.node, "tcp", "[2001:db8:96::1]:9000")
	dropped(n.node, "tcp", "10.96.0.2:8080")
	if _, err := n.ask(n.node, "udp", "10.96.0.1:9000"); !errors.Is(err, unix.EPERM) {
		t.Errorf("udp from the host itself: %v, want %v", err, unix.EPERM)
	}
	// What an address outside of these ranges has besides is not our business.
	n.expect(n.node, "tcp", "10.2.0.2:9000", "lost 10.2.0.1")
	// Who else serves such an address is let be.
	for _, rule := range []string{
		"add table ip other", "add chain ip other pre { type nat hook prerouting priority dstnat + 10; }",
		"add rule ip other pre ip daddr 10.96.0.77 tcp dport 80 dnat to 10.1.0.2:80",
	} {
		if out, err := n.node.Run(t.Context(), lab.Outside, "nft", rule); err != nil {
			t.Fatalf("%s: %v: %s", rule, err, out)
		}
	}
	n.expect(n.client, "tcp", "10.96.0.77:80", "pod 192.0.2.2")
	n.check(n.node.AddAddress("10.96.0.78/32"))
	n.serve(n.node, "node", "10.96.0.78:80")
	n.expect(n.client, "tcp", "10.96.0.78:80", "node 192.0.2.2")
	next := *web
	next.Name, next.Listeners = "next", at(service.Anywhere, "10.96.0.2:8080")
	n.apply(of(web, outside, &next))
	n.expect(n.client, "tcp", "10.96.0.2:8080", "pod 192.0.2.2")
	refused(n.client, "tcp", "10.96.0.2:9000")
	n.apply(of(web, outside))
	dropped(n.client, "tcp", "10.96.0.2:8080")
	// Without the ranges packets go where the host sends them.
	n.apply(nat.Want{Services: of(web, outside).Services})
	n.expect(n.node, "tcp", "10.96.0.1:9000", "lost 10.2.0.1")
}

// A client keeps its backend, and gets another when that is gone.
func TestAffinity(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	n.serve(n.pod, "pod", "10.1.0.2:80", "[2001:db8:2::2]:80")
	n.serve(n.far, "far", "10.2.0.2:80", "10.2.0.3:80", "[2001:db8:3::2]:80", "[2001:db8:3::3]:80")
	web := &service.Service{
		Name: "web", Affinity: time.Minute, Listeners: at(service.Anywhere, "10.96.0.1:8080", "[2001:db8:96::1]:8080"),
		Backends: append(to(true, "10.1.0.2:80", "[2001:db8:2::2]:80"), to(false, "10.2.0.2:80", "[2001:db8:3::2]:80")...),
	}
	n.apply(of(web))
	for _, v := range []string{"10.96.0.1:8080", "[2001:db8:96::1]:8080"} {
		first, err := n.ask(n.client, "tcp", v)
		n.check(err)
		for range 20 {
			n.expect(n.client, "tcp", v, first)
		}
	}
	for range 2 {
		// One half is taken away, then the other.
		without := *web
		without.Backends = web.Backends[:2]
		n.apply(of(&without))
		n.expect(n.client, "tcp", "10.96.0.1:8080", "pod 192.0.2.2")
		n.expect(n.client, "tcp", "[2001:db8:96::1]:8080", "pod 2001:db8:1::2")
		n.apply(of(web))
		n.expect(n.client, "tcp", "10.96.0.1:8080", "pod 192.0.2.2")
		without.Backends = web.Backends[2:]
		n.apply(of(&without))
		for range 10 {
			n.expect(n.client, "tcp", "10.96.0.1:8080", "far 10.2.0.1")
			n.expect(n.client, "tcp", "[2001:db8:96::1]:8080", "far 2001:db8:3::1")
		}
		n.apply(of(web))
		for range 10 {
			n.expect(n.client, "tcp", "10.96.0.1:8080", "far 10.2.0.1")
			n.expect(n.client, "tcp", "[2001:db8:96::1]:8080", "far 2001:db8:3::1")
		}
	}
}

// A client has the same backend at all addresses and ports of a service, of each
// family, and at all of them another one when that is gone.
func TestAffinityIsOfTheService(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	n.serve(n.far, "far", "10.2.0.2:80", "[2001:db8:3::2]:80")
	n.serve(n.pod, "pod", "10.1.0.2:80", "[2001:db8:2::2]:80")
	everywhere := []string{"10.96.0.1:8080", "10.96.0.2:8080", "192.0.2.1:30080", "[2001:db8:96::1]:8080", "[2001:db8:96::2]:8080"}
	web := &service.Service{
		Name: "web", Affinity: time.Minute, Listeners: at(service.Anywhere, everywhere...),
		Backends: append(to(true, "10.1.0.2:80", "[2001:db8:2::2]:80"), to(false, "10.2.0.2:80", "[2001:db8:3::2]:80")...),
	}
	other := *web
	other.Name, other.Listeners = "other", at(service.Anywhere, "10.96.0.3:8080", "10.96.0.4:8080")
	n.apply(of(web, &other))
	for _, all := range [][]string{everywhere[:3], everywhere[3:]} {
		first, err := n.ask(n.client, "tcp", all[0])
		n.check(err)
		for range 10 {
			for _, v := range all {
				n.expect(n.client, "tcp", v, first)
			}
		}
	}
	for _, left := range [][]service.Backend{web.Backends[:2], web.Backends, web.Backends[2:], web.Backends} {
		less := *web
		less.Backends = left
		n.apply(of(&less, &other))
		for _, all := range [][]string{everywhere[:3], everywhere[3:]} {
			first, err := n.ask(n.client, "tcp", all[1])
			n.check(err)
			for range 5 {
				for _, v := range all {
					n.expect(n.client, "tcp", v, first)
				}
			}
		}
	}
	// Listeners come and go: who is known stays so.
	first, err := n.ask(n.client, "tcp", everywhere[0])
	n.check(err)
	for _, v := range []string{"10.96.0.5:8080", "10.96.0.6:80"} {
		more := *web
		more.Listeners = at(service.Anywhere, everywhere[0], v)
		n.apply(of(&more, &other))
		for range 5 {
			n.expect(n.client, "tcp", v, first)
			n.expect(n.client, "tcp", everywhere[0], first)
		}
	}
	n.apply(of(web, &other))
	n.expect(n.client, "tcp", everywhere[1], first)
	if out, err := n.node.Run(t.Context(), lab.Outside, "nft", "list", "table", "inet", nat.TableName); err != nil || !strings.Contains(out, "30080") {
		t.Errorf("nft cannot list it: %v\n%s", err, out)
	}
}

// Clients that are too many to be remembered are served.
func TestAffinityHasNoRoom(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	n.serve(n.pod, "pod", "10.1.0.2:80")
	one, two := to(true, "10.1.0.2:80"), at(service.Anywhere, "10.96.0.2:80", "10.96.0.3:80")
	n.apply(of(
		&service.Service{Name: "alone", Affinity: time.Minute, Listeners: at(service.Anywhere, "10.96.0.1:80"), Backends: one},
		&service.Service{Name: "shared", Affinity: time.Minute, Listeners: two, Backends: one},
	))
	var fill strings.Builder
	const perMessage = 1 << 14
	for i := range nat.AffinityPlaces {
		if i%perMessage == 0 {
			fmt.Fprintf(&fill, "}\nadd element inet %s affinity4 {", nat.TableName)
		}
		fmt.Fprintf(&fill, "198.%d.%d.%d . 10.96.0.1 . tcp . 80 timeout 1h : 1,", 51+i>>16, i>>8&0xff, i&0xff)
	}
	file, err := n.node.WriteFile("fill", strings.TrimPrefix(fill.String()+"}\n", "}\n"))
	n.check(err)
	if out, err := n.node.Run(t.Context(), lab.Outside, "nft", "-f", file); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, v := range []string{"10.96.0.1:80", "10.96.0.2:80", "10.96.0.3:80"} {
		n.expect(n.client, "tcp", v, "pod 192.0.2.2")
	}
}

// everything is a snapshot that needs every kind of chain and set.
func everything(backends ...service.Backend) nat.Want {
	guarded := at(service.Anywhere, "10.96.0.4:80", "[2001:db8:96::4]:80")
	for i := range guarded {
		guarded[i].Guarded = true
	}
	sources := []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8::/32")}
	uneven := slices.Clone(backends)
	for i := range uneven {
		uneven[i].Weight = uint32(i + 1)
	}
	return of(
		&service.Service{Name: "plain", Listeners: at(service.Anywhere, "10.96.0.1:80", "[2001:db8:96::1]:80"), Backends: backends},
		&service.Service{Name: "none", Listeners: at(service.Anywhere, "10.96.0.2:80", "[2001:db8:96::2]:80")},
		&service.Service{Name: "affinity", Listeners: at(service.Anywhere, "10.96.0.3:80", "10.96.0.3:81", "[2001:db8:96::3]:80", "[2001:db8:96::3]:81"),
			Affinity: time.Hour, Backends: backends},
		&service.Service{Name: "guarded", Listeners: guarded, Sources: sources, Backends: backends, Affinity: time.Minute},
		&service.Service{Name: "pods", Listeners: at(service.FromPods, "10.96.0.5:80", "[2001:db8:96::5]:80"), Backends: uneven},
		&service.Service{Name: "hashed", Listeners: at(service.Anywhere, "10.96.0.6:80", "[2001:db8:96::6]:80"), Backends: backends, Balance: service.SourceHash},
		&service.Service{Name: "world", Listeners: at(service.FromWorld, "10.96.0.5:80", "[2001:db8:96::5]:80"), Elsewhere: service.Families{V4: true, V6: true}},
	)
}

// A plane finds what another left as it should be, and changes only what is
// different; what somebody destroyed is made again.
func TestAdopt(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	all := everything(append(to(true, "10.1.0.2:80", "[2001:db8:2::2]:80"), to(false, "10.2.0.2:80", "[2001:db8:3::2]:80")...)...)
	n.apply(all)
	ruleset := func() string {
		out, err := n.node.Run(t.Context(), lab.Outside, "nft", "-a", "list", "table", "inet", nat.TableName)
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return out
	}
	first := ruleset()
	var log lab.Log
	n.plane = nat.New(slog.New(slog.NewTextHandler(&log, nil)))
	n.apply(all)
	// With handles: what is made again has others.
	if now := ruleset(); now != first || log.String() != "" {
		t.Errorf("adopting changed the table: %s\n%s", log.String(), diff(first, now))
	}
	if !n.checkTable() {
		t.Error("the table is whole, and said not to be")
	}
	for _, damage := range []string{
		"flush ruleset", "delete table inet pentad", "flush chain inet pentad prerouting", "flush table inet pentad",
		"add rule inet pentad prerouting drop", "flush chain inet pentad backend4-2",
	} {
		if out, err := n.node.Run(t.Context(), lab.Outside, "nft", damage); err != nil {
			t.Fatalf("%s: %v: %s", damage, err, out)
		}
		if n.checkTable() {
			t.Errorf("%s: not noticed", damage)
		}
		n.apply(all)
		if now := withoutHandles(ruleset()); now != withoutHandles(first) {
			t.Errorf("%s: not repaired:\n%s", damage, diff(withoutHandles(first), now))
		}
		if !n.checkTable() {
			t.Errorf("%s: the table is whole again, and said not to be", damage)
		}
	}
	n.check(n.node.Do(func() error {
		v, err := nat.Read()
		if err != nil {
			return err
		}
		text := ""
		for _, m := range v.Mappings {
			text += fmt.Sprintln(m.Service, m.Listener, m.Listener.From, m.Sources, m.Affinity, m.Hashed, m.Dropped, m.Backends)
		}
		if fmt.Sprint(v.Pods, v.Reserved) != "[10.1.0.0/24 2001:db8:2::/64] [10.96.0.0/16 2001:db8:96::/64]" ||
			!v.Taken(netip.MustParseAddr("2001:db8:96::4")) || v.Taken(netip.MustParseAddr("10.96.0.9")) {
			t.Errorf("pods %v, reserved %v", v.Pods, v.Reserved)
		}
		for _, want := range []string{
			"plain 10.96.0.1:80 12 [] 0s false false [{10.1.0.2:80 1 true} {10.2.0.2:80 1 false}]\n",
			"affinity [2001:db8:96::3]:80/udp 12 [] 1h0m0s false false [{[2001:db8:2::2]:80 1 true} {[2001:db8:3::2]:80 1 false}]\n",
			"guarded 10.96.0.4:80 12 [192.0.2.0/24] 1m0s false false [{10.1.0.2:80 1 true} {10.2.0.2:80 1 false}]\n",
			"pods 10.96.0.5:80 4 [] 0s false false [{10.1.0.2:80 1 true} {10.2.0.2:80 3 false}]\n",
			"world 10.96.0.5:80 8 [] 0s false true []\n", "none 10.96.0.2:80 12 [] 0s false false []\n",
			"hashed 10.96.0.6:80 12 [] 0s true false [{10.1.0.2:80 126 true} {10.2.0.2:80 125 false}]\n",
		} {
			if !strings.Contains(text, want) {
				t.Errorf("the kernel does not show %s%s", want, text)
			}
		}
		return err
	}))
	// What concerns others is not touched and does not matter.
	if out, err := n.node.Run(t.Context(), lab.Outside, "nft", "add table inet other"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if !n.checkTable() {
		t.Error("a table of others made this one unsound")
	}
	n.apply(of())
	n.check(n.node.Do(nat.Remove))
	n.check(n.node.Do(nat.Remove))
	out, err := n.node.Run(t.Context(), lab.Outside, "nft", "list", "tables")
	if err != nil || strings.TrimSpace(out) != "table inet other" {
		t.Errorf("left behind: %v %s", err, out)
	}
}

func (n *network) checkTable() (whole bool) {
	n.check(n.node.Do(func() error {
		whole = n.plane.Intact()
		return nil
	}))
	return whole
}

var handle = regexp.MustCompile(` # handle \d+`)

// withoutHandles leaves what does not depend on the order of things.
func withoutHandles(ruleset string) string {
	words := strings.FieldsFunc(handle.ReplaceAllString(ruleset, ""), func(r rune) bool { return r == '\n' || r == ',' })
	for i := range words {
		words[i] = strings.TrimSpace(strings.Trim(strings.TrimSpace(words[i]), "{}"))
	}
	slices.Sort(words)
	return strings.Join(words, "\n")
}

func diff(a, b string) string {
	var out []string
	have := strings.Split(b, "\n")
	for _, line := range strings.Split(a, "\n") {
		if !slices.Contains(have, line) {
			out = append(out, "- "+line)
		}
	}
	was := strings.Split(a, "\n")
	for _, line := range have {
		if !slices.Contains(was, line) {
			out = append(out, "+ "+line)
		}
	}
	return strings.Join(out, "\n")
}

// A UDP client that sends from one port for ever goes to a new backend when its own
// leaves, and to the first one when there was none; a TCP connection whose backend
// leaves goes on, and one that has ended does not lead its port there any more.
func TestStale(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	n.serve(n.pod, "pod", "10.1.0.2:80", "[2001:db8:2::2]:80")
	n.serve(n.far, "far", "10.2.0.2:80", "[2001:db8:3::2]:80")
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		// A thread of its own is in the namespace for as long as this runs.
		if err := n.node.Do(func() error { n.plane.Run(ctx); return nil }); err != nil {
			t.Error(err)
		}
	}()
	defer func() { stop(); <-done }()
	svc := func(b ...service.Backend) nat.Want {
		return of(&service.Service{Name: "web", Listeners: at(service.Anywhere, "10.96.0.1:8080", "[2001:db8:96::1]:8080"), Backends: b})
	}
	near, far := to(true, "10.1.0.2:80", "[2001:db8:2::2]:80"), to(false, "10.2.0.2:80", "[2001:db8:3::2]:80")
	for _, vip := range []string{"10.96.0.1:8080", "[2001:db8:96::1]:8080"} {
		n.apply(svc())
		c := n.dial(n.client, "udp", vip)
		if _, err := say(c); err == nil {
			t.Error("somebody answers for a service without backends")
		}
		for _, step := range []struct {
			backends []service.Backend
			name     string
		}{{near, "pod"}, {far, "far"}, {append(drained(far), near...), "pod"}} {
			n.apply(svc(step.backends...))
			if err := lab.Eventually(10*time.Second, func() error {
				answer, err := say(c)
				if err == nil && !strings.HasPrefix(answer, step.name) {
					err = fmt.Errorf("%s answers", answer)
				}
				return err
			}); err != nil {
				t.Errorf("udp %s: want %s: %v", vip, step.name, err)
			}
		}
	}
	echo := n.echo(n.far, "10.2.0.2:81", "[2001:db8:3::2]:81")
	defer echo()
	tcp := func(b ...service.Backend) nat.Want {
		l := at(service.Anywhere, "10.96.0.2:8080", "[2001:db8:96::2]:8080")
		return of(&service.Service{Name: "echo", Listeners: l, Backends: b})
	}
	wide := to(false, "10.2.0.2:81", "[2001:db8:3::2]:81")
	for _, vip := range []string{"10.96.0.2:8080", "[2001:db8:96::2]:8080"} {
		n.apply(tcp(wide...))
		c := n.dial(n.client, "tcp", vip)
		n.apply(tcp(append(drained(wide), near...)...))
		n.apply(tcp(near...))
		time.Sleep(time.Second) // whatever is forgotten, is forgotten by now
		if _, err := say(c); err != nil {
			t.Errorf("tcp %s: the backend has left, and what it has does not go on: %v", vip, err)
		}
		n.portAgain(vip, tcp(wide...), tcp(near...))
	}
}

// portAgain connects from one port, ends the connection in a way that conntrack
// waits for the rest of, has its backend replaced, and connects from the port again.
func (n *network) portAgain(vip string, first, then nat.Want) {
	n.t.Helper()
	n.apply(first)
	d := net.Dialer{Timeout: 2 * time.Second, LocalAddr: &net.TCPAddr{Port: 4000}}
	d.SetMultipathTCP(false)
	d.Control = func(_, _ string, c syscall.RawConn) error {
		var err error
		return errors.Join(c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) }), err)
	}
	connect := func() (c net.Conn) {
		n.t.Helper()
		n.check(n.client.Do(func() (err error) {
			c, err = d.Dial("tcp", vip)
			return err
		}))
		return c
	}
	c := connect()
	if _, err := say(c); err != nil {
		n.t.Error(err)
	}
	// The end of one side is seen, that of the other is not.
	n.check(c.(*net.TCPConn).CloseWrite())
	n.check(c.(*net.TCPConn).SetLinger(0))
	c.Close()
	n.apply(then)
	if err := lab.Eventually(5*time.Second, func() error {
		c := connect()
		defer c.Close()
		if err := c.(*net.TCPConn).SetLinger(0); err != nil {
			return err
		}
		answer, err := say(c)
		if err == nil && !strings.HasPrefix(answer, "pod") {
			err = fmt.Errorf("%s answers", answer)
		}
		return err
	}); err != nil {
		n.t.Errorf("tcp %s from a port again: %v", vip, err)
	}
}

func drained(all []service.Backend) []service.Backend {
	all = slices.Clone(all)
	for i := range all {
		all[i].Weight = 0
	}
	return all
}

func (n *network) dial(from *lab.Host, network, to string) (c net.Conn) {
	n.t.Helper()
	n.check(from.Do(func() (err error) {
		c, err = net.DialTimeout(network, to, 5*time.Second)
		return err
	}))
	n.t.Cleanup(func() { c.Close() })
	return c
}

func say(c net.Conn) (string, error) {
	if err := c.SetDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
		return "", err
	}
	if _, err := c.Write([]byte("?")); err != nil {
		return "", err
	}
	b := make([]byte, 100)
	n, err := c.Read(b)
	return string(b[:n]), err
}

// echo answers what is sent, for as long as somebody sends.
func (n *network) echo(h *lab.Host, addresses ...string) (stop func()) {
	n.t.Helper()
	var all []net.Listener
	for _, a := range addresses {
		n.check(h.Do(func() error {
			l, err := net.Listen("tcp", a)
			if err != nil {
				return err
			}
			all = append(all, l)
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
			return nil
		}))
	}
	return func() {
		for _, l := range all {
			l.Close()
		}
	}
}
