// Package service is the heart of pentad: what a service is, which of its
// backends take connections, and the immutable Snapshot of all of them that
// sources produce and planes install.
//
// It is pure: it makes no system call, reads no clock, and knows neither the
// file that a service came from nor the kernel that it goes to.
package service

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Protocol is a transport protocol by its IANA number.
type Protocol uint8

// The protocols that a listener can have.
const (
	TCP Protocol = 6
	UDP Protocol = 17
)

// String returns "tcp" or "udp".
func (p Protocol) String() string {
	switch p {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	}
	return fmt.Sprintf("protocol %d", uint8(p))
}

// From is a set of the clients that a listener answers, by where they are. The
// zero value is Anywhere.
type From uint8

// The places of clients.
const (
	// FromSockets are the sockets of this host, those of its pods included.
	FromSockets From = 1 << iota
	// FromHost are the sockets in the network namespace of the host itself.
	FromHost
	// FromPods are packets that pods of this host send: what has an
	// address here but no socket that the kernel could translate, such as a
	// virtual machine.
	FromPods
	// FromWorld are packets that arrive from other hosts.
	FromWorld

	// Anywhere is all of them.
	Anywhere = FromSockets | FromHost | FromPods | FromWorld
)

// Has reports whether clients in any of these places are answered.
func (f From) Has(place From) bool { return f == 0 || f&place != 0 }

// Listener is one virtual address of a service. It is comparable; the address
// is never an IPv4-mapped IPv6 address. Several services may have the same
// address and protocol, as long as none of their clients is the same.
type Listener struct {
	Address  netip.AddrPort
	Protocol Protocol
	From     From

	// Held keeps sockets of the host from binding this port at this address:
	// what they would wait for comes here (a NodePort).
	Held bool
	// Guarded listeners answer packets from the service's Sources only.
	Guarded bool
	// Public listeners are at the address of a load balancer, of which the network may
	// be told; the file does not say so, there every listener is.
	Public bool
}

// At is the listener as a connection finds it: its address and protocol alone.
func (l Listener) At() Listener { return Listener{Address: l.Address, Protocol: l.Protocol} }

// String writes the listener as the configuration does: TCP, the default, is
// not named.
func (l Listener) String() string {
	if l.Protocol == TCP {
		return l.Address.String()
	}
	return l.Address.String() + "/" + l.Protocol.String()
}

// Compare orders listeners by address, port, protocol and clients.
func (l Listener) Compare(o Listener) int {
	return cmp.Or(l.Address.Compare(o.Address), cmp.Compare(l.Protocol, o.Protocol), cmp.Compare(l.From, o.From))
}

// Balance is how a backend is chosen for a new connection.
type Balance uint8

// The ways to choose.
const (
	// Random chooses by weight, anew for every connection.
	Random Balance = iota
	// SourceHash keeps a client with its backend while others come and go.
	SourceHash
	// LeastConnections draws two by weight and takes the one with fewer
	// connections for its weight.
	LeastConnections
	// LeastLatency is LeastConnections with connections multiplied by the
	// latency of the backend.
	LeastLatency
)

// Balances are the words of the configuration, by Balance.
var Balances = []string{"random", "source-hash", "least-connections", "least-latency"}

// String returns the word of the configuration.
func (b Balance) String() string {
	if int(b) < len(Balances) {
		return Balances[b]
	}
	return fmt.Sprintf("balance %d", uint8(b))
}

// OnDown is what happens to the connections to a backend that fails its probe
// or is removed.
type OnDown uint8

// What can happen.
const (
	// Reset closes them at once, so that clients connect anew.
	Reset OnDown = iota
	// Keep leaves them alone.
	Keep
)

// Forward is what becomes of packets to a service that arrive from elsewhere, or that
// come from guests of this host that have no sockets here.
type Forward uint8

// The ways to forward. The zero value is what a node of a cluster does.
const (
	ForwardNAT  Forward = iota // their destination is translated
	ForwardNone                // nothing: only sockets of this host see the service
	// ForwardDirect sends them on, unchanged but for their link-layer addresses, to real
	// servers that have the address of the service, too (LVS-DR).
	ForwardDirect
)

// Forwards are the words of the configuration, by Forward.
var Forwards = []string{"nat", "none", "direct"}

// String returns the word of the configuration.
func (f Forward) String() string {
	if int(f) < len(Forwards) {
		return Forwards[f]
	}
	return fmt.Sprintf("forward %d", uint8(f))
}

// OnDowns are the words of the configuration, by OnDown.
var OnDowns = []string{"reset", "keep"}

// String returns the word of the configuration.
func (o OnDown) String() string {
	if int(o) < len(OnDowns) {
		return OnDowns[o]
	}
	return fmt.Sprintf("onDown %d", uint8(o))
}

