package capture

import (
	"encoding/binary"
	"net/netip"
	"slices"

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
//	set services4 { type ipv4_addr . inet_service . inet_proto } # VIPs and backends
//	chain output { type nat hook output priority dstnat - 5
//	    meta l4proto != tcp return
//	    tcp flags & (fin | syn | rst | ack) != syn return # what has begun stays where it is
//	    meta mark 0x706e3778 return                       # what proxies of this host send
//	    meta mark 0x706e3764 return                       # probes
//	    ip daddr 127.0.0.0/8 return
//	    ip6 daddr ::1 return
//	    ip6 daddr fe80::/10 return
//	    ip daddr . tcp dport . meta l4proto @services4 return # connect() has led it there
//	    socket cgroupv2 level 1 "app.slice" jump to-app
//	}
//	chain prerouting { type nat hook prerouting priority dstnat - 5
//	    (the same, and what is for this host itself)
//	    iifname "eth1" jump to-lab
//	}
//	chain deliver { type filter hook prerouting priority mangle
//	    tcp flags & (fin | syn | rst | ack) != syn socket wildcard 1 return
//	    tcp flags & (fin | syn | rst | ack) != syn socket transparent 1 meta mark set 0x706e3774 accept
//	    tcp flags & (fin | syn | rst | ack) != syn ct mark & 0x20000 == 0 return
//	    meta l4proto udp socket wildcard 0 socket transparent 1 meta mark set 0x706e3774 accept
//	    meta l4proto != { tcp, udp } return
//	    (the same as prerouting)
//	    iifname "eth1" jump to-lab
//	}
//	chain to-app {
//	    ip daddr 10.0.0.0/8 return                        # except
//	    ip daddr 0.0.0.0/0 tcp dport 443 dnat to 127.0.0.1:15001
//	    ip6 daddr ::/0 tcp dport 443 reject with tcp reset # the proxy has no such address
//	}
//	chain to-lab {
//	    ip daddr 0.0.0.0/0 meta l4proto udp tproxy to 127.0.0.1:15002 ct mark set ct mark | 0x20000 meta mark set 0x706e3774 accept
//	    ip daddr 0.0.0.0/0 meta l4proto udp reject            # nobody listens there
//	}
//
// In mode redirect a connection is translated once, by its first packet; conntrack
// remembers it, and tells the proxy where it wanted to go (SO_ORIGINAL_DST). In mode
// tproxy each packet is handed to a socket of the proxy as it is; by their mark a rule of
// routing (see routes.go) delivers such packets here, wherever they want to go.

const (
	chainOutput     = "output"
	chainPrerouting = "prerouting"
	chainDeliver    = "deliver"
	entryPrefix     = "to-"
)

// The priorities are before plane/nat, and before what firewalls of others do.
var (
	priority        = nftables.ChainPriorityRef(-105)
	deliverPriority = nftables.ChainPriorityMangle
)

// chainRules is a chain and what it does.
type chainRules struct {
	def   *nftables.Chain
	rules [][]expr.Any
}

// place is a cgroup: its directory, and the number that the kernel knows it by, which
// another one of the same name has not. The zero value is none.
type place struct {
	path string
	id   uint64
}

// entry is a capture with what its names stand for on this host.
type entry struct {
	config.Capture
	cgroup   place  // of those who are captured
	asking   place  // of their proxy, if a program has to tell it where they wanted to go
	level    uint32 // of the cgroup below the root
	user     uint32
	group    uint32
	hasUser  bool
	hasGroup bool
}

// chains returns all chains of the table: those of entries first, to which the others
// jump.
func chains(t *nftables.Table, entries []entry) []chainRules {
	var all []chainRules
	output := append(commonRules(onlyOpening()), exceptServices()...)
	prerouting := slices.Concat(commonRules(onlyOpening()), notForHere(), exceptServices())
	deliver := slices.Concat(commonRules(deliverEarlier()), notForHere(), exceptServices())
	for _, e := range entries {
		name := entryPrefix + e.Name
		all = append(all, chainRules{&nftables.Chain{Table: t, Name: name}, e.rules()})
		jump := append(e.who(), &expr.Verdict{Kind: expr.VerdictJump, Chain: name})
		switch {
		case e.Mode == config.CaptureTProxy:
			deliver = append(deliver, jump)
		case e.Interface != "":
			prerouting = append(prerouting, jump)
		default:
			output = append(output, jump)
		}
	}
	if needsRoutes(entries) {
		all = append(all, chainRules{&nftables.Chain{
			Table: t, Name: chainDeliver, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookPrerouting, Priority: deliverPriority,
		}, deliver})
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

// onlyOpening lets pass all but the first packet of a TCP connection.
func onlyOpening() [][]expr.Any {
	return [][]expr.Any{
		{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: nft.Reg(0)}, &expr.Cmp{Op: expr.CmpOpNeq, Register: nft.Reg(0), Data: []byte{unix.IPPROTO_TCP}}, goBack},
		append(notOpening(), goBack),
	}
}

// notOpening goes on for packets of TCP but the first of a connection.
func notOpening() []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: nft.Reg(0), Base: expr.PayloadBaseTransportHeader, Offset: tcpFlags, Len: 1},
		&expr.Bitwise{SourceRegister: nft.Reg(0), DestRegister: nft.Reg(0), Len: 1, Mask: []byte{flagsOfOpen}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: nft.Reg(0), Data: []byte{flagSYN}},
	}
}

