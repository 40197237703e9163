package config

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"

	"github.com/pentad/pentad/service"
)

// Announce is how the network is told which VIPs are here.
type Announce struct {
	BGP BGP
	L2  L2
}

// BGP is the routers that are told of VIPs by BGP. The zero value tells nobody.
type BGP struct {
	AS          uint32
	RouterID    netip.Addr // invalid: an address of this host
	Peers       []Peer
	Attributes  Attributes
	Aggregates  []netip.Prefix // announced in place of the VIPs in them
	Keep        bool           // routers keep the routes when the agent ends
	RestartTime time.Duration  // for how long they do, whole seconds
}

// Peer is one router.
type Peer struct {
	Address      netip.Addr // a link-local one has its zone
	AS           uint32
	Port         uint16
	Source       netip.Addr // invalid: as the way to the peer has it
	PasswordFile string     // of TCP MD5 (RFC 2385); empty: none
	Hold         time.Duration
	Retry        time.Duration
	Multihop     int  // hops away that it may be; 0: it is on a segment of this host
	TTLSecurity  bool // GTSM, RFC 5082
	BFD          BFD
	Services     []string     // those whose VIPs it is told; none: all
	NextHops     []netip.Addr // one a family at most; none: the address of this host on its segment
	Attributes   Attributes   // what it says goes before what all peers have
}

// BFD is how closely a peer is watched. The zero value does not.
type BFD struct {
	Interval   time.Duration
	Multiplier uint8
}

// Attributes are what is said of a route.
type Attributes struct {
	Communities      []uint32
	LargeCommunities [][3]uint32
	LocalPref        *uint32 // nil: not said; of peers in the same AS only
	MED              *uint32 // nil: not said
}

// Over returns the attributes with those of o where these say nothing.
func (a Attributes) Over(o Attributes) Attributes {
	if a.Communities == nil {
		a.Communities = o.Communities
	}
	if a.LargeCommunities == nil {
		a.LargeCommunities = o.LargeCommunities
	}
	if a.LocalPref == nil {
		a.LocalPref = o.LocalPref
	}
	if a.MED == nil {
		a.MED = o.MED
	}
	return a
}

// L2 is the segments whose hosts are told of VIPs by ARP and NDP. The zero value tells
// nobody.
type L2 struct {
	Interfaces []string
	KeyFile    string // of what signs the announcers' talk among each other; empty: there is one alone
	Group      string // of announcers that share VIPs
	Priority   int    // the announcer with the highest takes what nobody has; 0 to 255
}

// Equal reports whether both are the same.
func (l L2) Equal(o L2) bool {
	return slices.Equal(l.Interfaces, o.Interfaces) && l.KeyFile == o.KeyFile && l.Group == o.Group && l.Priority == o.Priority
}

var announceSchema = schema[Announce]{what: "announce", fields: []field[Announce]{
	mapping("bgp", "mapping", "Routers are told by BGP (RFC 4271).", &bgpSchema, func(d *decoder, n *yaml.Node, to *Announce) {
		to.BGP.RestartTime = defaultRestart
		bgpSchema.decode(d, n, &to.BGP)
	}),
	mapping("l2", "mapping", "Hosts of a segment are told by ARP (RFC 826) and neighbour discovery (RFC 4861): one host has each VIP.", &l2Schema, func(d *decoder, n *yaml.Node, to *Announce) {
		d.l2Node = n
		to.L2 = L2{Group: defaultGroup, Priority: defaultPriority}
		l2Schema.decode(d, n, &to.L2)
	}),
}}

// Defaults of BGP.
const (
	defaultRestart    = 2 * time.Minute
	defaultHold       = 9 * time.Second
	defaultRetry      = 5 * time.Second
	defaultBFD        = 100 * time.Millisecond
	defaultMultiplier = 3
	bgpPort           = 179
)

