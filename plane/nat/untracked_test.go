package nat_test

import (
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	conntrack "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/plane/nat"
	"github.com/pentad/pentad/service"
)

// untracked is a want in which pods and backends elsewhere have addresses between which
// nothing is tracked.
func untracked(services ...*service.Service) nat.Want {
	want := of(services...)
	for _, p := range []string{"10.1.0.0/24", "10.2.0.0/24", "2001:db8:2::/64", "2001:db8:3::/64"} {
		want.Untracked = append(want.Untracked, netip.MustParsePrefix(p))
	}
	return want
}

// tracked returns how many connections the node tracks that an address has begun.
func (n *network) tracked(client string) int {
	n.t.Helper()
	count := 0
	n.check(n.node.Do(func() error {
		for _, family := range []conntrack.InetFamily{unix.AF_INET, unix.AF_INET6} {
			all, err := conntrack.ConntrackTableList(conntrack.ConntrackTable, family)
			if err != nil {
				return err
			}
			for _, f := range all {
				// The neighbours of IPv6 are none.
				if f.Forward.SrcIP.Equal(net.ParseIP(client)) && f.Forward.Protocol != unix.IPPROTO_ICMPV6 {
					count++
				}
			}
		}
		return nil
	}))
	return count
}

// Connections between pods are not tracked; those that are translated are, whoever
// translates them and whoever began them.
func TestUntracked(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	n.serve(n.pod, "pod", "10.1.0.2:80", "[2001:db8:2::2]:80")
	n.serve(n.far, "far", "10.2.0.2:80", "[2001:db8:3::2]:80")
	near := &service.Service{Name: "near", Listeners: at(service.Anywhere, "10.96.0.1:8080", "[2001:db8:96::1]:8080"),
		Backends: to(true, "10.1.0.2:80", "[2001:db8:2::2]:80")}
	far := &service.Service{Name: "far", Listeners: at(service.Anywhere, "10.96.0.2:8080", "[2001:db8:96::2]:8080"),
		Backends: to(false, "10.2.0.2:80", "[2001:db8:3::2]:80")}
	// Its address is one that a pod could have.
	within := &service.Service{Name: "within", Listeners: at(service.Anywhere, "10.2.0.200:8080", "[2001:db8:3::200]:8080"),
		Backends: to(true, "10.1.0.2:80", "[2001:db8:2::2]:80")}
	n.check(n.far.Route("10.2.0.200/32", "10.2.0.1"))
	n.check(n.far.Route("2001:db8:3::200/128", "2001:db8:3::1"))
	n.apply(untracked(near, far, within))

	for _, network := range []string{"tcp", "udp"} {
		n.expect(n.pod, network, "10.2.0.2:80", "far 10.1.0.2")
		n.expect(n.pod, network, "[2001:db8:3::2]:80", "far 2001:db8:2::2")
		n.expect(n.far, network, "10.1.0.2:80", "pod 10.2.0.2")
		n.expect(n.far, network, "[2001:db8:2::2]:80", "pod 2001:db8:3::2")
	}
	for _, client := range []string{"10.1.0.2", "10.2.0.2", "2001:db8:2::2", "2001:db8:3::2"} {
		// That nobody listened there was asked before there was a table.
		if found := n.tracked(client); found != 0 {
			t.Errorf("%d connections of %s are tracked", found, client)
		}
	}
	n.foreignDNAT()
	for _, network := range []string{"tcp", "udp"} {
		n.expect(n.client, network, "10.96.0.1:8080", "pod 192.0.2.2")
		// Masqueraded by an address of the node that lies among those of pods.
		n.expect(n.client, network, "10.96.0.2:8080", "far 10.2.0.1")
		n.expect(n.client, network, "[2001:db8:96::2]:8080", "far 2001:db8:3::1")
		for _, vip := range []string{"10.96.0.1:8080", "10.2.0.200:8080"} {
			n.expect(n.far, network, vip, "pod 10.2.0.2")
			n.expect(n.pod, network, vip, "pod 10.1.0.1")
		}
		for _, vip := range []string{"[2001:db8:96::1]:8080", "[2001:db8:3::200]:8080"} {
			n.expect(n.far, network, vip, "pod 2001:db8:3::2")
			n.expect(n.pod, network, vip, "pod 2001:db8:2::1")
		}
		n.expect(n.pod, network, "10.96.0.2:8080", "far 10.1.0.2")
		n.expect(n.pod, network, "[2001:db8:96::2]:8080", "far 2001:db8:2::2")
		// And to each other as before.
		n.expect(n.pod, network, "10.2.0.2:80", "far 10.1.0.2")
		n.expect(n.far, network, "[2001:db8:2::2]:80", "pod 2001:db8:3::2")
	}
	// Both directions of it, or conntrack would take one for something else.
	n.check(n.node.Do(func() error {
		all, err := conntrack.ConntrackTableList(conntrack.ConntrackTable, unix.AF_INET)
		for _, f := range all {
			if f.Forward.SrcIP.Equal(net.IPv4(10, 2, 0, 2)) && f.Forward.SrcPort == 80 {
				t.Errorf("a reply began a connection for conntrack: %v", f)
			}
		}
		return err
	}))
	for _, client := range []string{"10.1.0.2", "10.2.0.2", "2001:db8:2::2", "2001:db8:3::2"} {
		if n.tracked(client) == 0 {
			t.Errorf("no connection of %s is tracked", client)
		}
	}
}

