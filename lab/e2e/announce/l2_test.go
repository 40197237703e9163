package announce_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/e2e"
)

// The VIPs of a segment are addresses of it.
const (
	near4 = "10.80.0.100"
	near6 = "2001:db8:80::100"
)

// segment is the section of a director that announces at its interface.
func (s *site) segmentRole(i int, more string) string {
	return fmt.Sprintf("director: {interfaces: [%[1]s]}\nannounce: {l2: {interfaces: [%[1]s]%[2]s}}\n", s.names[i], more)
}

// shared starts the directors, who share the VIPs, one after the other.
func (s *site) shared() {
	s.t.Helper()
	for i, d := range s.directors {
		secret, err := d.WriteFile("key", "of both\n")
		must(s.t, err, os.Chmod(secret, 0o600))
		d.RunAgent(s.sharing(i, ""))
		if i == 0 {
			s.owned("the first director has both", 0)
		}
	}
}

// sharing is the file of a director that shares its VIPs.
func (s *site) sharing(i int, backends string) string {
	return s.services(backends, s.segmentRole(i, ", keyFile: "+filepath.Join(s.directors[i].Dir, "key")))
}

// has returns whether a director has each VIP, as its agent says.
func has(d *e2e.World) (all []bool, err error) {
	out, err := d.Pentad("announcement", "list", "-o", "json")
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, out)
	}
	var vips []struct {
		Address string
		L2      struct{ Here bool }
	}
	if err := json.Unmarshal([]byte(out), &vips); err != nil {
		return nil, err
	}
	for _, v := range vips {
		all = append(all, v.L2.Here)
	}
	if len(all) != 2 {
		return nil, fmt.Errorf("not two VIPs: %s", out)
	}
	return all, nil
}

// owned waits until one director has both VIPs, and nobody else has any.
func (s *site) owned(when string, by int) time.Duration {
	s.t.Helper()
	began := time.Now()
	s.router.Eventually(when, func() error { return s.isOwned(by) })
	return time.Since(began)
}

func (s *site) isOwned(by int) error {
	for i, d := range s.directors {
		if d.Agent == nil {
			continue
		}
		select {
		case <-d.Agent.Done():
			continue
		default:
		}
		got, err := has(d)
		if err != nil {
			return err
		}
		if got[0] != (i == by) || got[1] != (i == by) {
			return fmt.Errorf("director %d has %v", i, got)
		}
	}
	return nil
}

// steadyOwner waits until one director has both VIPs, and fails the test if that changes
// within a time.
func (s *site) steadyOwner(when string, by int, d time.Duration) {
	s.t.Helper()
	s.owned(when, by)
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if err := s.isOwned(by); err != nil {
			s.t.Fatalf("%s: %v", when, err)
		}
	}
}

// neighbour returns the director whom a host of the segment sends what is for a VIP, once
// it has forgotten what it knew; -1: nobody answers.
func (s *site) neighbour(vip string) int {
	s.t.Helper()
	family := "-4"
	if strings.Contains(vip, ":") {
		family = "-6"
	}
	_, _ = s.router.Run(s.t.Context(), lab.Outside, "ip", family, "neigh", "flush", "to", vip)
	_ = s.router.Do(func() error {
		c, err := net.DialTimeout("tcp", net.JoinHostPort(vip, "80"), 2*time.Second)
		if err == nil {
			c.Close()
		}
		return err
	})
	out, err := s.router.Run(s.t.Context(), lab.Outside, "ip", family, "neigh", "show", vip)
	must(s.t, err)
	for i, d := range s.directors {
		link, err := d.Run(s.t.Context(), lab.Outside, "ip", "-o", "link", "show", s.names[i])
		must(s.t, err)
		_, mac, _ := strings.Cut(link, "link/ether ")
		if mac, _, _ = strings.Cut(mac, " "); strings.Contains(out, mac) {
			return i
		}
	}
	return -1
}

func (s *site) answers(when string, want int) {
	s.t.Helper()
	for _, vip := range []string{s.vip4, s.vip6} {
		s.router.Eventually(when+": "+vip, func() error {
			if got := s.neighbour(vip); got != want {
				return fmt.Errorf("director %d answers, not %d", got, want)
			}
			return nil
		})
	}
}

