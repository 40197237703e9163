// Package drops_test tests what pentad tells of packets that the kernel drops.
package drops_test

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/e2e"
)

func TestMain(m *testing.M) { e2e.Main(m, nil) }

type line struct {
	Reason, Words, Protocol, From, To string
	Packets                           uint64
}

// send sends datagrams from the host.
func send(t *testing.T, w *e2e.World, to string, n int) {
	t.Helper()
	if err := w.Do(func() error {
		// A socket that is not connected is not told that nobody listens.
		c, err := net.ListenPacket("udp", ":0")
		if err != nil {
			return err
		}
		defer c.Close()
		at := net.UDPAddrFromAddrPort(netip.MustParseAddrPort(to))
		for range n {
			if _, err := c.WriteTo([]byte("x"), at); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// dropIn adds a rule that drops what arrives for a port of UDP.
func dropIn(t *testing.T, w *e2e.World, port byte) {
	t.Helper()
	if err := w.Do(func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "firewall"})
		chain := c.AddChain(&nftables.Chain{Table: table, Name: "in", Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter})
		c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_UDP}},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0, port}},
			&expr.Verdict{Kind: expr.VerdictDrop},
		}})
		return c.Flush()
	}); err != nil {
		t.Fatal(err)
	}
}

// Drops are counted, every one, with their reason and addresses; only ours, unless all
// are asked for; with the agent dead.
// Its addresses are nobody else's: drops are seen in every network namespace.
func TestDrops(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := e2e.New(t, "10.213.77.1", "10.213.77.9", "2001:db8:d0::1")
	w.RunAgent("services:\n- {name: dns, listen: [192.0.2.213:53/udp, '[2001:db8:d0::10]:53/udp'], health: {probe: none}, backends: ['10.213.77.1:53', '[2001:db8:d0::1]:53']}\n")
	w.Agent.Kill()
	dropIn(t, w, 99)
	follow := func(args ...string) (*lab.Process, func() []line) {
		p, err := w.Start(exec.Command(e2e.Program(), w.Args(append([]string{"drops", "-f", "-o", "json"}, args...)...)...), lab.Outside)
		if err != nil {
			t.Fatal(err)
		}
		return p, func() (all []line) {
			for text := range strings.Lines(p.Log.String()) {
				var l line
				if json.Unmarshal([]byte(text), &l) == nil {
					all = append(all, l)
				}
			}
			return all
		}
	}
	sum := func(all []line, reason, to string) (n uint64) {
		for _, l := range all {
			if l.Reason == reason && l.To == to {
				n += l.Packets
			}
		}
		return n
	}
	ours, lines := follow()
	w.Eventually("drops are followed", func() error {
		send(t, w, "10.213.77.1:1", 1)
		if sum(lines(), "no_socket", "10.213.77.1:1") == 0 {
			return fmt.Errorf("printed only: %s", ours.Log)
		}
		return nil
	})
	_, every := follow("--all")
	w.Eventually("all drops are followed", func() error {
		send(t, w, "10.213.77.9:1", 1)
		if sum(every(), "no_socket", "10.213.77.9:1") == 0 {
			return fmt.Errorf("%+v", every())
		}
		return nil
	})
	send(t, w, "10.213.77.1:53", 300)
	send(t, w, "[2001:db8:d0::1]:53", 200)
	send(t, w, "10.213.77.1:99", 100)
	send(t, w, "10.213.77.9:99", 50)
	for _, c := range []struct {
		reason, to string
		packets    uint64
	}{{"no_socket", "10.213.77.1:53", 300}, {"no_socket", "[2001:db8:d0::1]:53", 200}, {"netfilter_drop", "10.213.77.1:99", 100}} {
		for name, read := range map[string]func() []line{"ours": lines, "all": every} {
			w.Eventually(name+": "+c.to, func() error {
				if n := sum(read(), c.reason, c.to); n != c.packets {
					return fmt.Errorf("%d of %d packets: %+v", n, c.packets, read())
				}
				return nil
			})
		}
	}
	w.Eventually("all: what is not ours", func() error {
		if n := sum(every(), "netfilter_drop", "10.213.77.9:99"); n != 50 {
			return fmt.Errorf("%d packets", n)
		}
		return nil
	})
	for _, l := range lines() {
		if strings.HasPrefix(l.To, "10.213.77.9") {
			t.Errorf("not ours: %+v", l)
		}
		if l.Reason == "netfilter_drop" && (l.Words == "" || l.Protocol != "udp" || l.From == "") {
			t.Errorf("it does not say everything: %+v", l)
		}
	}

	// As fast as they can be dropped: not one is lost from the count.
	const many = 200_000
	sent := time.Now()
	send(t, w, "10.213.77.1:54", many)
	rate := many / time.Since(sent).Seconds()
	w.Eventually("many drops", func() error {
		if n := sum(lines(), "no_socket", "10.213.77.1:54"); n != many {
			return fmt.Errorf("%d of %d were counted", n, many)
		}
		return nil
	})
	t.Logf("%.0f drops a second; the command has used %s", rate, used(t, ours))

	// The sum of some seconds, and what makes no sense.
	began := time.Now()
	w.Says(0, "drops --for 1s", "PACKETS")
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("one second took %s", took)
	}
	w.Says(2, "drops -f --for 1s", "one of them")
}

// used returns how much time of processors a process has used, at 100 ticks a second
// (proc(5)).
func used(t *testing.T, p *lab.Process) time.Duration {
	t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	var sum time.Duration
	for _, i := range []int{13, 14} {
		n, err := strconv.Atoi(strings.Fields(string(raw))[i])
		if err != nil {
			t.Fatal(err)
		}
		sum += time.Duration(n) * 10 * time.Millisecond
	}
	return sum
}