// foreignDNAT has somebody else translate the packets of a pod that nobody knows of.
func (n *network) foreignDNAT() {
	n.t.Helper()
	for _, rule := range []string{
		"add table ip other", "add chain ip other pre { type nat hook prerouting priority dstnat; }",
		"add rule ip other pre ip daddr 192.0.2.1 tcp dport 9999 dnat to 10.1.0.2:80",
	} {
		if out, err := n.node.Run(n.t.Context(), lab.Outside, "nft", rule); err != nil {
			n.t.Fatalf("%s: %v: %s", rule, err, out)
		}
	}
	n.expect(n.far, "tcp", "192.0.2.1:9999", "pod 10.2.0.2")
}

// Connections that are translated go on when tracking is restricted, when the table is
// taken away and comes back, and when another plane takes it over.
func TestUntrackedLater(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	defer n.echo(n.far, "10.2.0.2:81", "[2001:db8:3::2]:81")()
	far := &service.Service{Name: "far", Listeners: at(service.Anywhere, "10.96.0.2:8080", "[2001:db8:96::2]:8080"),
		Backends: to(false, "10.2.0.2:81", "[2001:db8:3::2]:81")}
	n.apply(of(far))
	var all []net.Conn
	for _, vip := range []string{"10.96.0.2:8080", "[2001:db8:96::2]:8080"} {
		all = append(all, n.dial(n.pod, "tcp", vip))
	}
	alive := func(when string) {
		t.Helper()
		for _, c := range all {
			if _, err := say(c); err != nil {
				t.Errorf("%s: %s: %v", when, c.RemoteAddr(), err)
			}
		}
	}
	alive("at first")
	n.apply(untracked(far))
	alive("with less tracking")
	if out, err := n.node.Run(t.Context(), lab.Outside, "nft", "flush ruleset"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if n.checkTable() {
		t.Error("a table that is gone is whole")
	}
	n.apply(untracked(far))
	alive("with the table back")
	if out, err := n.node.Run(t.Context(), lab.Outside, "nft", "flush chain inet pentad "+n.rawChain()); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if n.checkTable() {
		t.Error("a damaged table is whole")
	}
	n.apply(untracked(far))
	alive("with the table mended")
	n.plane = nat.New(nil)
	n.apply(untracked(far))
	alive("with another plane")
	if !n.checkTable() {
		t.Error("the table is not whole")
	}
	if out, err := n.node.Run(t.Context(), lab.Outside, "nft", "list", "set", "inet", nat.TableName, "tracked4"); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	// Where nothing is untracked there is no chain for it.
	n.apply(of(far))
	alive("with all tracking")
	if name := n.rawChain(); name != "" {
		t.Errorf("there is a chain for what is not tracked: %s", name)
	}
}

// rawChain returns the name of the chain that keeps packets from being tracked.
func (n *network) rawChain() string {
	n.t.Helper()
	out, err := n.node.Run(n.t.Context(), lab.Outside, "nft", "list", "table", "inet", nat.TableName)
	if err != nil {
		n.t.Fatalf("%v: %s", err, out)
	}
	_, name, _ := strings.Cut(out, "chain raw-")
	if name == "" {
		return ""
	}
	name, _, _ = strings.Cut(name, " ")
	return "raw-" + name
}

// Whose translated connections have ended is not tracked any more, and who has one goes
// on, through every step of forgetting.
func TestUntrackedAgain(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	n.check(n.pod.AddAddress("10.1.0.3/32"))
	n.check(n.node.Route("10.1.0.3/32", "10.1.0.2"))
	n.serve(n.far, "far", "10.2.0.2:80")
	defer n.echo(n.far, "10.2.0.2:81")()
	web := &service.Service{Name: "web", Listeners: at(service.Anywhere, "10.96.0.1:8080"), Backends: to(false, "10.2.0.2:80")}
	echo := &service.Service{Name: "echo", Listeners: at(service.Anywhere, "10.96.0.2:8080"), Backends: to(false, "10.2.0.2:81")}
	n.apply(untracked(web, echo))
	// One pod has a connection that lasts, the other one that ends.
	lasting := n.dial(n.pod, "tcp", "10.96.0.2:8080")
	if answer, err := n.askFrom(n.pod, "10.1.0.3", "10.96.0.1:8080"); err != nil || answer != "far 10.1.0.3" {
		t.Fatalf("%s, %v", answer, err)
	}
	members := func(set string) string {
		out, err := n.node.Run(t.Context(), lab.Outside, "nft", "list", "set", "inet", nat.TableName, set)
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		_, after, _ := strings.Cut(out, "elements = {")
		inner, _, _ := strings.Cut(after, "}")
		words := strings.FieldsFunc(inner, func(r rune) bool { return strings.ContainsRune(" ,\n\t", r) })
		slices.Sort(words)
		return strings.Join(words, " ")
	}
	step := func(tracked, waning string) {
		t.Helper()
		if _, err := say(lasting); err != nil {
			t.Errorf("the connection that lasts: %v", err)
		}
		if a, b := members("tracked4"), members("waning4"); a != tracked || b != waning {
			t.Errorf("tracked %q, waning %q; want %q, %q", a, b, tracked, waning)
		}
	}
	review := func() { n.check(n.node.Do(func() error { return nat.Review(n.plane) })) }
	both := "10.1.0.2 10.1.0.3"
	step(both, "")
	review()
	step(both, "") // conntrack remembers what has ended for a while
	ended := func() {
		var f conntrack.ConntrackFilter
		n.check(f.AddIP(conntrack.ConntrackOrigSrcIP, net.IPv4(10, 1, 0, 3)))
		n.check(n.node.Do(func() error {
			_, err := conntrack.ConntrackDeleteFilters(conntrack.ConntrackTable, unix.AF_INET, &f)
			return err
		}))
	}
	ended()
	review()
	step("10.1.0.2", "10.1.0.3")
	// It begins again while it is waning.
	if answer, err := n.askFrom(n.pod, "10.1.0.3", "10.96.0.1:8080"); err != nil || answer != "far 10.1.0.3" {
		t.Errorf("while waning: %s, %v", answer, err)
	}
	step(both, "10.1.0.3")
	review()
	step(both, "")
	ended()
	review()
	review()
	step("10.1.0.2", "")
	if answer, err := n.askFrom(n.pod, "10.1.0.3", "10.2.0.2:80"); err != nil || answer != "far 10.1.0.3" || n.tracked("10.1.0.3") != 0 {
		t.Errorf("directly: %s, %v, and %d connections are tracked", answer, err, n.tracked("10.1.0.3"))
	}
}
