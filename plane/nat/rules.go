package nat

import (
	"net/netip"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/nft"
	"github.com/pentad/pentad/service"
)

// The table, as `nft list table inet pentad` shows it:
//
//	chain prerouting { type nat hook prerouting priority dstnat
//	    ip saddr @pods4 goto pods4                    # what pods send
//	    ip daddr . meta l4proto . th dport vmap @services4
//	    (the same for IPv6)
//	}
//	chain output { type nat hook output priority dstnat
//	    meta nfproto ipv4 goto pods4                    # what connect() has not translated
//	}
//	chain pods4 {
//	    ip daddr . meta l4proto . th dport vmap @pods_to4
//	}
//	chain unserved { type nat hook prerouting priority dstnat + 50
//	    meta nfproto ipv4 goto nobody4                    # nobody has translated it
//	}
//	chain unserved_here { type nat hook output priority dstnat + 50
//	    (the same)
//	}
//	chain nobody4 {
//	    ip daddr @reserved4 fib daddr type != local goto free4
//	}
//	chain free4 {
//	    ip daddr @taken4 goto refuse                      # a service has the address
//	    drop                                              # one may have it soon
//	}
//	chain backend4-10 {                                   # services with ten slots
//	    meta mark set meta mark or 0x4000
//	    dnat to ip daddr . meta l4proto . th dport . numgen random mod 10 map @slots4
//	    dnat to ip daddr . meta l4proto . th dport . 0 map @slots4
//	}
//	chain backend4-251-hashed {                           # the same with source-hash
//	    ... jhash ip saddr mod 251 seed 0x9e3779b9 ...
//	}
//	chain raw-1-5e2b... { type filter hook prerouting priority raw
//	    ip saddr 10.244.0.0/16 ip daddr 10.244.0.0/16 ip saddr != @tracked4 ip daddr != @tracked4
//	        ip saddr != @waning4 ip daddr != @waning4 ip daddr != @vips4 fib daddr type != local notrack
//	}
//	chain postrouting { type nat hook postrouting priority srcnat
//	    meta mark and 0x4000 == 0 goto foreign
//	    meta nfproto ipv4 goto source4
//	}
//	chain foreign {                                       # others may have translated it
//	    ct status & dnat == 0 return
//	    ip saddr @untracked4 add @tracked4 { ip saddr }
//	}
//	chain source4 {
//	    meta mark set meta mark and not 0x4000
//	    ip saddr @untracked4 add @tracked4 { ip saddr }
//	    ip daddr @local4 goto near4
//	    ip saddr @pods4 return                          # replies pass here anyway
//	    masquerade
//	}
//	chain near4 {                                         # they do from here, but to
//	    ip saddr . ip daddr @hairpin4 masquerade          # a pod that reaches itself
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
const layoutVersion = "layout-5"

// The chains that are always there.
const (
	chainPrerouting  = "prerouting"
	chainOutput      = "output"
	chainUnserved    = "unserved"
	chainUnservedOwn = "unserved_here"
	chainPostrouting = "postrouting"
	chainPods4       = "pods4"
	chainPods6       = "pods6"
	chainNobody4     = "nobody4"
	chainNobody6     = "nobody6"
	chainFree4       = "free4"
	chainFree6       = "free6"
	chainForeign     = "foreign"
	chainNear4       = "near4"
	chainNear6       = "near6"
	chainSource4     = "source4"
	chainSource6     = "source6"
)

// names of the sets in the table, by setName, without the family.
var setNames = [setNameEnd]string{
	setServices: "services", setPodsTo: "pods_to", setSlots: "slots", setChoices: "choices", setMembers: "members", setSources: "sources",
	setLocal: "local", setHairpin: "hairpin", setPods: "pods", setTaken: "taken", setReserved: "reserved",
	setUntracked: "untracked", setVIPs: "vips", setTracked: "tracked", setWaning: "waning",
	setAffinity: "affinity",
}

func (s set) String() string {
	if s.family == service.V4 {
		return setNames[s.name] + "4"
	}
	return setNames[s.name] + "6"
}

// affinityPlaces bounds how many clients are remembered, for each family. Those that
// find no room are served all the same.
const affinityPlaces = 1 << 16

// trackedPlaces bounds how many clients with translated connections are known, for
// each family: as many as there are addresses in 10.0.0.0/12.
const trackedPlaces = 1 << 20

