package capture

import (
	"encoding/binary"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/nft"
	"github.com/pentad/pentad/service"
)

// TableName is the table of this plane, of the family inet. Nobody else writes it.
const TableName = "pentad-capture"

// The table, as `nft list table inet pentad-capture` shows it, with a capture named app:
//
//	set services4 { type ipv4_addr . inet_service }      # VIPs and backends
//	chain output { type nat hook output priority dstnat - 5
//	    meta l4proto != tcp return
//	    tcp flags & (fin | syn | rst | ack) != syn return # what has begun stays where it is
//	    meta mark 0x706e3778 return                       # what proxies of this host send
//	    meta mark 0x706e3764 return                       # probes
//	    ip daddr 127.0.0.0/8 return
//	    ip6 daddr ::1 return
//	    ip6 daddr fe80::/10 return
//	    ip daddr . tcp dport @services4 return            # connect() has led it there
//	    socket cgroupv2 level 1 "app.slice" jump to-app
//	}
//	chain prerouting { type nat hook prerouting priority dstnat - 5
//	    (the same, and what is for this host itself)
//	    iifname "eth1" jump to-lab
//	}
//	chain to-app {
//	    ip daddr 10.0.0.0/8 return                        # except
//	    ip daddr 0.0.0.0/0 tcp dport 443 dnat to 127.0.0.1:15001
//	    ip6 daddr ::/0 tcp dport 443 reject with tcp reset # the proxy has no such address
//	}
//
// A connection is translated once, by its first packet; conntrack remembers it, and tells
// the proxy where it wanted to go (SO_ORIGINAL_DST).

const (
	chainOutput     = "output"
	chainPrerouting = "prerouting"
	entryPrefix     = "to-"
)

// priority is before plane/nat, and before what firewalls of others do.
var priority = nftables.ChainPriorityRef(-105)

// chainRules is a chain and what it does.
type chainRules struct {
	def   *nftables.Chain
	rules [][]expr.Any
}

// entry is a capture with what its names stand for on this host.
type entry struct {
	config.Capture
	level    uint32 // of the cgroup below the root
	cgroup   uint64 // its id
	user     uint32
	group    uint32
	hasUser  bool
	hasGroup bool
}

// chains returns all chains of the table: those of entries first, to which the others
// jump.
func chains(t *nftables.Table, entries []entry) []chainRules {
	var all []chainRules
	output, prerouting := commonRules(), append(commonRules(), notForHere())
	output = append(output, exceptServices()...)
	prerouting = append(prerouting, exceptServices()...)
	for _, e := range entries {
		name := entryPrefix + e.Name
		all = append(all, chainRules{&nftables.Chain{Table: t, Name: name}, e.rules()})
		jump := append(e.who(), &expr.Verdict{Kind: expr.VerdictJump, Chain: name})
		if e.Interface != "" {
			prerouting = append(prerouting, jump)
		} else {
			output = append(output, jump)
		}
	}
	return append(all,
		chainRules{&nftables.Chain{Table: t, Name: chainOutput, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookOutput, Priority: priority}, output},
		chainRules{&nftables.Chain{Table: t, Name: chainPrerouting, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPrerouting, Priority: priority}, prerouting})
}

// goBack is what a chain does with packets that it has nothing to do with.
var goBack = &expr.Verdict{Kind: expr.VerdictReturn}

// The flags of TCP (RFC 9293, section 3.1), and where they stand.
const (
	tcpFlags    = 13
	flagsOfOpen = 0x17 // FIN, SYN, RST, ACK
	flagSYN     = 0x02
)

// commonRules let pass what is never captured.
func commonRules() [][]expr.Any {
	sentBy := func(mark uint32) []expr.Any {
		return []expr.Any{&expr.Meta{Key: expr.MetaKeyMARK, Register: nft.Reg(0)},
			&expr.Cmp{Op: expr.CmpOpEq, Register: nft.Reg(0), Data: binaryutil.NativeEndian.PutUint32(mark)}, goBack}
	}
	return [][]expr.Any{
		{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: nft.Reg(0)}, &expr.Cmp{Op: expr.CmpOpNeq, Register: nft.Reg(0), Data: []byte{unix.IPPROTO_TCP}}, goBack},
		{
			&expr.Payload{DestRegister: nft.Reg(0), Base: expr.PayloadBaseTransportHeader, Offset: tcpFlags, Len: 1},
			&expr.Bitwise{SourceRegister: nft.Reg(0), DestRegister: nft.Reg(0), Len: 1, Mask: []byte{flagsOfOpen}, Xor: []byte{0}},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: nft.Reg(0), Data: []byte{flagSYN}}, goBack,
		},
		sentBy(host.ProxyMark),
		sentBy(host.ProbeMark),
		append(toPrefix(netip.MustParsePrefix("127.0.0.0/8")), goBack),
		append(toPrefix(netip.MustParsePrefix("::1/128")), goBack),
		// Which link is meant the proxy is not told.
		append(toPrefix(netip.MustParsePrefix("fe80::/10")), goBack),
	}
}

