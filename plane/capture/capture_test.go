package capture_test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf/link"
	"github.com/google/nftables"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/host"
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

// site is a host of its own whose captures are of one mode.
type site struct {
	*lab.Host
	mode config.CaptureMode
	want capture.Want
}

// inHosts runs a test in the network namespace of a host of its own for each mode.
func inHosts(t *testing.T, f func(t *testing.T, at site) error, modes ...config.CaptureMode) {
	t.Parallel()
	lab.Need(t)
	for _, mode := range modes {
		t.Run(mode.String(), func(t *testing.T) {
			t.Parallel()
			h, err := lab.NewHost()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := h.Do(func() error { return capture.Remove(h.Pins) }); err != nil {
					t.Error(err)
				}
				_ = os.Remove(filepath.Join(h.Pins, "capture"))
				if err := h.Close(); err != nil {
					t.Error(err)
				}
			})
			at := site{Host: h, mode: mode, want: capture.Want{Scope: h.Scope(), Captures: []config.Capture{{
				Name: "me", TCP: true, Mode: mode, User: fmt.Sprint(os.Getuid()), To: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:15001")},
			}}}}
			if err := h.Do(func() error { return f(t, at) }); err != nil {
				t.Error(err)
			}
		})
	}
}

func (s site) plane() *capture.Plane {
	return capture.New(s.Pins)
}

// walk returns by which capture a connection of this user is taken.
func (s site) walk(to string) (string, error) {
	v, err := capture.Read(s.Pins)
	if err != nil {
		return "", err
	}
	path, err := host.CgroupPath(s.Scope())
	if err != nil {
		return "", err
	}
	id, err := host.CgroupID(path)
	if err != nil {
		return "", err
	}
	o := v.Walk(capture.Connection{Destination: netip.MustParseAddrPort(to), User: uint32(os.Getuid()), RealUser: uint32(os.Getuid()), Cgroups: []uint64{id}})
	return o.Capture + o.Why, nil
}

// A host with many services is captured like any other, and what comes and goes of them is
// followed.
func TestManyServices(t *testing.T) {
	inHosts(t, func(t *testing.T, at site) error {
		p := at.plane()
		const except = "a service leads to it, or it is a backend of one"
		for _, c := range []struct {
			services int
			to, want string
		}{
			{3000, "10.0.0.3:8080", except}, {3000, "10.0.0.3:8081", "me"}, {3000, "10.96.0.7:80", except}, {3000, "[2001:db8:96::7]:80", except},
			{6000, "10.0.234.0:8080", except}, {5, "10.0.234.0:8080", "me"}, {5, "10.96.0.4:80", except}, {5, "10.96.0.5:80", "me"},
			{5, "[2001:db8:96::5]:80", "me"}, // refused: there is no proxy of that family
		} {
			if err := p.Apply(t.Context(), capture.Want{Captures: at.want.Captures, Scope: at.want.Scope, Services: of(c.services, 10)}); err != nil {
				return fmt.Errorf("%d services: %w", c.services, err)
			}
			if have, err := at.walk(c.to); err != nil || have != c.want {
				t.Errorf("with %d services %s: %s (%v), want %s", c.services, c.to, have, err, c.want)
			}
			if !p.Intact() {
				t.Error("it is not what was made")
			}
		}
		return nil
	}, config.CaptureRedirect, config.CaptureEBPF)
}

// What somebody does to what captures is noticed, and put right.
func TestMends(t *testing.T) {
	inHosts(t, func(t *testing.T, at site) error {
		want := at.want
		want.Services = of(2, 2)
		for what, do := range at.harms() {
			p := at.plane()
			if err := p.Apply(t.Context(), want); err != nil {
				return err
			}
			if err := do(); err != nil {
				return fmt.Errorf("%s: %w", what, err)
			}
			if p.Intact() {
				t.Errorf("%s: nobody noticed", what)
			}
			if err := p.Apply(t.Context(), want); err != nil {
				return fmt.Errorf("%s: %w", what, err)
			}
			if have, err := at.walk("198.51.100.1:80"); err != nil || have != "me" {
				t.Errorf("%s: afterwards %s (%v)", what, have, err)
			}
			if have, err := at.walk("10.0.0.1:8080"); err != nil || have == "me" {
				t.Errorf("%s: afterwards a backend is %s (%v)", what, have, err)
			}
		}
		p := at.plane()
		if err := p.Apply(t.Context(), want); err != nil {
			return err
		}
		// A change elsewhere is none of ours.
		err := inTable(func(c *nftables.Conn, _ *nftables.Table) {
			c.AddTable(&nftables.Table{Name: "mine", Family: nftables.TableFamilyINet})
		})()
		if err != nil {
			return err
		}
		if !p.Intact() {
			t.Error("a table of somebody else counts as harm")
		}
		// Without a capture nothing is left, whoever has made it.
		if err := at.plane().Apply(t.Context(), capture.Want{}); err != nil {
			return err
		}
		if v, err := capture.Read(at.Pins); err != nil || v.Installed() {
			t.Errorf("something is left (%v)", err)
		}
		return nil
	}, config.CaptureRedirect, config.CaptureEBPF)
}

// inTable changes something of nf_tables.
func inTable(do func(*nftables.Conn, *nftables.Table)) func() error {
	return func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		do(conn, &nftables.Table{Name: capture.TableName, Family: nftables.TableFamilyINet})
		return conn.Flush()
	}
}

// harms are what may become of what captures.
func (s site) harms() map[string]func() error {
	if s.mode != config.CaptureEBPF {
		return map[string]func() error{
			"the rule set is flushed": inTable(func(c *nftables.Conn, _ *nftables.Table) { c.FlushRuleset() }),
			"a chain is emptied": inTable(func(c *nftables.Conn, t *nftables.Table) {
				c.FlushChain(&nftables.Chain{Name: "to-me", Table: t})
			}),
			"the set is emptied": inTable(func(c *nftables.Conn, t *nftables.Table) {
				c.FlushSet(&nftables.Set{Name: "services4", Table: t})
			}),
		}
	}
	pins := func(of string) (string, error) {
		all, err := filepath.Glob(filepath.Join(s.Pins, "capture", of))
		if err == nil && len(all) != 1 {
			err = fmt.Errorf("%s: %q", of, all)
		}
		if err != nil {
			return "", err
		}
		return all[0], nil
	}
	remove := func(of string) func() error {
		return func() error {
			path, err := pins(of)
			if err != nil {
				return err
			}
			return os.Remove(path)
		}
	}
	detach := func(of string) func() error {
		return func() error {
			path, err := pins(of)
			if err != nil {
				return err
			}
			l, err := link.LoadPinnedLink(path, nil)
			if err != nil {
				return err
			}
			defer l.Close()
			return l.(interface{ Detach() error }).Detach()
		}
	}
	return map[string]func() error{
		"a link is unpinned":       remove("processes-*/connect4"),
		"a map is unpinned":        remove("services"),
		"connect4 is detached":     detach("processes-*/connect4"),
		"sock_ops is detached":     detach("processes-*/sock_ops"),
		"original_dst is detached": detach("proxies-*/original_dst"),
	}
}