// definition is the set as the kernel has to make it.
func (s set) definition(t *nftables.Table) *nftables.Set {
	addr := nftables.TypeIPAddr
	if s.family == service.V6 {
		addr = nftables.TypeIP6Addr
	}
	listener := []nftables.SetDatatype{addr, nftables.TypeInetProto, nftables.TypeInetService}
	backend := []nftables.SetDatatype{addr, nftables.TypeInetService}
	d := &nftables.Set{Table: t, Name: s.String()}
	key := listener
	switch s.name {
	case setServices, setPodsTo:
		d.IsMap, d.DataType = true, nftables.TypeVerdict
	case setSlots:
		// A slot is a number; but nft(8) cannot list plain ones in a concatenation.
		key = append(key, nftables.TypeMark)
		d.IsMap, d.DataType = true, nftables.MustConcatSetType(backend...)
	case setChoices:
		key = append(key, nftables.TypeMark)
		d.IsMap, d.DataType = true, nftables.TypeClassID
	case setMembers:
		key = append(key, nftables.TypeClassID)
		d.IsMap, d.DataType = true, nftables.MustConcatSetType(backend...)
	case setSources:
		key = append(key, addr)
		d.Interval = true
	case setTracked:
		key = []nftables.SetDatatype{addr}
		d.Dynamic, d.Size = true, trackedPlaces
	case setLocal, setTaken, setVIPs, setWaning:
		key = []nftables.SetDatatype{addr}
	case setHairpin:
		key = []nftables.SetDatatype{addr, addr}
	case setPods, setReserved, setUntracked:
		key = []nftables.SetDatatype{addr}
		d.Interval = true
	case setAffinity:
		key = append([]nftables.SetDatatype{addr}, key...)
		d.IsMap, d.DataType = true, nftables.TypeClassID
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
		all = append(all, set{n, service.V4}, set{n, service.V6})
	}
	return all
}

// priorityLast is behind all that translates destinations: the chains of a hook are
// asked until one has translated the packet.
var priorityLast = nftables.ChainPriorityRef(*nftables.ChainPriorityNATDest + 50)

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
		{plain(chainFree4), freeRules(service.V4)},
		{plain(chainFree6), freeRules(service.V6)},
		{plain(chainNobody4), nobodyRules(service.V4)},
		{plain(chainNobody6), nobodyRules(service.V6)},
		{plain(chainPods4), [][]expr.Any{vmapRule(set{setPodsTo, service.V4})}},
		{plain(chainPods6), [][]expr.Any{vmapRule(set{setPodsTo, service.V6})}},
		{plain(chainNear4), nearRules(service.V4)},
		{plain(chainNear6), nearRules(service.V6)},
		{plain(chainSource4), sourceRules(service.V4)},
		{plain(chainSource6), sourceRules(service.V6)},
		{plain(chainForeign), foreignRules()},
		{hook(chainPrerouting, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest), preroutingRules()},
		{hook(chainOutput, nftables.ChainHookOutput, nftables.ChainPriorityNATDest), outputRules()},
		{hook(chainUnserved, nftables.ChainHookPrerouting, priorityLast), unservedRules()},
		{hook(chainUnservedOwn, nftables.ChainHookOutput, priorityLast), unservedRules()},
		{hook(chainPostrouting, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource), postroutingRules()},
	}
}

type fixedChain struct {
	chain *nftables.Chain
	rules [][]expr.Any
}

// loadListener puts the destination of a packet into registers from n on, and
// returns the next register.
func loadListener(family service.Family, n uint32) ([]expr.Any, uint32) {
	w := nft.Words(family)
	return []expr.Any{
		nft.LoadDestination(family, nft.Reg(n)),
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: nft.Reg(n + w)},
		nft.LoadPort(nft.Reg(n + w + 1)),
	}, n + w + 2
}

func lookup(in set, from uint32) *expr.Lookup {
	return &expr.Lookup{SourceRegister: from, SetName: in.String()}
}

func vmapRule(in set) []expr.Any {
	rule, _ := loadListener(in.family, 0)
	return append(rule, lookupTo(in, nft.Reg(0), unix.NFT_REG_VERDICT))
}

// definition is the chain as the kernel has to make it.
func (c chain) definition(t *nftables.Table) *nftables.Chain {
	def := &nftables.Chain{Table: t, Name: c.name()}
	if c.untracked != nil {
		def.Type, def.Hooknum, def.Priority = nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw
	}
	return def
}

func goTo(name string) expr.Any { return &expr.Verdict{Kind: expr.VerdictGoto, Chain: name} }

// byFamily returns the name of one of the two chains that a family has each.
func byFamily(family service.Family, four, six string) string {
	if family == service.V4 {
		return four
	}
	return six
}