// Ranges of a Breaker and of the times around connections.
const (
	MaxConnections    = 1 << 30
	MaxFailures       = 1000
	MaxEjection       = time.Hour
	MaxConnectTimeout = time.Minute
	MaxSlowStart      = time.Hour
)

// Breaker keeps connections away from a backend that is full or fails. The
// kernel acts on it by itself. It is comparable; the zero value does nothing.
type Breaker struct {
	MaxConnections int           // per backend; 0: no limit
	Failures       int           // failed connects in a row that eject a backend; 0: never
	Ejection       time.Duration // of the first; the next ones last up to ten times as long; whole ms
	MaxEjected     int           // percent of a group; past it nothing of the group counts as ejected
}

// Ranges of a backend's settings.
const (
	DefaultWeight = 100
	MaxWeight     = 65535
	MaxGroup      = 255
	MaxZone       = 63
)

// Backend is one real address of a service.
type Backend struct {
	Address netip.AddrPort
	Weight  uint32 // 0 to MaxWeight; 0 takes no new connections
	Group   uint32 // 0 to MaxGroup; a higher one serves when no lower one can
	Zone    string // at most MaxZone bytes
	Local   bool   // on this host: what it answers passes here, whoever asked

	// Drained and Down are state, not configuration: set by the operator
	// and by the probe.
	Drained bool
	Down    bool

	// Unserving says of a backend without weight that it answers nobody, as
	// its source knows: who sends it datagrams goes elsewhere at once.
	Unserving bool

	// DrainUntil, in Unix seconds, is when what is left of a drained
	// backend's connections is closed; 0: never. DrainOver says that it is
	// past.
	DrainOver  bool
	DrainUntil uint32
}

// Usable reports whether the backend could take new connections if its group
// were the one that serves.
func (b Backend) Usable() bool { return !b.Down && !b.Drained && b.Weight > 0 }

// State is what a backend does at the moment.
type State uint8

// The states of a backend. Those that depend on its load are told by Choose alone.
const (
	// Serving takes new connections.
	Serving State = iota
	// Standby could serve, but a lower group does.
	Standby
	// Drained takes no new connections; those that it has go on.
	Drained
	// Down failed its probe.
	Down
	// Ejected is avoided after failed connects.
	Ejected
	// Full has as many connections as its service's breaker allows.
	Full
	// WeightZero takes no new connections because its configuration says so. States
	// counts it as Drained.
	WeightZero
)

// EachState is all of them, in the order in which people want to see them.
var EachState = []State{Serving, Standby, Ejected, Full, WeightZero, Drained, Down}

var states = []string{"serving", "standby", "drained", "down", "ejected", "full", "weight 0"}

// String returns the state in lower case.
func (s State) String() string {
	if int(s) < len(states) {
		return states[s]
	}
	return fmt.Sprintf("state %d", uint8(s))
}

// Service is a set of virtual addresses and the backends behind them. It is
// immutable once it is part of a Snapshot.
type Service struct {
	Name      string
	Source    Source     // where it comes from
	Listeners []Listener // sorted
	Balance   Balance
	Affinity  time.Duration // whole seconds; 0: none
	Keepalive Keepalive     // of TCP connections; zero: the application's business
	Backends  []Backend     // in the order of the configuration
	Health    Health
	Breaker   Breaker
	// ConnectTimeout is the first retransmission timer of a SYN, in whole
	// ms; a SYN that is not answered within it is a failed connect. 0: the
	// host's, one second.
	ConnectTimeout time.Duration
	SlowStart      time.Duration // how long a backend that is new or back takes less than its share; 0: none
	OnDown         OnDown
	Forward        Forward
	Silent         bool // no flow events
	// Sources are who may reach the guarded listeners from outside this host.
	Sources []netip.Prefix // sorted

	// Elsewhere says of which families other hosts have backends: packets that find
	// none here are dropped, not refused, so that their sender looks elsewhere.
	Elsewhere Families

	// Of is the object that this service is a part of; nil: it is one by itself.
	Of *Origin
}

// Origin is an object from which several services are made, as a Kubernetes Service
// with several ports is. Its name, and a colon, begin theirs. What happens to one of
// them need not have happened to its backends: connections are closed only when the
// object has an endpoint no more, and left alone when the object is gone.
type Origin struct {
	Name      string
	Endpoints []netip.Addr // sorted; of all its services, and whether they take connections or not
	Unsettled bool         // it is new, and its endpoints may not be known yet
}

// Has reports whether an address is one of the object's endpoints.
func (o *Origin) Has(a netip.Addr) bool {
	_, found := slices.BinarySearchFunc(o.Endpoints, a, netip.Addr.Compare)
	return found
}

