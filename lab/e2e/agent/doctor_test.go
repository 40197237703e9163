package agent_test

import (
	"os"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/pentad/pentad/lab"
)

// What a host does to services is found, named with its command, and mended where one
// setting mends it.
func TestDoctor(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := newWorld(t, "10.0.0.1")
	const forward = "/proc/sys/net/ipv4/ip_forward"
	set := func(value string) {
		t.Helper()
		if err := w.Do(func() error { return os.WriteFile(forward, []byte(value), 0) }); err != nil {
			t.Fatal(err)
		}
	}
	set("1")
	w.RunAgent("services:\n- {name: web, listen: ['192.0.2.10:80'], forward: nat, health: {probe: none}, backends: ['10.0.0.1:80']}\n")
	file := w.Dir + "/pentad.yaml"
	w.Says(0, "doctor "+file)
	set("0")
	w.Says(1, "doctor "+file, "does not forward IPv4", "sysctl -w net.ipv4.ip_forward=1")
	w.Says(0, "doctor --fix "+file, "mended")
	out := w.Says(0, "doctor -o json "+file)
	if strings.Contains(out, "ip-forward") {
		t.Errorf("it was not mended: %s", out)
	}

	// Somebody else translates the VIP, and drops what is forwarded.
	addRules(t, w)
	w.Says(1, "doctor "+file, "chain odd of the table ip other translates 192.0.2.10", "chain FORWARD of the table ip other drops what is forwarded")

	w.Agent.Kill()
	w.Says(1, "doctor "+file, "no agent is running")
	w.Says(1, "doctor "+w.Dir+"/none.yaml", "none.yaml")
	w.Configure("services: 7\n")
	w.Says(1, "doctor "+file, "services")
}

func addRules(t *testing.T, w *world) {
	t.Helper()
	err := w.Do(func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "other"})
		drop := nftables.ChainPolicyDrop
		c.AddChain(&nftables.Chain{Table: table, Name: "FORWARD", Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter, Policy: &drop})
		odd := c.AddChain(&nftables.Chain{Table: table, Name: "odd", Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityNATDest})
		c.AddRule(&nftables.Rule{Table: table, Chain: odd, Exprs: []expr.Any{
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{192, 0, 2, 10}},
			&expr.Immediate{Register: 1, Data: []byte{10, 9, 9, 9}},
			&expr.NAT{Type: expr.NATTypeDestNAT, Family: 2, RegAddrMin: 1},
		}})
		return c.Flush()
	})
	if err != nil {
		t.Fatal(err)
	}
}