func preroutingRules() [][]expr.Any {
	var rules [][]expr.Any
	for _, family := range service.EachFamily {
		rules = append(rules,
			append(nft.OfFamily(family), nft.LoadSource(family, nft.Reg(0)), lookup(set{setPods, family}, nft.Reg(0)), goTo(byFamily(family, chainPods4, chainPods6))),
			append(nft.OfFamily(family), vmapRule(set{setServices, family})...))
	}
	return rules
}

// outputRules serve what this host sends to listeners as it is: from a socket that is
// older than the service, or of the kernel. It is led where pods are.
func outputRules() [][]expr.Any {
	return [][]expr.Any{
		append(nft.OfFamily(service.V4), goTo(chainPods4)),
		append(nft.OfFamily(service.V6), goTo(chainPods6)),
	}
}

// unservedRules look at what begins and goes where it was sent: not this table has
// translated it, nor has somebody else who serves the Service instead.
func unservedRules() [][]expr.Any {
	return [][]expr.Any{
		append(nft.OfFamily(service.V4), goTo(chainNobody4)),
		append(nft.OfFamily(service.V6), goTo(chainNobody6)),
	}
}

// nobodyRules find out whether an address is one that only services have. Who has it
// on this host all the same serves it by rules of his own.
func nobodyRules(family service.Family) [][]expr.Any {
	w := nft.Words(family)
	rule := []expr.Any{nft.LoadDestination(family, nft.Reg(0)), lookup(set{setReserved, family}, nft.Reg(0))}
	return [][]expr.Any{append(append(rule, notLocal(w)...), goTo(byFamily(family, chainFree4, chainFree6)))}
}

// notLocal goes on if the destination is no address of this host.
func notLocal(n uint32) []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: nft.Reg(n), FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: nft.Reg(n), Data: []byte(native(unix.RTN_LOCAL))},
	}
}

// freeRules refuse what is sent to the address of a service where no listener is. To
// an address that nobody has nothing is answered: a service may have it already that
// this host has not heard of, and who tries again finds it.
func freeRules(family service.Family) [][]expr.Any {
	return [][]expr.Any{
		{nft.LoadDestination(family, nft.Reg(0)), lookup(set{setTaken, family}, nft.Reg(0)), goTo(chainRefuse)},
		{&expr.Verdict{Kind: expr.VerdictDrop}},
	}
}

// setMark changes the bit and leaves the others.
func setMark(on bool) []expr.Any {
	b := &expr.Bitwise{SourceRegister: nft.Reg(0), DestRegister: nft.Reg(0), Len: 4,
		Mask: binaryutil.NativeEndian.PutUint32(^uint32(host.TranslatedMark)), Xor: make([]byte, 4)}
	if on {
		b.Xor = binaryutil.NativeEndian.PutUint32(host.TranslatedMark)
	}
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: nft.Reg(0)}, b,
		&expr.Meta{Key: expr.MetaKeyMARK, Register: nft.Reg(0), SourceRegister: true},
	}
}

// rawRules keep what need not be tracked from conntrack. What is sent to a service has
// to be, and so have the replies: to a client whose packets are translated, here or by
// somebody else, and to this host, which may have put its own address in place of a
// client's. Which clients these are is known when they begin. What else they send is
// tracked as well: conntrack must not see one direction alone.
//
// Every packet that arrives comes here: ranges are compared, not looked up.
func rawRules(ranges []netip.Prefix) [][]expr.Any {
	var rules [][]expr.Any
	for _, pair := range pairsOf(ranges) {
		family := service.FamilyOf(pair.from.Addr())
		w := nft.Words(family)
		without := func(name setName, from uint32) *expr.Lookup {
			l := lookup(set{name, family}, from)
			l.Invert = true
			return l
		}
		rule := append(nft.OfFamily(family), nft.LoadSource(family, nft.Reg(0)))
		rule = append(append(rule, nft.InPrefix(pair.from)...), nft.LoadDestination(family, nft.Reg(0)))
		rule = append(rule, nft.InPrefix(pair.to)...)
		rule = append(rule,
			nft.LoadSource(family, nft.Reg(0)), nft.LoadDestination(family, nft.Reg(w)),
			without(setTracked, nft.Reg(0)), without(setTracked, nft.Reg(w)),
			without(setWaning, nft.Reg(0)), without(setWaning, nft.Reg(w)), without(setVIPs, nft.Reg(w)))
		rules = append(rules, append(append(rule, notLocal(2*w)...), &expr.Notrack{}))
	}
	return rules
}

// statusDNAT is IPS_DST_NAT of linux/netfilter/nf_conntrack_common.h.
const statusDNAT = 1 << 5

