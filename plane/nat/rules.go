package nat

import (
	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The table, as `nft list table inet pentad` shows it:
//
//	chain prerouting { type nat hook prerouting priority dstnat
//	    ip saddr @guests4 goto guests4                    # what guests send
//	    ip daddr . meta l4proto . th dport vmap @services4
//	    (the same for IPv6)
//	}
//	chain guests4 {
//	    ip daddr . meta l4proto . th dport vmap @guests_to4
//	}
//	chain backend4-10 {                                   # services with ten slots
//	    dnat to ip daddr . meta l4proto . th dport . numgen random mod 10 map @slots4
//	    dnat to ip daddr . meta l4proto . th dport . 0 map @slots4
//	}
//	chain postrouting { type nat hook postrouting priority srcnat
//	    ct status dnat, ct original ip daddr . meta l4proto . ct original proto-dst . 0 @slots4 goto source4
//	}
//	chain source4 {
//	    ip saddr . ip daddr @hairpin4 masquerade          # a guest that reaches itself
//	    ip daddr @local4 return                           # replies pass here anyway
//	    ip saddr @guests4 return                          # these, too
//	    masquerade
//	}
//
// Rules never change: services are elements. The second rule of a chain of
// backends is for packets that are between the two look-ups while a transaction
// makes a service smaller. Connections are remembered by conntrack, so that only
// the first packet of each comes here.

// TableName is the one table, of family inet.
const TableName = "pentad"

// layoutVersion numbers the meaning of chains and sets. A table of another
// number is replaced, in one transaction.
const layoutVersion = "layout-1"

// The chains that are always there.
const (
	chainPrerouting  = "prerouting"
	chainPostrouting = "postrouting"
	chainGuests4     = "guests4"
	chainGuests6     = "guests6"
	chainSource4     = "source4"
	chainSource6     = "source6"
)

// reg is the n-th register of four bytes.
func reg(n uint32) uint32 { return unix.NFT_REG32_00 + n }

// names of the sets in the table, by setName, without the family.
var setNames = [setNameEnd]string{
	setServices: "services", setGuestsTo: "guests_to", setSlots: "slots", setAlive: "alive", setSources: "sources",
	setLocal: "local", setHairpin: "hairpin", setGuests: "guests", setAffinity: "affinity",
}

func (s set) String() string {
	if s.v4 {
		return setNames[s.name] + "4"
	}
	return setNames[s.name] + "6"
}

// affinityPlaces bounds how many clients are remembered, for each family.
const affinityPlaces = 65536

// definition is the set as the kernel has to make it.
func (s set) definition(t *nftables.Table) *nftables.Set {
	addr := nftables.TypeIPAddr
	if !s.v4 {
		addr = nftables.TypeIP6Addr
	}
	listener := []nftables.SetDatatype{addr, nftables.TypeInetProto, nftables.TypeInetService}
	backend := []nftables.SetDatatype{addr, nftables.TypeInetService}
	d := &nftables.Set{Table: t, Name: s.String()}
	key := listener
	switch s.name {
	case setServices, setGuestsTo:
		d.IsMap, d.DataType = true, nftables.TypeVerdict
	case setSlots:
		key = append(key, nftables.TypeInteger)
		d.IsMap, d.DataType = true, nftables.MustConcatSetType(backend...)
	case setAlive:
		key = append(key, backend...)
	case setSources:
		key = append(key, addr)
		d.Interval = true
	case setLocal:
		key = []nftables.SetDatatype{addr}
	case setHairpin:
		key = []nftables.SetDatatype{addr, addr}
	case setGuests:
		key = []nftables.SetDatatype{addr}
		d.Interval = true
	case setAffinity:
		key = append([]nftables.SetDatatype{addr}, key...)
		d.IsMap, d.DataType = true, nftables.MustConcatSetType(backend...)
		d.Dynamic, d.HasTimeout, d.Size = true, true, affinityPlaces
	}
	if len(key) == 1 {
		d.KeyType = key[0]
	} else {
		d.KeyType, d.Concatenation = nftables.MustConcatSetType(key...), true
	}
	return d
}

func allSets() []set {
	var all []set
	for n := range setNameEnd {
		all = append(all, set{n, true}, set{n, false})
	}
	return all
}

// fixedChains are the chains that are always there, with their rules.
func fixedChains(t *nftables.Table) []fixedChain {
	accept := nftables.ChainPolicyAccept
	hook := func(name string, at *nftables.ChainHook, priority *nftables.ChainPriority) *nftables.Chain {
		return &nftables.Chain{Table: t, Name: name, Type: nftables.ChainTypeNAT, Hooknum: at, Priority: priority, Policy: &accept}
	}
	plain := func(name string) *nftables.Chain { return &nftables.Chain{Table: t, Name: name} }
	// A chain comes before those that lead to it.
	return []fixedChain{
		{plain(layoutVersion), nil},
		{plain(chainRefuse), refuseRules()},
		{plain(chainDrop), [][]expr.Any{{&expr.Verdict{Kind: expr.VerdictDrop}}}},
		{plain(chainGuests4), [][]expr.Any{vmapRule(set{setGuestsTo, true})}},
		{plain(chainGuests6), [][]expr.Any{vmapRule(set{setGuestsTo, false})}},
		{plain(chainSource4), sourceRules(true)},
		{plain(chainSource6), sourceRules(false)},
		{hook(chainPrerouting, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest), preroutingRules()},
		{hook(chainPostrouting, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource), postroutingRules()},
	}
}

type fixedChain struct {
	chain *nftables.Chain
	rules [][]expr.Any
}

func ofFamily(v4 bool) []expr.Any {
	proto := byte(unix.NFPROTO_IPV6)
	if v4 {
		proto = unix.NFPROTO_IPV4
	}
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg(0)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg(0), Data: []byte{proto}},
	}
}