// deliverEarlier delivers what belongs to a connection that a transparent socket of this
// host has, and lets pass what begins nothing. The socket may have an address that this
// host has not, at either end.
func deliverEarlier() [][]expr.Any {
	isTCP := ofProtocol(unix.IPPROTO_TCP)
	is := func(key expr.SocketKey, yes byte) []expr.Any {
		return []expr.Any{&expr.Socket{Key: key, Register: nft.Reg(0)}, &expr.Cmp{Op: expr.CmpOpEq, Register: nft.Reg(0), Data: []byte{yes}}}
	}
	return [][]expr.Any{
		// One that listens at any address is not one that has the connection. Of one whose
		// handshake goes on it is not known which kind it is: it is none of these.
		append(slices.Concat(isTCP, notOpening(), is(expr.SocketKeyWildcard, 1)), goBack),
		slices.Concat(isTCP, notOpening(), is(expr.SocketKeyTransparent, 1), markLocal()),
		// With SYN cookies a connection that was handed to the proxy has no socket yet.
		append(slices.Concat(isTCP, notOpening(), notCaptured()), goBack),
		slices.Concat(ofProtocol(unix.IPPROTO_UDP), is(expr.SocketKeyWildcard, 0), is(expr.SocketKeyTransparent, 1), markLocal()),
		// Neither TCP nor UDP: there is no other protocol between their numbers that is used.
		{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: nft.Reg(0)},
			&expr.Range{Op: expr.CmpOpNeq, Register: nft.Reg(0), FromData: []byte{unix.IPPROTO_TCP}, ToData: []byte{unix.IPPROTO_UDP}}, goBack,
		},
	}
}

// loadCaptured loads the bit of a connection into a register.
func loadCaptured(register uint32) []expr.Any {
	bit := binaryutil.NativeEndian.PutUint32(host.CapturedBit)
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeyMARK, Register: register},
		&expr.Bitwise{SourceRegister: register, DestRegister: register, Len: 4, Mask: bit, Xor: make([]byte, 4)},
	}
}

// notCaptured goes on for connections that were not.
func notCaptured() []expr.Any {
	return append(loadCaptured(nft.Reg(0)), &expr.Cmp{Op: expr.CmpOpEq, Register: nft.Reg(0), Data: make([]byte, 4)})
}

// noteCaptured has the connection be known as one that was. It leaves alone the registers
// of markLocal.
func noteCaptured() []expr.Any {
	const free = 9
	all, bit := binaryutil.NativeEndian.PutUint32(^uint32(host.CapturedBit)), binaryutil.NativeEndian.PutUint32(host.CapturedBit)
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeyMARK, Register: nft.Reg(free)},
		&expr.Bitwise{SourceRegister: nft.Reg(free), DestRegister: nft.Reg(free), Len: 4, Mask: all, Xor: bit}, // "or" of a bit
		&expr.Ct{Key: expr.CtKeyMARK, Register: nft.Reg(free), SourceRegister: true},
	}
}

// markLocal has a packet be delivered to this host. It leaves alone the registers in which
// the address and the port of a socket are.
func markLocal() []expr.Any {
	const free = 8
	return []expr.Any{
		&expr.Immediate{Register: nft.Reg(free), Data: binaryutil.NativeEndian.PutUint32(host.LocalMark)},
		&expr.Meta{Key: expr.MetaKeyMARK, Register: nft.Reg(free), SourceRegister: true},
		&expr.Verdict{Kind: expr.VerdictAccept},
	}
}

// commonRules let pass what is never captured, after some other rules.
func commonRules(first [][]expr.Any) [][]expr.Any {
	sentBy := func(mark uint32) []expr.Any {
		return []expr.Any{&expr.Meta{Key: expr.MetaKeyMARK, Register: nft.Reg(0)},
			&expr.Cmp{Op: expr.CmpOpEq, Register: nft.Reg(0), Data: binaryutil.NativeEndian.PutUint32(mark)}, goBack}
	}
	return append(first,
		sentBy(host.ProxyMark),
		sentBy(host.ProbeMark),
		append(toPrefix(netip.MustParsePrefix("127.0.0.0/8")), goBack),
		append(toPrefix(netip.MustParsePrefix("::1/128")), goBack),
		// Which link is meant the proxy is not told.
		append(toPrefix(netip.MustParsePrefix("fe80::/10")), goBack),
	)
}

