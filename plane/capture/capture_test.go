package capture_test

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"testing"

	"github.com/google/nftables"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/plane/capture"
	"github.com/pentad/pentad/service"
)

// of returns services with n backends each, of both families.
func of(services, backends int) *service.Snapshot {
	var all []*service.Service
	for i := range services {
		s := &service.Service{Name: fmt.Sprint("s", i)}
		for _, base := range []string{"10.96.0.0", "2001:db8:96::"} {
			s.Listeners = append(s.Listeners, service.Listener{Address: netip.AddrPortFrom(plus(base, i), 80), Protocol: service.TCP})
		}
		for j := range backends {
			s.Backends = append(s.Backends, service.Backend{Address: netip.AddrPortFrom(plus("10.0.0.0", i*backends+j), 8080)})
		}
		all = append(all, s)
	}
	return (&service.Snapshot{}).Next(all)
}

func plus(base string, n int) netip.Addr {
	b := netip.MustParseAddr(base).AsSlice()
	for i := len(b) - 1; n > 0; i-- {
		n += int(b[i])
		b[i] = byte(n)
		n >>= 8
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// inHost runs a test in the network namespace of a host of its own.
func inHost(t *testing.T, f func(p *capture.Plane) error) {
	t.Helper()
	lab.Need(t)
	h, err := lab.NewHost()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := h.Do(func() error { return f(capture.New(slog.New(slog.DiscardHandler))) }); err != nil {
		t.Error(err)
	}
}

var mine = []config.Capture{{Name: "me", User: fmt.Sprint(os.Getuid()), To: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:15001")}}}

// walk returns by which capture a connection of this user is taken.
func walk(to string) (string, error) {
	v, err := capture.Read()
	if err != nil {
		return "", err
	}
	o := v.Walk(capture.Connection{Destination: netip.MustParseAddrPort(to), User: uint32(os.Getuid())})
	return o.Capture + o.Why, nil
}

// A host with many services is captured like any other, and what comes and goes of them is
// followed.
func TestManyServices(t *testing.T) {
	t.Parallel()
	inHost(t, func(p *capture.Plane) error {
		const except = "a service leads to it, or it is a backend of one"
		for _, c := range []struct {
			services int
			to, want string
		}{
			{3000, "10.0.0.3:8080", except}, {3000, "10.0.0.3:8081", "me"}, {3000, "10.96.0.7:80", except}, {3000, "[2001:db8:96::7]:80", except},
			{6000, "10.0.234.0:8080", except}, {5, "10.0.234.0:8080", "me"}, {5, "10.96.0.4:80", except}, {5, "10.96.0.5:80", "me"},
			{5, "[2001:db8:96::5]:80", "me"}, // refused: there is no proxy of that family
		} {
			if err := p.Apply(t.Context(), capture.Want{Captures: mine, Services: of(c.services, 10)}); err != nil {
				return fmt.Errorf("%d services: %w", c.services, err)
			}
			if have, err := walk(c.to); err != nil || have != c.want {
				t.Errorf("with %d services %s: %s (%v), want %s", c.services, c.to, have, err, c.want)
			}
			if !p.Intact() {
				t.Error("it is not what was made")
			}
		}
		return nil
	})
}

// What somebody does to the table is noticed, and put right.
func TestMends(t *testing.T) {
	t.Parallel()
	inHost(t, func(p *capture.Plane) error {
		want := capture.Want{Captures: mine, Services: of(2, 2)}
		if err := p.Apply(t.Context(), want); err != nil {
			return err
		}
		harm := func(what string, do func(c *nftables.Conn, t *nftables.Table)) error {
			p := capture.New(slog.New(slog.DiscardHandler))
			if err := p.Apply(t.Context(), want); err != nil {
				return err
			}
			conn, err := nftables.New()
			if err != nil {
				return err
			}
			do(conn, &nftables.Table{Name: capture.TableName, Family: nftables.TableFamilyINet})
			if err := conn.Flush(); err != nil {
				return fmt.Errorf("%s: %w", what, err)
			}
			if p.Intact() {
				t.Errorf("%s: nobody noticed", what)
			}
			if err := p.Apply(t.Context(), want); err != nil {
				return fmt.Errorf("%s: %w", what, err)
			}
			if have, err := walk("198.51.100.1:80"); err != nil || have != "me" {
				t.Errorf("%s: afterwards %s (%v)", what, have, err)
			}
			if have, err := walk("10.0.0.1:8080"); err != nil || have == "me" {
				t.Errorf("%s: afterwards a backend is %s (%v)", what, have, err)
			}
			return nil
		}
		for what, do := range map[string]func(*nftables.Conn, *nftables.Table){
			"the rule set is flushed": func(c *nftables.Conn, _ *nftables.Table) { c.FlushRuleset() },
			"a chain is emptied": func(c *nftables.Conn, t *nftables.Table) {
				c.FlushChain(&nftables.Chain{Name: "to-me", Table: t})
			},
			"the set is emptied": func(c *nftables.Conn, t *nftables.Table) {
				c.FlushSet(&nftables.Set{Name: "services4", Table: t})
			},
		} {
			if err := harm(what, do); err != nil {
				return err
			}
		}
		if err := p.Apply(t.Context(), want); err != nil {
			return err
		}
		// A change elsewhere is none of ours.
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		conn.AddTable(&nftables.Table{Name: "mine", Family: nftables.TableFamilyINet})
		if err := conn.Flush(); err != nil {
			return err
		}
		if !p.Intact() {
			t.Error("a table of somebody else counts as harm")
		}
		return capture.Remove()
	})
}
