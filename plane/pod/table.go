package pod

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

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
//	    iifname "pd*" ip daddr @hosts udp dport 8472 drop # into the tunnel, past the first
//	    iifname "pd*" ip daddr 127.0.0.0/8 drop        # what listens there is for the host alone
//	}
//	chain tunnel-in { type filter hook prerouting priority raw
//	    ip saddr @hosts udp dport 8472 notrack accept # no rule of anybody touches it
//	    ip daddr 198.51.100.11 udp dport 8472 drop    # of nobody else
//	}
//	chain tunnel-out { type filter hook output priority raw
//	    ip daddr @hosts udp dport 8472 notrack accept
//	}
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

	setHosts = "hosts"
)

// setTable writes the table anew, in one transaction.
func setTable(c config.Pods, r reach) error {
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
	conn.AddRule(&nftables.Rule{Table: t, Chain: source, Exprs: slices.Concat(ofPods(expr.MetaKeyIIFNAME), nft.OfFamily(service.V4),
		[]expr.Any{nft.LoadDestination(service.V4, nft.Reg(0))}, within(netip.MustParsePrefix("127.0.0.0/8")), []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}})})
	if r.tunnel {
		if err := addTunnel(conn, t, source, r); err != nil {
			return fmt.Errorf("table inet %s: %w", TableName, err)
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

// addTunnel lets packets of the tunnel go untracked between the hosts, and nobody else
// put any into it: not pods, and not other hosts.
func addTunnel(conn *nftables.Conn, t *nftables.Table, source *nftables.Chain, r reach) error {
	in := conn.AddChain(&nftables.Chain{Table: t, Name: chainTunnelIn, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRaw})
	out := conn.AddChain(&nftables.Chain{Table: t, Name: chainTunnelOut, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityRaw})
	hosts, err := addHosts(conn, t, r)
	if err != nil {
		return err
	}
	add := func(chain *nftables.Chain, exprs ...[]expr.Any) {
		conn.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: slices.Concat(exprs...)})
	}
	drop, accept := []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}}, []expr.Any{&expr.Notrack{}, &expr.Verdict{Kind: expr.VerdictAccept}}
	f := service.FamilyOf(r.own.outer)
	from := slices.Concat(nft.OfFamily(f), []expr.Any{nft.LoadSource(f, nft.Reg(0)), hosts}, ofTunnel())
	to := slices.Concat(nft.OfFamily(f), []expr.Any{nft.LoadDestination(f, nft.Reg(0)), hosts}, ofTunnel())
	own := slices.Concat(nft.OfFamily(f), []expr.Any{nft.LoadDestination(f, nft.Reg(0)), &expr.Cmp{Op: expr.CmpOpEq, Register: nft.Reg(0), Data: r.own.outer.AsSlice()}}, ofTunnel())
	add(source, ofPods(expr.MetaKeyIIFNAME), to, drop)
	add(source, ofPods(expr.MetaKeyIIFNAME), own, drop)
	add(in, from, accept)
	add(out, to, accept)
	add(in, own, drop)
	return nil
}

// addHosts makes the set of the other hosts' ends of the tunnel, and returns what looks an
// address up there.
func addHosts(conn *nftables.Conn, t *nftables.Table, r reach) (*expr.Lookup, error) {
	kind := nftables.TypeIP6Addr
	if r.own.outer.Is4() {
		kind = nftables.TypeIPAddr
	}
	set := &nftables.Set{Table: t, Name: setHosts, KeyType: kind}
	if err := conn.AddSet(set, nil); err != nil {
		return nil, err
	}
	for some := range slices.Chunk(r.neighbours, nft.ElementsPerMessage) {
		elements := make([]nftables.SetElement, len(some))
		for i, n := range some {
			elements[i].Key = n.outer.AsSlice()
		}
		if err := conn.SetAddElements(set, elements); err != nil {
			return nil, err
		}
	}
	return &expr.Lookup{SourceRegister: nft.Reg(0), SetName: set.Name, SetID: set.ID}, nil
}

// ofTunnel matches packets to the port of the tunnel.
func ofTunnel() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_UDP}},
		nft.LoadPort(1),
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, tunnelPort)},
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
