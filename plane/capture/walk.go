package capture

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/nft"
	"github.com/pentad/pentad/service"
)

// View is what captures, as the kernel has it.
type View struct {
	chains   map[string][][]expr.Any
	sets     map[string]map[string]bool // the elements of each, by key
	programs []attachment
}

// Read reads the table, and what programs read that are pinned in a directory. It needs
// no agent. There may be none: then nothing is captured.
func Read(pins string) (*View, error) {
	v := &View{}
	var err error
	if v.programs, err = readPrograms(filepath.Join(pins, planeDir)); err != nil {
		return nil, fmt.Errorf("programs of captures: %w", err)
	}
	return v, v.readTable()
}

func (v *View) readTable() error {
	v.chains, v.sets = make(map[string][][]expr.Any), make(map[string]map[string]bool)
	conn, err := nft.Dial()
	if err != nil {
		return err
	}
	defer func() { _ = conn.CloseLasting() }()
	chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil // a kernel without nf_tables has no tables
	}
	if err != nil {
		return err
	}
	var table *nftables.Table
	for _, c := range chains {
		if c.Table.Name != TableName {
			continue
		}
		table = c.Table
		rules, err := conn.GetRules(c.Table, c)
		if err != nil {
			return fmt.Errorf("table inet %s: %w", TableName, err)
		}
		v.chains[c.Name] = nil
		for _, r := range rules {
			v.chains[c.Name] = append(v.chains[c.Name], r.Exprs)
		}
	}
	if table == nil {
		return nil
	}
	for _, f := range service.EachFamily {
		elements, err := conn.GetSetElements(setOf(table, f))
		if err != nil {
			return fmt.Errorf("table inet %s: %w", TableName, err)
		}
		keys := make(map[string]bool, len(elements))
		for _, e := range elements {
			keys[string(e.Key)] = true
		}
		v.sets[setName(f)] = keys
	}
	return nil
}

// Installed reports whether anything may be captured.
func (v *View) Installed() bool { return len(v.chains)+len(v.programs) > 0 }

// Connection is the first packet of one.
type Connection struct {
	Destination netip.AddrPort
	UDP         bool // it is a datagram
	// Of a process.
	User, Group uint32 // as its sockets have them: those of the file system
	RealUser    uint32 // as programs see it
	RealGroup   uint32
	Mark        uint32
	Cgroups     []uint64 // its cgroup and those above it, from the one below the root on
	// Of one that arrives: at which interface. Empty: it is of a process.
	Interface string
	Local     bool // it is for this host itself
}

func (c Connection) protocol() byte {
	if c.UDP {
		return unix.IPPROTO_UDP
	}
	return unix.IPPROTO_TCP
}

// Outcome is what the table does with one.
type Outcome struct {
	Capture string         // by which it is captured; empty: by none
	To      netip.AddrPort // where it is led to; not valid: nowhere, it is refused
	Redir   bool           // To has only a port: the address is the host's own
	Handed  bool           // it is handed to a socket of To as it is, and not translated
	Direct  bool           // while nobody listens there it goes where it wanted to go
	Why     string         // it is not captured
}

// Walk has a connection go through connect() and then through the rules, as the kernel
// does.
func (v *View) Walk(c Connection) Outcome {
	o := v.connect(c)
	if o.Capture != "" || len(v.chains) == 0 {
		return o
	}
	packets := v.walkTable(c, chainOutput)
	if c.Interface != "" {
		// Whoever is handed to a socket is not translated.
		if packets = v.walkTable(c, chainDeliver); packets.Capture == "" {
			packets = packets.or(v.walkTable(c, chainPrerouting))
		}
	}
	if packets.Capture == "" && len(v.programs) > 0 && o.Why != whyNobody {
		packets.Why = o.Why // it came nearer
	}
	return packets
}

// or is the outcome where both chains may capture: of two reasons the one that came
// nearer.
func (o Outcome) or(other Outcome) Outcome {
	if other.Capture == "" && (other.Why == whyNobody || other.Why == whyNotTCP) {
		return o
	}
	return other
}