// Of two hosts that share VIPs one has them; the other one takes over within a second when
// that one dies or hangs, and gives nothing back.
func TestSharedSegment(t *testing.T) {
	t.Parallel()
	s := newSiteFor(t, near4, near6)
	s.shared()
	s.owned("the first director goes on having both", 0)
	s.answers("the first", 0)
	unbroken := s.talkAt(s.router.Host)

	s.directors[0].Agent.Kill()
	t.Logf("an agent is killed: %v", s.owned("the other one takes over", 1))
	s.answers("the other one", 1)
	unbroken("an agent was killed")
	s.directors[0].Agent = s.directors[0].Launch()
	s.directors[0].Ready()
	s.owned("who comes back takes nothing", 1)
	s.answers("it stays", 1)

	// An interface that was down for a moment hears and is heard as before.
	for _, state := range []string{"down", "up"} {
		if out, err := s.directors[0].Run(t.Context(), lab.Outside, "ip", "link", "set", s.names[0], state); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		time.Sleep(300 * time.Millisecond)
	}
	// It has lost its IPv6 address with it.
	if out, err := s.directors[0].Run(t.Context(), lab.Outside, "ip", "address", "add", "2001:db8:80::11/64", "dev", s.names[0], "nodad"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	s.directors[0].Eventually("it takes questions for its VIP", func() error {
		out, err := s.directors[0].Run(t.Context(), lab.Outside, "ip", "-6", "neigh", "show", "proxy")
		if err == nil && !strings.Contains(out, near6) {
			err = errors.New(out)
		}
		return err
	})
	s.steadyOwner("after it was down", 1, 2*time.Second)

	must(t, s.directors[1].Agent.Process.Signal(syscall.SIGSTOP))
	began := time.Now()
	s.router.Eventually("the first takes over", func() error {
		got, err := has(s.directors[0])
		if err == nil && (!got[0] || !got[1]) {
			err = fmt.Errorf("it has %v", got)
		}
		return err
	})
	t.Logf("an agent hangs: %v", time.Since(began))
	s.answers("the first answers", 0)
	must(t, s.directors[1].Agent.Process.Signal(syscall.SIGCONT))
	s.owned("who goes on takes nothing", 0)
	s.answers("it stays", 0)
	unbroken("an agent hung")

	// Who could not serve gives up.
	s.directors[0].Configure(s.sharing(0, ", admin: drain"))
	s.directors[0].MustPentad("reload", "--force")
	t.Logf("it drains: %v", s.owned("the other one takes over", 1))
	unbroken("it drains")
	if err := s.directors[1].Agent.Stop(); err != nil {
		t.Error(err)
	}
	s.directors[0].Configure(s.sharing(0, ""))
	s.directors[0].MustPentad("reload")
	s.owned("the one that is left has both", 0)
	s.answers("the one that is left", 0)

	// Off means gone.
	s.directors[0].MustPentad("down")
	out, err := s.directors[0].Run(t.Context(), lab.Outside, "ip", "-6", "neigh", "show", "proxy")
	if err != nil || out != "" {
		t.Errorf("groups are left: %s, %v", out, err)
	}
	s.answers("nobody", -1)
}

// While a key is changed on one host after the other, nothing has two owners.
func TestKeyIsChanged(t *testing.T) {
	t.Parallel()
	s := newSiteFor(t, near4, near6)
	s.shared()
	for i, d := range s.directors {
		must(t, os.WriteFile(filepath.Join(d.Dir, "key"), []byte("the next one\n"), 0o600))
		if i == 0 {
			// The one whose key is changed first gives up what others can take.
			s.steadyOwner("the first has the new key", 1, 3*time.Second)
			s.answers("the other one", 1)
			d.Eventually("who has them is named", func() error {
				if out, _ := d.Pentad("status"); !strings.Contains(out, "has it, which is no announcer of this group") {
					return errors.New(out)
				}
				return nil
			})
		}
	}
	s.router.Eventually("both have the new key", func() error {
		for by := range s.directors {
			if s.isOwned(by) == nil {
				return nil
			}
		}
		return errors.New("not one of them has both")
	})
}

// One alone goes on without its agent, and notices who has the same address.
func TestAloneOnASegment(t *testing.T) {
	t.Parallel()
	s := newSiteFor(t, near4, near6)
	d := s.directors[0]
	d.RunAgent(s.services("", s.segmentRole(0, "")))
	s.owned("it has both", 0)
	s.answers("it", 0)
	unbroken := s.talkAt(s.router.Host)
	d.Agent.Kill()
	s.answers("without its agent", 0)
	unbroken("its agent was killed")
	d.Agent = d.Launch()
	d.Ready()
	s.owned("another agent has both", 0)

	// Another one that knows nothing of it does not take what it has.
	other := s.directors[1]
	other.Configure(s.services("", s.segmentRole(1, "")))
	other.Agent = other.Launch()
	other.Eventually("the other one notices", func() error {
		out, _ := other.Pentad("status")
		if !strings.Contains(out, "two owners of 10.80.0.100, 2001:db8:80::100") {
			return errors.New(out)
		}
		return nil
	})
	s.owned("it has nothing", 0)
	s.answers("it", 0)
	// And a host that takes the address is noticed.
	other.MustPentad("down")
	if out, err := other.Run(t.Context(), lab.Outside, "ip", "address", "add", near4+"/24", "dev", s.names[1]); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	d.Eventually("it notices", func() error {
		out, _ := d.Pentad("status")
		if !strings.Contains(out, "two owners of 10.80.0.100: ") || !strings.Contains(out, "says that it has it, too") {
			return errors.New(out)
		}
		return nil
	})
}