var bgpSchema = schema[BGP]{what: "announce.bgp", fields: append([]field[BGP]{
	autonomousSystem("as", "The autonomous system of this host.", func(to *BGP, v uint32) { to.AS = v }).must(),
	{
		key: "routerID", kind: "IPv4 address",
		doc: "By which routers tell speakers apart. Without it the first IPv4 address of this host that is no loopback.",
		set: func(d *decoder, n *yaml.Node, to *BGP) {
			if a := d.hostAddress(n, "198.51.100.11"); a.IsValid() && !a.Is4() {
				d.errorf(n, "want an IPv4 address, such as 198.51.100.11: a router ID is one, whatever is announced")
			} else {
				to.RouterID = a
			}
		},
	},
	mappings("peers", "list of peers", "The routers.", &peerSchema, (*decoder).peers).must(),
	prefixes("aggregates", "Prefixes that are announced in place of the VIPs in them, as long as one of these would be.", func(to *BGP, v []netip.Prefix) { to.Aggregates = v }),
	word("onExit", "What becomes of routes when the agent ends. `withdraw`: routers forget them, after a moment in which they carry the community GRACEFUL_SHUTDOWN. "+
		"`keep`: routers that can do graceful restart (RFC 4724) keep them for `restartTime`, also when the agent is killed: packets go on to this host, which forwards them without it.",
		[]string{"withdraw", "keep"}, func(to *BGP, i int) { to.Keep = i == 1 }).or("withdraw"),
	span("restartTime", "For how long routers keep routes with `onExit: keep`.", time.Second, 4095*time.Second, time.Second, func(to *BGP, v time.Duration) { to.RestartTime = v }).or(Duration(defaultRestart)),
}, attributeFields(func(to *BGP) *Attributes { return &to.Attributes })...)}

var peerSchema = schema[Peer]{what: "a peer", fields: append([]field[Peer]{
	{
		key: "address", kind: "address", required: true, doc: "Its address; a link-local one with its interface: `fe80::1%eth0`.",
		set: func(d *decoder, n *yaml.Node, to *Peer) {
			to.Address = d.hostAddress(n, "192.0.2.1")
			if a := to.Address; a.Is6() && a.IsLinkLocalUnicast() && a.Zone() == "" {
				d.errorf(n, "%s is on every segment: write it with the interface, as %s%%eth0", a, a)
			}
		},
	},
	autonomousSystem("as", "Its autonomous system.", func(to *Peer, v uint32) { to.AS = v }).must(),
	number("port", "port", "The port at which it listens.", 1, 65535, func(to *Peer, v int) { to.Port = uint16(v) }).or(strconv.Itoa(bgpPort)),
	{
		key: "source", kind: "address", doc: "The address of this host from which it is spoken to. Without it as the route to the peer has it.",
		set: func(d *decoder, n *yaml.Node, to *Peer) { to.Source = d.hostAddress(n, "192.0.2.11") },
	},
	text("passwordFile", "path", "Its first line is the password of TCP MD5 (RFC 2385). Nobody but its owner may read or write it.", "the path of a file",
		func(to *Peer, v string) { to.PasswordFile = v }),
	span("holdTime", "A peer that says nothing for so long is gone. A third of it is how often we say something.", 3*time.Second, 65535*time.Second, time.Second,
		func(to *Peer, v time.Duration) { to.Hold = v }).or(Duration(defaultHold)),
	span("retry", "How long to wait before a connection is tried again.", 2*time.Second, time.Hour, time.Second,
		func(to *Peer, v time.Duration) { to.Retry = v }).or(Duration(defaultRetry)),
	number("multihop", "hops", "How many hops away a peer of another autonomous system may be. Without it it has to be on a segment of this host.", 2, 255, func(to *Peer, v int) { to.Multihop = v }),
	truth("ttlSecurity", "Packets of it are taken only if they have passed no router (RFC 5082). It has to be set on the peer, too.", func(to *Peer, v bool) { to.TTLSecurity = v }).or("false"),
	mapping("bfd", "mapping", "A peer that does not answer is noticed within a fraction of a second (RFC 5880, 5881). `{}` takes the defaults.", &bfdSchema,
		func(d *decoder, n *yaml.Node, to *Peer) {
			to.BFD = BFD{defaultBFD, defaultMultiplier}
			bfdSchema.decode(d, n, &to.BFD)
		}),
	{
		key: "services", kind: "list of names", doc: "The services whose VIPs it is told. Without this key all.",
		set: func(d *decoder, n *yaml.Node, to *Peer) {
			d.list(n, "a list of services, such as [web]", func(e *yaml.Node) {
				if v, ok := d.text(e, "the name of a service"); ok {
					to.Services = append(to.Services, v)
				}
			})
			if n.Kind == yaml.SequenceNode && len(n.Content) == 0 {
				d.errorf(n, "a peer that is told of no service has no use; without this key it is told of all")
			}
		},
	},
	{
		key: "nextHop", kind: "address, or list of addresses",
		doc: "Where the peer is told to send packets, one address a family. Without it this host's address on the segment of the peer.",
		set: func(d *decoder, n *yaml.Node, to *Peer) {
			d.oneOrMore(n, func(e *yaml.Node) {
				a := d.hostAddress(e, "192.0.2.11")
				if a.IsValid() && slices.ContainsFunc(to.NextHops, func(o netip.Addr) bool { return o.Is4() == a.Is4() }) {
					d.errorf(e, "there is a next hop of this family already; a route has one")
				} else if a.IsValid() {
					to.NextHops = append(to.NextHops, a)
				}
			})
		},
	},
}, attributeFields(func(to *Peer) *Attributes { return &to.Attributes })...)}

