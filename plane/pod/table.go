package pod

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/nft"
	"github.com/pentad/pentad/plane/pod/attach"
	"github.com/pentad/pentad/service"
)

// TableName is the table of this plane, of the family inet. Nobody else writes it.
const TableName = "pentad-pods"

// The table, as `nft list table inet pentad-pods` shows it:
//
//	chain source { type filter hook prerouting priority raw
//	    iifname "pd*" fib saddr . iif oif missing drop # an address that is not the pod's
//	}
//	chain tunnel-in { type filter hook prerouting priority raw
//	    udp dport 8472 notrack # no rule of anybody touches what is outside
//	}
//	chain tunnel-out { type filter hook output priority raw; udp dport 8472 notrack }
//	chain masquerade { type nat hook postrouting priority srcnat
//	    oifname "pd*" return
//	    ip daddr 10.244.0.0/16 return
//	    ip saddr 10.244.0.0/16 masquerade fully-random
//	}
//
// The first does not depend on rp_filter, which others set. The second draws ports at
// random: two pods that ask the same server at once would else get the same one.

const (
	chainSource     = "source"
	chainMasquerade = "masquerade"
	chainTunnelIn   = "tunnel-in"
	chainTunnelOut  = "tunnel-out"
)

// setTable writes the table anew, in one transaction.
func setTable(c config.Pods) error {
	conn, err := nft.Dial()
	if err != nil {
		return err
	}
	defer conn.CloseLasting()
	t := conn.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: TableName})
	conn.DelTable(t)
	t = conn.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: TableName})
	source := conn.AddChain(&nftables.Chain{Table: t, Name: chainSource, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRaw})
	conn.AddRule(&nftables.Rule{Table: t, Chain: source, Exprs: append(ofPods(expr.MetaKeyIIFNAME),
		&expr.Fib{Register: 1, FlagSADDR: true, FlagIIF: true, ResultOIF: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: make([]byte, 4)},
		&expr.Verdict{Kind: expr.VerdictDrop})})
	if c.Overlay == config.OverlayVXLAN {
		for name, hook := range map[string]*nftables.ChainHook{chainTunnelIn: nftables.ChainHookPrerouting, chainTunnelOut: nftables.ChainHookOutput} {
			chain := conn.AddChain(&nftables.Chain{Table: t, Name: name, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: nftables.ChainPriorityRaw})
			conn.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: ofTunnel()})
		}
	}
	if c.Masquerade {
		addMasquerade(conn, t, c)
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("table inet %s: %w", TableName, err)
	}
	return nil
}

// ofTunnel lets packets of the tunnel go untracked.
func ofTunnel() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_UDP}},
		nft.LoadPort(1),
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, tunnelPort)},
		&expr.Notrack{},
	}
}

// ofPods matches the devices of pods. A comparison with fewer bytes is one of the beginning.
func ofPods(key expr.MetaKey) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte(attach.DevicePrefix)}}
}

func addMasquerade(conn *nftables.Conn, t *nftables.Table, c config.Pods) {
	chain := conn.AddChain(&nftables.Chain{Table: t, Name: chainMasquerade, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource})
	add := func(exprs ...[]expr.Any) {
		var all []expr.Any
		for _, e := range exprs {
			all = append(all, e...)
		}
		conn.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: all})
	}
	back := []expr.Any{&expr.Verdict{Kind: expr.VerdictReturn}}
	add(ofPods(expr.MetaKeyOIFNAME), back)
	ranges := c.Ranges
	if len(ranges) == 0 {
		ranges = c.All()
	}
	for _, r := range ranges {
		f := service.FamilyOf(r.Addr())
		add(nft.OfFamily(f), []expr.Any{nft.LoadDestination(f, nft.Reg(0))}, within(r), back)
	}
	for _, r := range ranges {
		f := service.FamilyOf(r.Addr())
		add(nft.OfFamily(f), []expr.Any{nft.LoadSource(f, nft.Reg(0))}, within(r), []expr.Any{&expr.Masq{FullyRandom: true}})
	}
}

// within compares what was loaded into the first register with a prefix.
func within(p netip.Prefix) []expr.Any {
	p = p.Masked()
	n := p.Addr().BitLen() / 8
	mask := make([]byte, n)
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	return []expr.Any{
		&expr.Bitwise{SourceRegister: nft.Reg(0), DestRegister: nft.Reg(0), Len: uint32(n), Mask: mask, Xor: make([]byte, n)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: nft.Reg(0), Data: p.Addr().AsSlice()},
	}
}

// tableIsThere reports whether the table has its chains.
func tableIsThere() bool {
	conn, err := nft.Dial()
	if err != nil {
		return true // it cannot be seen now
	}
	defer conn.CloseLasting()
	rules, err := conn.GetRules(&nftables.Table{Family: nftables.TableFamilyINet, Name: TableName}, &nftables.Chain{Name: chainSource})
	return err == nil && len(rules) > 0
}

// removeTable removes the table. There may be none.
func removeTable() error {
	conn, err := nft.Dial()
	if err != nil {
		return err
	}
	defer conn.CloseLasting()
	conn.DelTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: TableName})
	if err := conn.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("table inet %s: %w", TableName, err)
	}
	return nil
}