func (v *View) walkTable(c Connection, chain string) Outcome {
	w := walk{view: v, conn: c}
	if w.chain(chain) {
		return w.out
	}
	if w.out.Why == "" {
		w.out.Why = cmp.Or(w.closest, whyNobody)
	}
	return w.out
}

type walk struct {
	view    *View
	conn    Connection
	regs    [80]byte // the registers, see place
	at      string   // the capture whose chain is walked through
	closest string   // why the one that came nearest does not take it
	out     Outcome
}

// chain walks through one, and reports whether the connection's way is decided.
func (w *walk) chain(name string) bool {
	for i, rule := range w.view.chains[name] {
		verdict, fits := w.rule(rule)
		if !fits {
			continue
		}
		switch v := verdict.(type) {
		case *expr.Verdict:
			if v.Kind == expr.VerdictAccept {
				w.out = Outcome{Capture: w.at, To: w.handedTo(), Handed: true}
				return true
			}
			if v.Kind != expr.VerdictJump {
				w.returned(name, i)
				return false
			}
			w.at = strings.TrimPrefix(v.Chain, entryPrefix)
			if w.chain(v.Chain) {
				return true
			}
		case *expr.Reject:
			w.out = Outcome{Capture: w.at}
			return true
		case *expr.NAT:
			f := service.FamilyOf(w.conn.Destination.Addr())
			to, _ := netip.AddrFromSlice(w.get(v.RegAddrMin, f.Length()))
			w.out = Outcome{Capture: w.at, To: netip.AddrPortFrom(to, binary.BigEndian.Uint16(w.get(v.RegProtoMin, 2)))}
			return true
		case *expr.Redir:
			w.out = Outcome{Capture: w.at, Redir: true,
				To: netip.AddrPortFrom(unspecified(w.conn.Destination.Addr()), binary.BigEndian.Uint16(w.get(v.RegisterProtoMin, 2)))}
			return true
		}
	}
	if capture, is := strings.CutPrefix(name, entryPrefix); is && w.closest == "" {
		w.closest = fmt.Sprintf("the capture %s is about this process, and not about this destination", capture)
	}
	return false
}

// handedTo is to whose socket the rule has handed the packet that was walked through last:
// package nftables does not read the expression that does it, but what that has read.
func (w *walk) handedTo() netip.AddrPort {
	f := service.FamilyOf(w.conn.Destination.Addr())
	to, _ := netip.AddrFromSlice(w.get(nft.Reg(0), f.Length()))
	return netip.AddrPortFrom(to, binary.BigEndian.Uint16(w.get(nft.Reg(nft.Words(f)), 2)))
}

