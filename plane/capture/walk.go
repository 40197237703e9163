package capture

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/nft"
	"github.com/pentad/pentad/service"
)

// View is the table as the kernel has it.
type View struct {
	chains map[string][][]expr.Any
	sets   map[string]map[string]bool // the elements of each, by key
}

// Read reads the table. It needs no agent. There may be none: then nothing is captured.
func Read() (*View, error) {
	v := &View{chains: make(map[string][][]expr.Any), sets: make(map[string]map[string]bool)}
	conn, err := nft.Dial()
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.CloseLasting() }()
	chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
		return v, nil // a kernel without nf_tables has no tables
	}
	if err != nil {
		return nil, err
	}
	var table *nftables.Table
	for _, c := range chains {
		if c.Table.Name != TableName {
			continue
		}
		table = c.Table
		rules, err := conn.GetRules(c.Table, c)
		if err != nil {
			return nil, fmt.Errorf("table inet %s: %w", TableName, err)
		}
		v.chains[c.Name] = nil
		for _, r := range rules {
			v.chains[c.Name] = append(v.chains[c.Name], r.Exprs)
		}
	}
	if table == nil {
		return v, nil
	}
	for _, f := range service.EachFamily {
		elements, err := conn.GetSetElements(setOf(table, f))
		if err != nil {
			return nil, fmt.Errorf("table inet %s: %w", TableName, err)
		}
		keys := make(map[string]bool, len(elements))
		for _, e := range elements {
			keys[string(e.Key)] = true
		}
		v.sets[setName(f)] = keys
	}
	return v, nil
}

// Installed reports whether there is a table.
func (v *View) Installed() bool { return len(v.chains) > 0 }

// Connection is the first packet of one.
type Connection struct {
	Destination netip.AddrPort
	// Of a process.
	User, Group uint32
	Mark        uint32
	Cgroups     []uint64 // its cgroup and those above it, from the one below the root on
	// Of one that arrives: at which interface. Empty: it is of a process.
	Interface string
	Local     bool // it is for this host itself
}

// Outcome is what the table does with one.
type Outcome struct {
	Capture string         // by which it is captured; empty: by none
	To      netip.AddrPort // where it is led to; not valid: nowhere, it is refused
	Redir   bool           // To has only a port: the address is the host's own
	Why     string         // it is not captured
}

// Walk walks through the rules with a connection, as the kernel does.
func (v *View) Walk(c Connection) Outcome {
	w := walk{view: v, conn: c}
	chain := chainOutput
	if c.Interface != "" {
		chain = chainPrerouting
	}
	if w.chain(chain) {
		return w.out
	}
	if w.out.Why == "" {
		w.out.Why = cmp.Or(w.closest, "no capture is about it")
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
	reasons := []string{"only TCP is captured", "what has begun stays where it is", "it is what a proxy of this host sends", "it is a probe",
		"the loopback is never captured", "the loopback is never captured", "addresses of a link are never captured"}
	if chain == chainPrerouting {
		reasons = append(reasons, "it is for this host itself")
	}
	reasons = append(reasons, "a service leads to it, or it is a backend of one", "a service leads to it, or it is a backend of one")
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
		return w.view.sets[x.SetName][string(w.get(x.SourceRegister, f.Length()+4))]
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
	c := w.conn
	ofProcess := c.Interface == ""
	number := func(n uint32) { w.put(x.Register, binary.NativeEndian.AppendUint32(nil, n)) }
	switch x.Key {
	case expr.MetaKeyNFPROTO:
		w.put(x.Register, []byte{nft.Proto(service.FamilyOf(c.Destination.Addr()))})
	case expr.MetaKeyL4PROTO:
		w.put(x.Register, []byte{unix.IPPROTO_TCP})
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

// place is where a register begins in regs. The kernel names registers of 16 bytes 1 to
// 4, and those of four bytes, which are the same memory, from 8 on.
func place(register uint32) int {
	if register < unix.NFT_REG32_00 {
		return int(register-1) * 16
	}
	return int(register-unix.NFT_REG32_00) * 4
}

func (w *walk) put(register uint32, b []byte) {
	at := place(register)
	padded := (len(b) + 3) / 4 * 4
	clear(w.regs[at : at+padded])
	copy(w.regs[at:], b)
}

func (w *walk) get(register uint32, n int) []byte {
	at := place(register)
	return w.regs[at : at+n]
}