// notForHere lets pass what is for this host itself: who is logged in over the interface
// stays so, and can log in again.
func notForHere() []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: nft.Reg(0), FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: nft.Reg(0), Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)}, goBack,
	}
}

func exceptServices() (rules [][]expr.Any) {
	for _, f := range service.EachFamily {
		rules = append(rules, append(nft.OfFamily(f),
			nft.LoadDestination(f, nft.Reg(0)), nft.LoadPort(nft.Reg(nft.Words(f))),
			&expr.Lookup{SourceRegister: nft.Reg(0), SetName: setName(f)}, goBack))
	}
	return rules
}

func setName(f service.Family) string {
	if f == service.V4 {
		return "services4"
	}
	return "services6"
}

func setOf(t *nftables.Table, f service.Family) *nftables.Set {
	address := nftables.TypeIPAddr
	if f != service.V4 {
		address = nftables.TypeIP6Addr
	}
	return &nftables.Set{Table: t, Name: setName(f), KeyType: nftables.MustConcatSetType(address, nftables.TypeInetService), Concatenation: true}
}

// element is an address and a port as the sets have them: each part fills registers.
func element(a netip.AddrPort) nftables.SetElement {
	key := binary.BigEndian.AppendUint16(a.Addr().AsSlice(), a.Port())
	return nftables.SetElement{Key: append(key, 0, 0)}
}

func toPrefix(p netip.Prefix) []expr.Any {
	f := service.FamilyOf(p.Addr())
	return append(append(nft.OfFamily(f), nft.LoadDestination(f, nft.Reg(0))), nft.InPrefix(p)...)
}

// who goes on for packets of those who are captured.
func (e entry) who() []expr.Any {
	var rule []expr.Any
	if e.Interface != "" {
		name := make([]byte, unix.IFNAMSIZ)
		copy(name, e.Interface)
		rule = append(rule, &expr.Meta{Key: expr.MetaKeyIIFNAME, Register: nft.Reg(0)}, &expr.Cmp{Op: expr.CmpOpEq, Register: nft.Reg(0), Data: name})
	}
	if e.Cgroup != "" {
		rule = append(rule,
			&expr.Socket{Key: expr.SocketKeyCgroupv2, Level: e.level, Register: nft.Reg(0)},
			&expr.Cmp{Op: expr.CmpOpEq, Register: nft.Reg(0), Data: binaryutil.NativeEndian.PutUint64(e.cgroup)})
	}
	if e.hasUser {
		rule = append(rule, &expr.Meta{Key: expr.MetaKeySKUID, Register: nft.Reg(0)},
			&expr.Cmp{Op: expr.CmpOpEq, Register: nft.Reg(0), Data: binaryutil.NativeEndian.PutUint32(e.user)})
	}
	if e.hasGroup {
		rule = append(rule, &expr.Meta{Key: expr.MetaKeySKGID, Register: nft.Reg(0)},
			&expr.Cmp{Op: expr.CmpOpEq, Register: nft.Reg(0), Data: binaryutil.NativeEndian.PutUint32(e.group)})
	}
	return rule
}

// rules is the chain of an entry.
func (e entry) rules() (rules [][]expr.Any) {
	for _, p := range e.Except {
		rules = append(rules, append(toPrefix(p), goBack))
	}
	destinations := e.Destinations
	if len(destinations) == 0 {
		destinations = []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)}
	}
	ports := e.Ports
	if len(ports) == 0 {
		ports = []config.PortRange{{First: 0, Last: 0xffff}}
	}
	for _, p := range destinations {
		for _, r := range ports {
			rules = append(rules, append(append(toPrefix(p), inPorts(r)...), e.lead(service.FamilyOf(p.Addr()))...))
		}
	}
	return rules
}

func inPorts(r config.PortRange) []expr.Any {
	if r.First == 0 && r.Last == 0xffff {
		return nil
	}
	return []expr.Any{
		nft.LoadPort(nft.Reg(0)),
		&expr.Cmp{Op: expr.CmpOpGte, Register: nft.Reg(0), Data: binaryutil.BigEndian.PutUint16(r.First)},
		&expr.Cmp{Op: expr.CmpOpLte, Register: nft.Reg(0), Data: binaryutil.BigEndian.PutUint16(r.Last)},
	}
}

// protoSpecified is NF_NAT_RANGE_PROTO_SPECIFIED of linux/netfilter/nf_nat.h.
const protoSpecified = 2

// lead leads a connection to the proxy. Of a family in which that has no address it is
// refused: to let it go would be a way around the proxy.
func (e entry) lead(f service.Family) []expr.Any {
	to, ok := e.Target(f)
	if !ok {
		return []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}}
	}
	port := binaryutil.BigEndian.PutUint16(to.Port())
	if to.Addr().IsUnspecified() {
		return []expr.Any{&expr.Immediate{Register: nft.Reg(0), Data: port}, &expr.Redir{RegisterProtoMin: nft.Reg(0), Flags: protoSpecified}}
	}
	return []expr.Any{
		&expr.Immediate{Register: nft.Reg(0), Data: to.Addr().AsSlice()},
		&expr.Immediate{Register: nft.Reg(nft.Words(f)), Data: port},
		nft.Translate(f, 0),
	}
}