var bfdSchema = schema[BFD]{what: "bfd", fields: []field[BFD]{
	span("interval", "Between packets, in both directions.", 10*time.Millisecond, time.Minute, time.Millisecond, func(to *BFD, v time.Duration) { to.Interval = v }).or(Duration(defaultBFD)),
	number("multiplier", "1 to 255", "Of intervals without a packet after which the peer is gone.", 1, 255, func(to *BFD, v int) { to.Multiplier = uint8(v) }).or(strconv.Itoa(defaultMultiplier)),
}}

// Defaults of L2.
const (
	defaultGroup    = "default"
	defaultPriority = 100
)

var l2Schema = schema[L2]{what: "announce.l2", fields: []field[L2]{
	{
		key: "interfaces", kind: "list of names", required: true, doc: "At which segments. A VIP is announced at all of them.",
		set: func(d *decoder, n *yaml.Node, to *L2) { to.Interfaces = d.interfaces(n, "announce.l2") },
	},
	text("keyFile", "path", "Its first line is the key that all hosts have which may announce the same VIPs: they find each other on the segment, by signed messages "+
		"(Ethernet type 0x88b5), and one of them has each VIP. Nobody but its owner may read or write it. Without it this host is the only one.", "the path of a file",
		func(to *L2, v string) { to.KeyFile = v }),
	text("group", "name", "Hosts with another group have other VIPs.", "a name", func(to *L2, v string) { to.Group = v }).or(defaultGroup),
	number("priority", "0 to 255", "What nobody has goes to the host with the highest. One that has a VIP keeps it, whoever comes.", 0, 255, func(to *L2, v int) { to.Priority = v }).or(strconv.Itoa(defaultPriority)),
}}

// autonomousSystem is a key that holds the number of one: RFC 6793.
func autonomousSystem[T any](key, doc string, set func(*T, uint32)) field[T] {
	return field[T]{key: key, kind: "number", doc: doc, low: 1, high: 1<<32 - 2, set: func(d *decoder, n *yaml.Node, to *T) {
		if v, ok := d.integer(n, 1, 1<<32-2); ok {
			set(to, uint32(v))
		}
	}}
}

// attributeFields are the keys about what is said of routes.
func attributeFields[T any](of func(*T) *Attributes) []field[T] {
	any32 := func(key, doc string, set func(*Attributes, *uint32)) field[T] {
		return field[T]{key: key, kind: "number", doc: doc, low: 0, high: 1<<32 - 1, set: func(d *decoder, n *yaml.Node, to *T) {
			if v, ok := d.integer(n, 0, 1<<32-1); ok {
				u := uint32(v)
				set(of(to), &u)
			}
		}}
	}
	return []field[T]{
		{
			key: "communities", kind: "list of communities",
			doc: "Communities of the routes: `65001:100`, `large:65001:1:2` (RFC 8092), or a well-known one by its name: `no-export`, `no-advertise`, `graceful-shutdown`, `blackhole`.",
			set: func(d *decoder, n *yaml.Node, to *T) {
				a := of(to)
				a.Communities, a.LargeCommunities = []uint32{}, [][3]uint32{}
				d.list(n, "a list of communities, such as [65001:100]", func(e *yaml.Node) { d.community(e, a) })
			},
		},
		any32("localPref", "How much a router of the same autonomous system prefers these routes.", func(a *Attributes, v *uint32) { a.LocalPref = v }),
		any32("med", "How little a router of another autonomous system prefers them (MULTI_EXIT_DISC).", func(a *Attributes, v *uint32) { a.MED = v }),
	}
}

// Well-known communities (RFC 1997, 7999, 8326).
var knownCommunities = map[string]uint32{
	"no-export": 0xffffff01, "no-advertise": 0xffffff02, "no-export-subconfed": 0xffffff03, "blackhole": 0xffff029a, "graceful-shutdown": 0xffff0000,
}