func (o *Origin) equal(other *Origin) bool {
	return o == other || o != nil && other != nil && o.Name == other.Name && o.Unsettled == other.Unsettled && slices.Equal(o.Endpoints, other.Endpoints)
}

// MaxName bounds the name of a service, in bytes: NAMESPACE/NAME:PORT of
// Kubernetes has 63 + 63 + 15 letters, and /external may follow.
const MaxName = 160

// Ranges of Keepalive, as tcp(7) has them.
const (
	MaxKeepalive       = 32767 * time.Second
	MaxKeepaliveProbes = 127
)

// Keepalive is set on a socket when it connects, unless the application has set
// SO_KEEPALIVE itself. Zero fields are left to the host's settings. The zero
// value sets nothing.
type Keepalive struct {
	Idle     time.Duration // before the first probe; whole seconds up to MaxKeepalive
	Interval time.Duration // between probes; the same
	Probes   int           // unanswered ones that end the connection; up to MaxKeepaliveProbes
}

// Probe is how the health of a backend is found out.
type Probe uint8

// The probes.
const (
	// ProbeNone takes every backend for healthy.
	ProbeNone Probe = iota
	// ProbeTCP completes a TCP handshake.
	ProbeTCP
	// ProbeTLS completes a TLS handshake.
	ProbeTLS
	// ProbeHTTP asks for a path and looks at the status.
	ProbeHTTP
	// ProbeGRPC calls Check of grpc.health.v1.
	ProbeGRPC
	// ProbePostgres logs in and asks for the role.
	ProbePostgres
	// ProbeMySQL logs in and asks for the role; MariaDB is the same.
	ProbeMySQL
	// ProbeRedis asks for the role.
	ProbeRedis
	// ProbeExec runs a program and looks at its exit code.
	ProbeExec
)

// Probes are the words of the configuration, by Probe.
var Probes = []string{"none", "tcp", "tls", "http", "grpc", "postgres", "mysql", "redis", "exec"}

// String returns the word of the configuration.
func (p Probe) String() string {
	if int(p) < len(Probes) {
		return Probes[p]
	}
	return fmt.Sprintf("probe %d", uint8(p))
}

// Role is which member of a replicated database counts as healthy.
type Role uint8

// The roles.
const (
	// RoleAny is any member that answers.
	RoleAny Role = iota
	// RolePrimary is the member that takes writes.
	RolePrimary
	// RoleReplica is a member that follows the primary.
	RoleReplica
)

// Roles are the words of the configuration, by Role.
var Roles = []string{"any", "primary", "replica"}

// String returns the word of the configuration.
func (r Role) String() string {
	if int(r) < len(Roles) {
		return Roles[r]
	}
	return fmt.Sprintf("role %d", uint8(r))
}

// Command is a program and its arguments in a form that can be compared.
type Command string

// NewCommand makes a Command; no argument may hold a zero byte, and execve(2)
// could not take one.
func NewCommand(argv []string) Command { return Command(strings.Join(argv, "\x00")) }

// Args returns the program and its arguments.
func (c Command) Args() []string { return strings.Split(string(c), "\x00") }

// Health says how the backends of a service are probed. It is comparable. Keys
// that do not belong to the probe are zero.
type Health struct {
	Probe    Probe
	Interval time.Duration // between two probes of one backend
	Timeout  time.Duration // of one probe
	Rise     int           // successes in a row that bring a backend up
	Fall     int           // failures in a row that take it down

	Port   uint16 // another one than that of the backend; 0: the same
	Path   string // http: request target; grpc: service, empty for the whole server
	Host   string // http: Host header, empty for the backend's address; TLS: the name that the certificate must have
	Expect string // http: status codes, "200-399" or "200,204"
	TLS    bool   // speak TLS; without Host any certificate will do

	User         string // of databases
	PasswordFile string // path; read for every probe, so that it may change
	Role         Role   // of databases

	Command Command // exec
}

// Verdict is how long it takes at most until a backend that is dead is known to be
// down.
func (h Health) Verdict() time.Duration { return time.Duration(h.Fall)*h.Interval + h.Timeout }

// Equal reports whether two services are the same in every respect.
func (s *Service) Equal(o *Service) bool {
	return s == o || s.Name == o.Name && s.Source == o.Source && s.Balance == o.Balance && s.Affinity == o.Affinity &&
		s.Health == o.Health && s.Keepalive == o.Keepalive && s.Breaker == o.Breaker &&
		s.ConnectTimeout == o.ConnectTimeout && s.SlowStart == o.SlowStart && s.OnDown == o.OnDown && s.Forward == o.Forward && s.Silent == o.Silent && s.Elsewhere == o.Elsewhere &&
		slices.Equal(s.Listeners, o.Listeners) && slices.Equal(s.Backends, o.Backends) && slices.Equal(s.Sources, o.Sources) &&
		s.Of.equal(o.Of)
}