// note notes who begins a translated connection, if his others are not tracked.
func note(family service.Family) []expr.Any {
	return []expr.Any{
		nft.LoadSource(family, nft.Reg(0)), lookup(set{setUntracked, family}, nft.Reg(0)),
		&expr.Dynset{SrcRegKey: nft.Reg(0), SetName: set{setTracked, family}.String(), Operation: unix.NFT_DYNSET_OP_ADD},
	}
}

// foreignRules are for what this table has not translated.
func foreignRules() [][]expr.Any {
	return [][]expr.Any{
		{
			&expr.Ct{Key: expr.CtKeySTATUS, Register: nft.Reg(0)},
			&expr.Bitwise{SourceRegister: nft.Reg(0), DestRegister: nft.Reg(0), Len: 4,
				Mask: binaryutil.NativeEndian.PutUint32(statusDNAT), Xor: make([]byte, 4)},
			&expr.Cmp{Op: expr.CmpOpEq, Register: nft.Reg(0), Data: make([]byte, 4)},
			&expr.Verdict{Kind: expr.VerdictReturn},
		},
		append(nft.OfFamily(service.V4), note(service.V4)...),
		append(nft.OfFamily(service.V6), note(service.V6)...),
	}
}

func postroutingRules() [][]expr.Any {
	rules := [][]expr.Any{{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: nft.Reg(0)},
		&expr.Bitwise{SourceRegister: nft.Reg(0), DestRegister: nft.Reg(0), Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(host.TranslatedMark), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: nft.Reg(0), Data: make([]byte, 4)},
		goTo(chainForeign),
	}}
	for _, family := range service.EachFamily {
		rules = append(rules, append(nft.OfFamily(family), goTo(byFamily(family, chainSource4, chainSource6))))
	}
	return rules
}

// lookupTo looks a key up in a map; the data goes into the registers from to on.
func lookupTo(in set, from, to uint32) *expr.Lookup {
	l := lookup(in, from)
	l.DestRegister, l.IsDestRegSet = to, true
	return l
}

func sourceRules(family service.Family) [][]expr.Any {
	return [][]expr.Any{
		setMark(false),
		note(family),
		{nft.LoadDestination(family, nft.Reg(0)), lookup(set{setLocal, family}, nft.Reg(0)), goTo(byFamily(family, chainNear4, chainNear6))},
		{nft.LoadSource(family, nft.Reg(0)), lookup(set{setPods, family}, nft.Reg(0)), &expr.Verdict{Kind: expr.VerdictReturn}},
		{&expr.Masq{FullyRandom: true}},
	}
}

func nearRules(family service.Family) [][]expr.Any {
	return [][]expr.Any{{
		nft.LoadSource(family, nft.Reg(0)), nft.LoadDestination(family, nft.Reg(nft.Words(family))), lookup(set{setHairpin, family}, nft.Reg(0)), &expr.Masq{FullyRandom: true},
	}}
}

func refuseRules() [][]expr.Any {
	return [][]expr.Any{
		{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: nft.Reg(0)},
			&expr.Cmp{Op: expr.CmpOpEq, Register: nft.Reg(0), Data: []byte{unix.IPPROTO_TCP}},
			&expr.Reject{Type: unix.NFT_REJECT_TCP_RST},
		},
		{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_PORT_UNREACH}},
	}
}

// rules returns what a chain of backends does.
func (c chain) rules() [][]expr.Any {
	if c.untracked != nil {
		return rawRules(c.untracked)
	}
	if c.slots == 0 {
		return c.stick()
	}
	var rules [][]expr.Any
	if c.guarded {
		key, n := loadListener(c.family, 0)
		allowed := lookup(set{setSources, c.family}, nft.Reg(0))
		allowed.Invert = true
		rules = append(rules, append(key, nft.LoadSource(c.family, nft.Reg(n)), allowed, &expr.Verdict{Kind: expr.VerdictDrop}))
	}
	rules = append(rules, setMark(true))
	if c.affinity > 0 {
		rules = append(rules, c.again(), c.forget())
	}
	first := uint32(0)
	if c.pods {
		first = podSlots
	}
	_, n := loadListener(c.family, 0)
	for _, slot := range [][]expr.Any{
		c.draw(n, first),
		{&expr.Immediate{Register: nft.Reg(n), Data: []byte(native(first))}},
	} {
		key, n := loadListener(c.family, 0)
		rule := append(key, slot...)
		if c.affinity > 0 {
			rule = append(rule, c.toNumber(setChoices, n+1)...)
		} else {
			rule = append(rule, lookupTo(set{setSlots, c.family}, nft.Reg(0), nft.Reg(n+1)), nft.Translate(c.family, n+1))
		}
		rules = append(rules, rule)
	}
	return rules
}