func unspecified(a netip.Addr) netip.Addr {
	if a.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// returned notes why a chain was left.
func (w *walk) returned(chain string, rule int) {
	if capture, is := strings.CutPrefix(chain, entryPrefix); is {
		w.closest = fmt.Sprintf("the capture %s excepts this destination", capture)
		return
	}
	reasons := []string{whyNotTCP, whyBegun}
	if chain == chainDeliver {
		reasons = []string{whyBegun, whyBegun, whyBegun, whyBegun, "only TCP and UDP are captured"}
	}
	reasons = append(reasons, "it is what a proxy of this host sends", "it is a probe", whyLoopback, whyLoopback, whyLink)
	if chain != chainOutput {
		for range forHere {
			reasons = append(reasons, "it is for this host itself")
		}
	}
	reasons = append(reasons, whyService, whyService)
	if rule < len(reasons) {
		w.out.Why = reasons[rule]
	}
}

// rule evaluates one, and returns its last expression if the connection fits it.
func (w *walk) rule(exprs []expr.Any) (last expr.Any, fits bool) {
	for _, x := range exprs {
		if !w.step(x) {
			return nil, false
		}
		last = x
	}
	return last, true
}

// step evaluates an expression, and reports whether the rule goes on.
func (w *walk) step(x expr.Any) bool {
	f := service.FamilyOf(w.conn.Destination.Addr())
	switch x := x.(type) {
	case *expr.Meta:
		return w.meta(x)
	case *expr.Payload:
		return w.payload(x, f)
	case *expr.Fib:
		kind := uint32(unix.RTN_UNICAST)
		if w.conn.Local {
			kind = unix.RTN_LOCAL
		}
		w.put(x.Register, binary.NativeEndian.AppendUint32(nil, kind))
	case *expr.Immediate:
		w.put(x.Register, x.Data)
	case *expr.Bitwise:
		b := slices.Clone(w.get(x.SourceRegister, int(x.Len)))
		for i := range b {
			b[i] = b[i]&x.Mask[i] ^ x.Xor[i]
		}
		w.put(x.DestRegister, b)
	case *expr.Cmp:
		if len(x.Data) == cgroupLength {
			return w.isBelow(x.Data)
		}
		order := bytes.Compare(w.get(x.Register, len(x.Data)), x.Data)
		switch x.Op {
		case expr.CmpOpEq:
			return order == 0
		case expr.CmpOpNeq:
			return order != 0
		case expr.CmpOpGte:
			return order >= 0
		case expr.CmpOpLte:
			return order <= 0
		}
		return false
	case *expr.Lookup:
		return w.view.sets[x.SetName][string(w.get(x.SourceRegister, f.Length()+8))]
	case *expr.Range:
		b := w.get(x.Register, len(x.FromData))
		inside := bytes.Compare(b, x.FromData) >= 0 && bytes.Compare(b, x.ToData) <= 0
		return inside == (x.Op == expr.CmpOpEq)
	}
	return true
}

// cgroupLength is how long the id of a cgroup is: nothing else in the table is.
const cgroupLength = 8

// isBelow reports whether the process is in a cgroup, or below it. The expression that
// loads the cgroup, with its level, is one that package nftables does not read; ids are
// those of one cgroup each, so that the level says no more.
func (w *walk) isBelow(id []byte) bool {
	return w.conn.Interface == "" && slices.Contains(w.conn.Cgroups, binary.NativeEndian.Uint64(id))
}

func (w *walk) meta(x *expr.Meta) bool {
	if x.SourceRegister {
		return true // it sets something
	}
	c := w.conn
	ofProcess := c.Interface == ""
	number := func(n uint32) { w.put(x.Register, binary.NativeEndian.AppendUint32(nil, n)) }
	switch x.Key {
	case expr.MetaKeyNFPROTO:
		w.put(x.Register, []byte{nft.Proto(service.FamilyOf(c.Destination.Addr()))})
	case expr.MetaKeyL4PROTO:
		w.put(x.Register, []byte{c.protocol()})
	case expr.MetaKeyMARK:
		number(c.Mark)
	case expr.MetaKeySKUID:
		number(c.User)
		return ofProcess
	case expr.MetaKeySKGID:
		number(c.Group)
		return ofProcess
	case expr.MetaKeyIIFNAME:
		name := make([]byte, unix.IFNAMSIZ)
		copy(name, c.Interface)
		w.put(x.Register, name)
	default:
		return false
	}
	return true
}

func (w *walk) payload(x *expr.Payload, f service.Family) bool {
	switch {
	case x.Base == expr.PayloadBaseTransportHeader && x.Offset == 2:
		w.put(x.DestRegister, binary.BigEndian.AppendUint16(nil, w.conn.Destination.Port()))
	case x.Base == expr.PayloadBaseTransportHeader && x.Offset == tcpFlags:
		w.put(x.DestRegister, []byte{flagSYN})
	case x.Base == expr.PayloadBaseNetworkHeader && int(x.Len) <= f.Length():
		w.put(x.DestRegister, w.conn.Destination.Addr().AsSlice())
	default:
		return false
	}
	return true
}

// regAt is where a register begins in regs. The kernel names registers of 16 bytes 1 to
// 4, and those of four bytes, which are the same memory, from 8 on.
func regAt(register uint32) int {
	if register < unix.NFT_REG32_00 {
		return int(register-1) * 16
	}
	return int(register-unix.NFT_REG32_00) * 4
}

func (w *walk) put(register uint32, b []byte) {
	at := regAt(register)
	padded := (len(b) + 3) / 4 * 4
	clear(w.regs[at : at+padded])
	copy(w.regs[at:], b)
}

func (w *walk) get(register uint32, n int) []byte {
	at := regAt(register)
	return w.regs[at : at+n]
}
