package lab

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// cutTable is the nftables table of a host whose rules make packets vanish.
const cutTable = "pentad-lab-cut"

// CutOff makes every packet from and to an address of the host vanish, as if the
// cable were out: nothing is refused, nothing is answered.
func (h *Host) CutOff(addr netip.Addr) error {
	if err := h.filter("input", nftables.ChainHookInput, dropFor(addr, true), dropFor(addr, false)); err != nil {
		return fmt.Errorf("cutting off %s: %w", addr, err)
	}
	return nil
}

// Deny keeps the packets of one user from leaving the host, without a word or, for
// TCP, by a reset: as a network policy for one tenant does.
func (h *Host) Deny(uid uint32, reset bool) error {
	rule := []expr.Any{
		&expr.Meta{Key: expr.MetaKeySKUID, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.NativeEndian.AppendUint32(nil, uid)},
	}
	if reset {
		rule = append(rule,
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
			&expr.Reject{Type: unix.NFT_REJECT_TCP_RST})
	} else {
		rule = append(rule, &expr.Verdict{Kind: expr.VerdictDrop})
	}
	if err := h.filter("output", nftables.ChainHookOutput, rule); err != nil {
		return fmt.Errorf("denying user %d: %w", uid, err)
	}
	return nil
}

// filter adds rules to a chain of the table that Mend removes.
func (h *Host) filter(chain string, hook *nftables.ChainHook, rules ...[]expr.Any) error {
	c, err := nftables.New(nftables.WithNetNSFd(int(h.ns)))
	if err != nil {
		return err
	}
	table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: cutTable})
	to := c.AddChain(&nftables.Chain{
		Name: chain, Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: hook, Priority: nftables.ChainPriorityFilter,
	})
	for _, r := range rules {
		c.AddRule(&nftables.Rule{Table: table, Chain: to, Exprs: r})
	}
	return c.Flush()
}

// Mend ends every CutOff and Deny.
func (h *Host) Mend() error {
	c, err := nftables.New(nftables.WithNetNSFd(int(h.ns)))
	if err != nil {
		return err
	}
	c.DelTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: cutTable})
	return c.Flush()
}

// dropFor drops packets whose source or destination is the address.
func dropFor(addr netip.Addr, source bool) []expr.Any {
	// Offsets in the headers of RFC 791, 3.1 and RFC 8200, 3.
	family, offset := byte(unix.NFPROTO_IPV4), uint32(16)
	if !addr.Is4() {
		family, offset = unix.NFPROTO_IPV6, 24
	}
	if source {
		offset -= uint32(addr.BitLen() / 8)
	}
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{family}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(addr.BitLen() / 8)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: addr.AsSlice()},
		&expr.Verdict{Kind: expr.VerdictDrop},
	}
}