// words is how many registers an address takes.
func words(v4 bool) uint32 { return uint32(addressLength(v4)) / 4 }

func loadSource(v4 bool, to uint32) expr.Any {
	if v4 {
		return &expr.Payload{DestRegister: to, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4}
	}
	return &expr.Payload{DestRegister: to, Base: expr.PayloadBaseNetworkHeader, Offset: 8, Len: 16}
}

func loadDestination(v4 bool, to uint32) expr.Any {
	if v4 {
		return &expr.Payload{DestRegister: to, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4}
	}
	return &expr.Payload{DestRegister: to, Base: expr.PayloadBaseNetworkHeader, Offset: 24, Len: 16}
}

// loadListener puts the destination of a packet into registers from n on, and
// returns the next register.
func loadListener(v4 bool, n uint32) ([]expr.Any, uint32) {
	w := words(v4)
	return []expr.Any{
		loadDestination(v4, reg(n)),
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg(n + w)},
		// The destination port has the same place in TCP (RFC 9293, 3.1) and UDP (RFC 768).
		&expr.Payload{DestRegister: reg(n + w + 1), Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
	}, n + w + 2
}

func lookup(in set, from uint32) *expr.Lookup {
	return &expr.Lookup{SourceRegister: from, SetName: in.String()}
}

func vmapRule(in set) []expr.Any {
	rule, _ := loadListener(in.v4, 0)
	l := lookup(in, reg(0))
	l.DestRegister, l.IsDestRegSet = unix.NFT_REG_VERDICT, true
	return append(rule, l)
}

func goTo(name string) expr.Any { return &expr.Verdict{Kind: expr.VerdictGoto, Chain: name} }

func preroutingRules() [][]expr.Any {
	var rules [][]expr.Any
	for _, v4 := range []bool{true, false} {
		guests := chainGuests6
		if v4 {
			guests = chainGuests4
		}
		rules = append(rules,
			append(ofFamily(v4), loadSource(v4, reg(0)), lookup(set{setGuests, v4}, reg(0)), goTo(guests)),
			append(ofFamily(v4), vmapRule(set{setServices, v4})...))
	}
	return rules
}

// statusDNAT is IPS_DST_NAT of linux/netfilter/nf_conntrack_common.h.
const statusDNAT = 1 << 5

// postroutingRules find what this table has translated: conntrack knows where a
// connection wanted to go, and the slots know whether that is a service. No mark
// is used, because others use them.
func postroutingRules() [][]expr.Any {
	rules := [][]expr.Any{{
		&expr.Ct{Key: expr.CtKeySTATUS, Register: reg(0)},
		&expr.Bitwise{SourceRegister: reg(0), DestRegister: reg(0), Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(statusDNAT), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg(0), Data: make([]byte, 4)},
		&expr.Verdict{Kind: expr.VerdictReturn},
	}}
	for _, v4 := range []bool{true, false} {
		source := chainSource6
		if v4 {
			source = chainSource4
		}
		for _, slot := range []uint32{0, guestSlots} {
			w := words(v4)
			// In a table of family inet the address is sixteen bytes, of which
			// IPv4 uses four; what follows overwrites the rest.
			rules = append(rules, append(ofFamily(v4),
				&expr.Ct{Key: expr.CtKeyDST, Register: reg(0)},
				&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg(w)},
				&expr.Ct{Key: expr.CtKeyPROTODST, Register: reg(w + 1)},
				&expr.Immediate{Register: reg(w + 2), Data: []byte(native(slot))},
				toBackend(v4, reg(0), w+3),
				goTo(source)))
		}
	}
	return rules
}