// forHere are the types of addresses that are this host's, alone or among others.
var forHere = []uint32{unix.RTN_LOCAL, unix.RTN_BROADCAST, unix.RTN_ANYCAST, unix.RTN_MULTICAST}

// notForHere lets pass what is for this host itself: who is logged in over the interface
// stays so, and can log in again; who asks all for an address gets one.
func notForHere() (rules [][]expr.Any) {
	for _, kind := range forHere {
		rules = append(rules, []expr.Any{
			&expr.Fib{Register: nft.Reg(0), FlagDADDR: true, ResultADDRTYPE: true},
			&expr.Cmp{Op: expr.CmpOpEq, Register: nft.Reg(0), Data: binaryutil.NativeEndian.PutUint32(kind)}, goBack,
		})
	}
	return rules
}

func exceptServices() (rules [][]expr.Any) {
	for _, f := range service.EachFamily {
		rules = append(rules, append(nft.OfFamily(f),
			nft.LoadDestination(f, nft.Reg(0)), nft.LoadPort(nft.Reg(nft.Words(f))),
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: nft.Reg(nft.Words(f) + 1)},
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
	return &nftables.Set{Table: t, Name: setName(f), KeyType: nftables.MustConcatSetType(address, nftables.TypeInetService, nftables.TypeInetProto), Concatenation: true}
}

// element is an address, a port and a protocol as the sets have them: each part fills
// registers.
func element(a service.Listener) nftables.SetElement {
	key := binary.BigEndian.AppendUint16(a.Address.Addr().AsSlice(), a.Address.Port())
	return nftables.SetElement{Key: append(key, 0, 0, protocolNumber(a.Protocol), 0, 0, 0)}
}

func protocolNumber(p service.Protocol) byte {
	if p == service.UDP {
		return unix.IPPROTO_UDP
	}
	return unix.IPPROTO_TCP
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
	if e.cgroup.id != 0 {
		rule = append(rule,
			&expr.Socket{Key: expr.SocketKeyCgroupv2, Level: e.level, Register: nft.Reg(0)},
			&expr.Cmp{Op: expr.CmpOpEq, Register: nft.Reg(0), Data: binaryutil.NativeEndian.PutUint64(e.cgroup.id)})
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

// everywhere is what an entry is about that names no destinations.
var everywhere = []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)}

// rules is the chain of an entry.
func (e entry) rules() (rules [][]expr.Any) {
	for _, p := range e.Except {
		rules = append(rules, append(toPrefix(p), goBack))
	}
	destinations := e.Destinations
	if len(destinations) == 0 {
		destinations = everywhere
	}
	ports := e.Ports
	if len(ports) == 0 {
		ports = []config.PortRange{{First: 0, Last: 0xffff}}
	}
	for _, p := range destinations {
		for _, r := range ports {
			to := append(toPrefix(p), inPorts(r)...)
			if e.Mode != config.CaptureTProxy {
				rules = append(rules, append(to, e.lead(service.FamilyOf(p.Addr()))...))
				continue
			}
			for _, l4 := range e.protocols() {
				if hand := e.deliver(service.FamilyOf(p.Addr())); hand != nil {
					rules = append(rules, slices.Concat(to, ofProtocol(l4), hand))
				}
				rules = append(rules, slices.Concat(to, ofProtocol(l4), refuse(l4)))
			}
		}
	}
	return rules
}

// protocols returns the numbers of those that an entry is about.
func (e entry) protocols() (all []byte) {
	if e.TCP {
		all = append(all, unix.IPPROTO_TCP)
	}
	if e.UDP {
		all = append(all, unix.IPPROTO_UDP)
	}
	return all
}

func ofProtocol(number byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: nft.Reg(0)}, &expr.Cmp{Op: expr.CmpOpEq, Register: nft.Reg(0), Data: []byte{number}}}
}

// refuse is what becomes of a packet that could not be handed to the proxy: to let it go
// would be a way around that.
func refuse(protocol byte) []expr.Any {
	if protocol == unix.IPPROTO_TCP {
		return []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}}
	}
	return []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_PORT_UNREACH}}
}

// deliver hands a packet to a socket of the proxy as it is; nil: that has no address of
// the family. Where there is no such socket the rule goes no further.
func (e entry) deliver(f service.Family) []expr.Any {
	to, ok := e.Target(f)
	if !ok {
		return nil
	}
	port := &expr.Immediate{Register: nft.Reg(nft.Words(f)), Data: binaryutil.BigEndian.PutUint16(to.Port())}
	hand := &expr.TProxy{Family: nft.Proto(f), TableFamily: nft.Proto(f), RegPort: nft.Reg(nft.Words(f))}
	if !to.Addr().IsUnspecified() {
		hand.RegAddr = nft.Reg(0)
	}
	// The unspecified address is loaded for who reads the rule.
	return slices.Concat([]expr.Any{&expr.Immediate{Register: nft.Reg(0), Data: to.Addr().AsSlice()}, port, hand}, noteCaptured(), markLocal())
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