// Closes reports whether the connections that a backend has are to be closed.
func (s *Service) Closes(b Backend) bool {
	return b.Down && s.OnDown == Reset || b.Drained && b.DrainOver
}

// ServingGroup returns the lowest group that has a usable backend of the
// family, and false when no group has one.
func (s *Service) ServingGroup(family Family) (group uint32, ok bool) {
	for _, b := range s.Backends {
		if FamilyOf(b.Address.Addr()) != family || !b.Usable() {
			continue
		}
		if !ok || b.Group < group {
			group, ok = b.Group, true
		}
	}
	return group, ok
}

// States returns the state of every backend, in the order of Backends. The
// families fail over apart from each other.
func (s *Service) States() []State {
	var group [2]uint32
	for _, f := range EachFamily {
		group[f.Index()], _ = s.ServingGroup(f)
	}
	states := make([]State, len(s.Backends))
	for i, b := range s.Backends {
		states[i] = b.state(group[FamilyOf(b.Address.Addr()).Index()])
	}
	return states
}

func (b Backend) state(serving uint32) State {
	switch {
	case b.Down:
		return Down
	case b.Drained || b.Weight == 0:
		return Drained
	case b.Group == serving:
		return Serving
	}
	return Standby
}

// Snapshot is all services of one host at one revision. It and everything below it is
// immutable; what did not change since the snapshot before is the same pointer.
type Snapshot struct {
	Revision uint64
	Services []*Service // sorted by name, names are unique
}

// Next returns the snapshot that follows s when the services are those given,
// which need not be sorted. Services that equal their predecessors keep the
// pointer. When nothing changed at all it returns s itself.
func (s *Snapshot) Next(services []*Service) *Snapshot {
	next := &Snapshot{Revision: s.Revision + 1, Services: slices.Clone(services)}
	if !s.sorts(next.Services) {
		slices.SortFunc(next.Services, byName)
	}
	same := len(next.Services) == len(s.Services)
	i := 0
	for j, n := range next.Services {
		if i < len(s.Services) && s.Services[i] == n {
			i++
			continue
		}
		for i < len(s.Services) && s.Services[i].Name < n.Name {
			i++
		}
		if i < len(s.Services) && s.Services[i].Equal(n) {
			next.Services[j] = s.Services[i]
			i++
			continue
		}
		same = false
	}
	if same {
		return s
	}
	return next
}

// sorts reports whether services are sorted by name. Those that follow each other
// in s as well are not looked at: of ten thousand one has changed.
func (s *Snapshot) sorts(services []*Service) bool {
	at := -1 // where the service before is in s, if it is
	for j, n := range services {
		if at >= 0 && at+1 < len(s.Services) && s.Services[at+1] == n {
			at++
			continue
		}
		if j > 0 && services[j-1].Name > n.Name {
			return false
		}
		at = -1
		if i, found := s.index(n.Name); found && s.Services[i] == n {
			at = i
		}
	}
	return true
}

func (s *Snapshot) index(name string) (int, bool) {
	return slices.BinarySearchFunc(s.Services, name, func(s *Service, name string) int { return strings.Compare(s.Name, name) })
}

// Find returns the service of that name, or nil.
func (s *Snapshot) Find(name string) *Service {
	i, ok := s.index(name)
	if !ok {
		return nil
	}
	return s.Services[i]
}

// Diff returns the services of to that are not, as the same pointer, in from,
// and the services of from whose names are not in to.
func Diff(from, to *Snapshot) (changed, removed []*Service) {
	i := 0
	for _, n := range to.Services {
		if i < len(from.Services) && from.Services[i] == n {
			i++
			continue
		}
		for i < len(from.Services) && from.Services[i].Name < n.Name {
			removed = append(removed, from.Services[i])
			i++
		}
		if i < len(from.Services) && from.Services[i].Name == n.Name {
			if from.Services[i] != n {
				changed = append(changed, n)
			}
			i++
			continue
		}
		changed = append(changed, n)
	}
	return changed, append(removed, from.Services[i:]...)
}

// Origin returns the object of that name, or nil if no service is made from it.
func (s *Snapshot) Origin(name string) *Origin {
	i, _ := slices.BinarySearchFunc(s.Services, name+":", func(s *Service, name string) int { return strings.Compare(s.Name, name) })
	if i < len(s.Services) && s.Services[i].Of != nil && s.Services[i].Of.Name == name {
		return s.Services[i].Of
	}
	return nil
}

func byName(a, b *Service) int { return strings.Compare(a.Name, b.Name) }