// toBackend looks a slot up; the backend goes into the registers from n on.
func toBackend(v4 bool, from, n uint32) expr.Any {
	l := lookup(set{setSlots, v4}, from)
	l.DestRegister, l.IsDestRegSet = reg(n), true
	return l
}

func sourceRules(v4 bool) [][]expr.Any {
	w := words(v4)
	masquerade := &expr.Masq{FullyRandom: true}
	leave := &expr.Verdict{Kind: expr.VerdictReturn}
	return [][]expr.Any{
		{loadSource(v4, reg(0)), loadDestination(v4, reg(w)), lookup(set{setHairpin, v4}, reg(0)), masquerade},
		{loadDestination(v4, reg(0)), lookup(set{setLocal, v4}, reg(0)), leave},
		{loadSource(v4, reg(0)), lookup(set{setGuests, v4}, reg(0)), leave},
		{masquerade},
	}
}

func refuseRules() [][]expr.Any {
	return [][]expr.Any{
		{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg(0)},
			&expr.Cmp{Op: expr.CmpOpEq, Register: reg(0), Data: []byte{unix.IPPROTO_TCP}},
			&expr.Reject{Type: unix.NFT_REJECT_TCP_RST},
		},
		{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_PORT_UNREACH}},
	}
}

func translate(v4 bool, n uint32) expr.Any {
	proto := uint32(unix.NFPROTO_IPV6)
	if v4 {
		proto = unix.NFPROTO_IPV4
	}
	return &expr.NAT{Type: expr.NATTypeDestNAT, Family: proto, RegAddrMin: reg(n), RegProtoMin: reg(n + words(v4)), Specified: true}
}

// rules returns what a chain of backends does. In a chain with affinity the
// registers are laid out so that what one look-up writes completes the key of
// the next: client, listener, backend.
func (c chain) rules() [][]expr.Any {
	var rules [][]expr.Any
	w := words(c.v4)
	if c.guarded {
		key, n := loadListener(c.v4, 0)
		allowed := lookup(set{setSources, c.v4}, reg(0))
		allowed.Invert = true
		rules = append(rules, append(key, loadSource(c.v4, reg(n)), allowed, &expr.Verdict{Kind: expr.VerdictDrop}))
	}
	first := uint32(0)
	if c.guests {
		first = guestSlots
	}
	if c.affinity > 0 {
		rules = append(rules, c.again())
	}
	slots := []expr.Any{
		&expr.Numgen{Register: 0, Modulus: uint32(c.slots), Type: unix.NFT_NG_RANDOM, Offset: first},
		&expr.Immediate{Data: []byte(native(first))},
	}
	for i, slot := range slots {
		at := uint32(0)
		if c.affinity > 0 {
			at = w
		}
		rule, n := loadListener(c.v4, at)
		if i == 0 {
			slot.(*expr.Numgen).Register = reg(n)
		} else {
			slot.(*expr.Immediate).Register = reg(n)
		}
		backend := n + 1
		if c.affinity > 0 {
			// The slot stands where the backend comes: the key of affinity is before it.
			rule = append([]expr.Any{loadSource(c.v4, reg(0))}, rule...)
			backend = n
		}
		rule = append(rule, slot, toBackend(c.v4, reg(at), backend))
		if c.affinity > 0 {
			// An update alone leaves the backend that is there, which is gone.
			rule = append(rule, c.noteClient(opDelete, 0), c.noteClient(unix.NFT_DYNSET_OP_UPDATE, reg(backend)))
		}
		rules = append(rules, append(rule, translate(c.v4, backend)))
	}
	return rules
}

// opDelete is NFT_DYNSET_OP_DELETE of linux/netfilter/nf_tables.h.
const opDelete = 2

// again leads a client where it went before, if that is still there.
func (c chain) again() []expr.Any {
	w := words(c.v4)
	rule, n := loadListener(c.v4, w)
	rule = append([]expr.Any{loadSource(c.v4, reg(0))}, rule...)
	known := lookup(set{setAffinity, c.v4}, reg(0))
	known.DestRegister, known.IsDestRegSet = reg(n), true
	return append(rule, known, lookup(set{setAlive, c.v4}, reg(w)),
		c.noteClient(unix.NFT_DYNSET_OP_UPDATE, reg(n)), translate(c.v4, n))
}

// noteClient updates or deletes what is known of a client, whose key lies in the
// first registers.
func (c chain) noteClient(operation, data uint32) expr.Any {
	d := &expr.Dynset{SrcRegKey: reg(0), SrcRegData: data, SetName: set{setAffinity, c.v4}.String(), Operation: operation}
	if data != 0 {
		d.Timeout = c.affinity
	}
	return d
}