func (d *decoder) community(n *yaml.Node, to *Attributes) {
	v, ok := d.text(n, "a community, such as 65001:100")
	if !ok {
		return
	}
	if known, ok := knownCommunities[v]; ok {
		to.Communities = append(to.Communities, known)
		return
	}
	numbers, isLarge := strings.CutPrefix(v, "large:")
	parts := strings.Split(numbers, ":")
	bits := 16
	if isLarge {
		bits = 32
	}
	values := make([]uint32, 0, 3)
	for _, p := range parts {
		u, err := strconv.ParseUint(p, 10, bits)
		if err != nil {
			break
		}
		values = append(values, uint32(u))
	}
	switch {
	case isLarge && len(parts) == 3 && len(values) == 3:
		to.LargeCommunities = append(to.LargeCommunities, [3]uint32(values))
	case !isLarge && len(parts) == 2 && len(values) == 2:
		to.Communities = append(to.Communities, values[0]<<16|values[1])
	default:
		d.errorf(n, "want a community such as 65001:100, large:65001:1:2, or no-export, found %q", shorten(v))
	}
}

// hostAddress reads the address of one host.
func (d *decoder) hostAddress(n *yaml.Node, example string) netip.Addr {
	want := "an address, such as " + example
	v, ok := d.text(n, want)
	if !ok {
		return netip.Addr{}
	}
	a, err := netip.ParseAddr(v)
	switch {
	case err != nil:
		d.errorf(n, "want %s, found %q", want, shorten(v))
	case a.Is4In6():
		d.errorf(n, "write %s as IPv4: %s", a, a.Unmap())
	case a.IsUnspecified() || a.IsMulticast():
		d.errorf(n, "%s is the address of no host", a)
	default:
		return a
	}
	return netip.Addr{}
}

func (d *decoder) peers(n *yaml.Node, to *BGP) {
	d.list(n, "a list of peers", func(e *yaml.Node) {
		p := Peer{Port: bgpPort, Hold: defaultHold, Retry: defaultRetry}
		seen := peerSchema.decode(d, e, &p)
		if !p.Address.IsValid() || p.AS == 0 {
			return // it is said already
		}
		switch {
		case slices.ContainsFunc(to.Peers, func(o Peer) bool { return o.Address == p.Address }):
			d.errorf(e, "peer %s stands there twice", p.Address)
		case p.Source.IsValid() && p.Source.Is4() != p.Address.Is4():
			d.errorf(seen["source"], "peer %s: the source %s is of another family", p.Address, p.Source)
		case p.BFD != BFD{} && p.Multihop > 0:
			d.errorf(seen["bfd"], "peer %s: BFD watches a peer on the same segment (RFC 5881); with \"multihop\" it is another", p.Address)
		case p.TTLSecurity && p.Multihop > 0:
			d.errorf(seen["ttlSecurity"], "peer %s: \"ttlSecurity\" is for a peer on the same segment; with \"multihop\" it is another", p.Address)
		}
		d.peerNodes = append(d.peerNodes, e)
		to.Peers = append(to.Peers, p)
	})
	if n.Kind == yaml.SequenceNode && len(n.Content) == 0 {
		d.errorf(n, "somebody has to be told: announce.bgp needs at least one peer")
	}
}

// checkAnnounce finds what peers are said that cannot be.
func (d *decoder) checkAnnounce(c *Config) {
	b := &c.Announce.BGP
	for i, p := range b.Peers {
		at := d.peerNodes[i]
		if p.AS != b.AS && p.Attributes.LocalPref != nil {
			d.errorf(at, "peer %s: localPref is for routers of the same autonomous system, %d, and this one is of %d; use med, or communities", p.Address, b.AS, p.AS)
		}
		if p.AS == b.AS && p.Multihop > 0 {
			d.errorf(at, "peer %s: \"multihop\" is for routers of another autonomous system; one of the same, %d, may be anywhere", p.Address, b.AS)
		}
		for _, name := range p.Services {
			if c.Source.Kubernetes == nil && !slices.ContainsFunc(c.Services, func(s *service.Service) bool { return s.Name == name }) {
				d.errorf(at, "peer %s: there is no service %q", p.Address, shorten(name))
			}
		}
		if b.Keep && p.BFD != (BFD{}) {
			d.warnings = append(d.warnings, d.problem(at, "peer %s: with \"onExit: keep\" and BFD most routers drop the routes all the same when the agent ends: BFD ends with it", p.Address))
		}
	}
}

// needsOfAnnounce lists the files that announcers name.
func (d *decoder) needsOfAnnounce(c *Config) (all []need) {
	if path := c.Announce.L2.KeyFile; path != "" {
		all = append(all, need{d.problem(d.l2Node, "announce.l2: there is no file of a key %s on this host", path), func(string) bool { return isThere(path) }})
	}
	for i, p := range c.Announce.BGP.Peers {
		if path := p.PasswordFile; path != "" {
			all = append(all, need{d.problem(d.peerNodes[i], "peer %s: there is no password file %s on this host", p.Address, path), func(string) bool { return isThere(path) }})
		}
	}
	return all
}
