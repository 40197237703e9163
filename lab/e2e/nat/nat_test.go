// Package nat_test tests what arrives at a plain host from elsewhere.
package nat_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/actor"
	"github.com/pentad/pentad/lab/e2e"
)

func TestMain(m *testing.M) { e2e.Main(m, nil) }

// place is a host between a client and servers, with a guest of its own.
type place struct {
	*e2e.World
	client, server, guest *lab.Host
}

func newPlace(t *testing.T) *place {
	p := &place{World: e2e.New(t)}
	for _, h := range []**lab.Host{&p.client, &p.server, &p.guest} {
		var err error
		if *h, err = lab.NewHost(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := (*h).Close(); err != nil {
				t.Error(err)
			}
		})
	}
	for _, c := range []struct {
		to   *lab.Host
		here []string
		far  []string
		via4 string
		via6 string
	}{
		{p.client, []string{"198.51.100.1/24", "2001:db8:5::1/64"}, []string{"198.51.100.2/24", "2001:db8:5::2/64"}, "198.51.100.1", "2001:db8:5::1"},
		{p.server, []string{"10.7.0.1/24", "2001:db8:7::1/64"}, []string{"10.7.0.2/24", "10.7.0.3/24", "2001:db8:7::2/64", "2001:db8:7::3/64"}, "10.7.0.1", "2001:db8:7::1"},
		{p.guest, []string{"10.8.0.1/24", "2001:db8:8::1/64"}, []string{"10.8.0.2/24", "2001:db8:8::2/64"}, "10.8.0.1", "2001:db8:8::1"},
	} {
		if _, _, err := lab.Wire(p.Host, c.here, c.to, c.far); err != nil {
			t.Fatal(err)
		}
		// VIPs are reached by this host, and nothing else is.
		for _, err := range []error{c.to.Route("192.0.2.0/24", c.via4), c.to.Route("2001:db8:10::/64", c.via6)} {
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := p.Forward(); err != nil {
		t.Fatal(err)
	}
	return p
}

// tell starts a server that says who asks it.
func (p *place) tell(at *lab.Host, name string, addresses ...string) *lab.Process {
	p.T.Helper()
	server, err := at.Start(actor.Command("tell", append([]string{name}, addresses...)...), lab.Outside)
	if err != nil {
		p.T.Fatal(err)
	}
	p.Eventually(name+" is ready", func() error {
		if !strings.Contains(server.Log.String(), "ready") {
			return fmt.Errorf("it says %q", server.Log)
		}
		return nil
	})
	return server
}

// told has a process ask an address, and returns what it is told.
func (p *place) told(at *lab.Host, cgroup, network, to string) string {
	p.T.Helper()
	client, err := at.Start(actor.Command("be told", network, to), cgroup)
	if err != nil {
		p.T.Fatal(err)
	}
	if err := client.Wait(); err != nil {
		return fmt.Sprintf("%v: %s", err, client.Log)
	}
	return client.Log.String()
}

const forwarded = `
services:
- {name: far, listen: ['192.0.2.10:80', '[2001:db8:10::10]:80', '192.0.2.10:80/udp', '[2001:db8:10::10]:80/udp'], forward: nat, health: {probe: none}, backends: ['10.7.0.2:8080', '[2001:db8:7::2]:8080']}
- {name: here, listen: ['192.0.2.11:80', '[2001:db8:10::11]:80'], forward: nat, health: {probe: none}, backends: ['198.51.100.1:8080', '[2001:db8:5::1]:8080']}
- {name: own, listen: ['192.0.2.12:80'], health: {probe: none}, backends: ['10.7.0.2:8080']}
`

// A service with forward: nat answers other hosts, guests, and its own servers; one
// without answers sockets of this host alone.
func TestForward(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	p := newPlace(t)
	p.tell(p.server, "server", "10.7.0.2:8080", "[2001:db8:7::2]:8080")
	p.tell(p.Host, "host", "198.51.100.1:8080", "[2001:db8:5::1]:8080")
	p.RunAgent(forwarded)
	type question struct {
		at          *lab.Host
		cgroup      string
		network, to string
		want        string
	}
	all := []question{
		// The answers of another host have to come back here: it sees this one.
		{p.client, lab.Outside, "tcp", "192.0.2.10:80", "server sees 10.7.0.1"},
		{p.client, lab.Outside, "udp", "192.0.2.10:80", "server sees 10.7.0.1"},
		{p.client, lab.Outside, "tcp", "[2001:db8:10::10]:80", "server sees 2001:db8:7::1"},
		{p.client, lab.Outside, "udp", "[2001:db8:10::10]:80", "server sees 2001:db8:7::1"},
		// What is served here sees the client.
		{p.client, lab.Outside, "tcp", "192.0.2.11:80", "host sees 198.51.100.2"},
		{p.client, lab.Outside, "tcp", "[2001:db8:10::11]:80", "host sees 2001:db8:5::2"},
		{p.guest, lab.Outside, "tcp", "192.0.2.10:80", "server sees 10.7.0.1"},
		{p.guest, lab.Outside, "udp", "[2001:db8:10::10]:80", "server sees 2001:db8:7::1"},
		// A server that is its own client.
		{p.server, lab.Outside, "tcp", "192.0.2.10:80", "server sees 10.7.0.1"},
		// Sockets of this host.
		{p.Host, lab.Inside, "tcp", "192.0.2.10:80", "server sees 10.7.0.1"},
		{p.Host, lab.Inside, "tcp", "192.0.2.12:80", "server sees 10.7.0.1"},
	}
	check := func(when string) {
		t.Helper()
		for _, q := range all {
			if out := p.told(q.at, q.cgroup, q.network, q.to); out != q.want {
				t.Errorf("%s: %s over %s: %q, want %q", when, q.to, q.network, out, q.want)
			}
		}
	}
	check("at first")
	if out := p.told(p.client, lab.Outside, "tcp", "192.0.2.12:80"); strings.Contains(out, "sees") {
		t.Errorf("a service without forward answers another host: %s", out)
	}
	p.explains("192.0.2.10:80 belongs to the service far", "192.0.2.10:80")
	p.explains("the service own is there for sockets of this host only (forward: none)", "192.0.2.12:80")
	// The kernel does it: the agent may be dead.
	p.Agent.Kill()
	check("with the agent dead")
	p.Agent = p.Launch()
	p.Ready()
	check("with another agent")
	// A host that passes nothing on says so.
	if err := p.Sysctl("net/ipv4/ip_forward", "0"); err != nil {
		t.Fatal(err)
	}
	p.Eventually("status names the setting", func() error {
		if out := p.MustPentad("status"); !strings.Contains(out, "net.ipv4.ip_forward") {
			return fmt.Errorf("status: %s", out)
		}
		return nil
	})
	// Off means gone.
	p.Configure(strings.ReplaceAll(forwarded, "forward: nat", "forward: none"))
	p.MustPentad("reload")
	p.Eventually("the table is gone", func() error {
		out, err := p.Run(t.Context(), lab.Outside, "nft", "list", "tables")
		if err == nil && strings.Contains(out, "pentad") {
			err = fmt.Errorf("there is %s", out)
		}
		return err
	})
}

// explains fails the test unless explain says something of packets of the client.
func (p *place) explains(want, to string) {
	p.T.Helper()
	if out, _ := p.Pentad("explain", "--from", "198.51.100.2", to); !strings.Contains(strings.Join(strings.Fields(out), " "), want) {
		p.T.Errorf("explain %s says no %q: %s", to, want, out)
	}
}