// hashSeed makes the hash of a client the same on every host, so that they lead it
// to the same backend.
const hashSeed = 0x9e3779b9

// draw puts the number of a slot into a register.
func (c chain) draw(n, first uint32) []expr.Any {
	if !c.hashed {
		return []expr.Any{&expr.Numgen{Register: nft.Reg(n), Modulus: uint32(c.slots), Type: unix.NFT_NG_RANDOM, Offset: first}}
	}
	return []expr.Any{
		nft.LoadSource(c.family, nft.Reg(n+1)),
		&expr.Hash{SourceRegister: nft.Reg(n + 1), DestRegister: nft.Reg(n), Length: uint32(c.family.Length()),
			Modulus: uint32(c.slots), Seed: hashSeed, Offset: first, Type: expr.HashTypeJenkins},
	}
}

// With affinity the number of the backend is on its way from one rule to the next
// in the priority of the packet: nothing else looks at it before the packet is
// routed, and nft(8) can list it, which it could not if registers led from one
// look-up to the next.

// toNumber looks the number of a backend up with the key in the first registers
// and goes on with it. It comes back if there is no such backend any more.
func (c chain) toNumber(in setName, n uint32) []expr.Any {
	return append([]expr.Any{lookupTo(set{in, c.family}, nft.Reg(0), nft.Reg(n))}, c.goOn(n)...)
}

// goOn goes on with the number in a register.
func (c chain) goOn(n uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyPRIORITY, SourceRegister: true, Register: nft.Reg(n)},
		&expr.Verdict{Kind: expr.VerdictJump, Chain: c.sticks().name()},
	}
}

// loadClient puts the source of a packet and the home of the service into the first
// registers, and returns the next one.
func (c chain) loadClient() ([]expr.Any, uint32) {
	// Each field as long as it is without padding: nft(8) lists no other.
	w, length := nft.Words(c.family), c.family.Length()
	return []expr.Any{
		nft.LoadSource(c.family, nft.Reg(0)),
		&expr.Immediate{Register: nft.Reg(w), Data: []byte(c.home[:length])},
		&expr.Immediate{Register: nft.Reg(2 * w), Data: []byte(c.home[length : length+1])},
		&expr.Immediate{Register: nft.Reg(2*w + 1), Data: []byte(c.home[length+4 : length+6])},
	}, 2*w + 2
}

// again leads a client where it went before, if that is still there.
func (c chain) again() []expr.Any {
	rule, n := c.loadClient()
	rule = append(rule, lookupTo(set{setAffinity, c.family}, nft.Reg(0), nft.Reg(n)))
	return append(rule, c.goOn(n)...)
}

// opDelete is NFT_DYNSET_OP_DELETE of linux/netfilter/nf_tables.h.
const opDelete = 2

// forget is for a client whose backend is gone: what comes after would only
// prolong what is known.
func (c chain) forget() []expr.Any {
	// The kernel wants to be told the data of a map also to delete.
	return c.remembering(opDelete, 0)
}

// stick leads to the backend whose number is the priority of the packet, and
// remembers it for the client. That is written by a rule of its own, which may fail
// when there is no room, and before it is known whether there is such a backend: if
// not, the chain that led here has it forgotten.
func (c chain) stick() [][]expr.Any {
	rule, n := loadListener(c.family, 0)
	// The listener and the number in it are the key of the backend.
	rule = append(rule,
		&expr.Meta{Key: expr.MetaKeyPRIORITY, Register: nft.Reg(n)},
		lookupTo(set{setMembers, c.family}, nft.Reg(0), nft.Reg(n+1)),
		&expr.Immediate{Register: nft.Reg(n), Data: make([]byte, 4)},
		&expr.Meta{Key: expr.MetaKeyPRIORITY, SourceRegister: true, Register: nft.Reg(n)},
		nft.Translate(c.family, n+1))
	return [][]expr.Any{c.remembering(unix.NFT_DYNSET_OP_UPDATE, c.affinity), rule}
}

// remembering changes what is remembered of a client: the number in the priority.
func (c chain) remembering(operation uint32, timeout time.Duration) []expr.Any {
	rule, n := c.loadClient()
	return append(rule, &expr.Meta{Key: expr.MetaKeyPRIORITY, Register: nft.Reg(n)}, &expr.Dynset{
		SrcRegKey: nft.Reg(0), SrcRegData: nft.Reg(n), SetName: set{setAffinity, c.family}.String(), Operation: operation, Timeout: timeout,
	})
}
