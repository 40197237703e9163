// Package nft holds what the nftables tables of pentad are made of: expressions that
// load and compare what a packet is. Which table does what is the planes' business.
package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/service"
)

// bufferSize is room for the largest transaction: the kernel takes a transaction
// in one piece (nfnetlink_rcv_batch) and answers each of its messages.
const bufferSize = 64 << 20

// ElementsPerMessage is how many elements of a set, of one address each, fit into one
// message: the length of an attribute has 16 bits.
const ElementsPerMessage = 400

// Dial begins a conversation with nf_tables, which is to be ended by CloseLasting.
func Dial() (*nftables.Conn, error) {
	return nftables.New(nftables.AsLasting(), nftables.WithSockOptions(
		func(c *netlink.Conn) error { return c.SetWriteBuffer(bufferSize) },
		func(c *netlink.Conn) error { return c.SetReadBuffer(bufferSize) },
	))
}

// Reg is the n-th register of four bytes.
func Reg(n uint32) uint32 { return unix.NFT_REG32_00 + n }

// Words is how many registers an address takes.
func Words(family service.Family) uint32 { return uint32(family.Length()) / 4 }

// Proto is the number of a family in nf_tables.
func Proto(family service.Family) byte {
	if family == service.V4 {
		return unix.NFPROTO_IPV4
	}
	return unix.NFPROTO_IPV6
}

// OfFamily goes on for packets of a family. It uses the first register.
func OfFamily(family service.Family) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: Reg(0)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: Reg(0), Data: []byte{Proto(family)}},
	}
}

// LoadSource puts the source address of a packet into a register (RFC 791, section 3.1;
// RFC 8200, section 3).
func LoadSource(family service.Family, to uint32) expr.Any {
	if family == service.V4 {
		return &expr.Payload{DestRegister: to, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4}
	}
	return &expr.Payload{DestRegister: to, Base: expr.PayloadBaseNetworkHeader, Offset: 8, Len: 16}
}

// LoadDestination puts the destination address of a packet into a register.
func LoadDestination(family service.Family, to uint32) expr.Any {
	if family == service.V4 {
		return &expr.Payload{DestRegister: to, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4}
	}
	return &expr.Payload{DestRegister: to, Base: expr.PayloadBaseNetworkHeader, Offset: 24, Len: 16}
}

// LoadPort puts the destination port into a register. It has the same place in TCP (RFC
// 9293, section 3.1) and UDP (RFC 768).
func LoadPort(to uint32) expr.Any {
	return &expr.Payload{DestRegister: to, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}
}

// InPrefix goes on if the address in the first registers lies in a prefix.
func InPrefix(p netip.Prefix) []expr.Any {
	n := service.FamilyOf(p.Addr()).Length()
	mask := make([]byte, n)
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	return []expr.Any{
		&expr.Bitwise{SourceRegister: Reg(0), DestRegister: Reg(0), Len: uint32(n), Mask: mask, Xor: make([]byte, n)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: Reg(0), Data: p.Masked().Addr().AsSlice()},
	}
}

// Translate leads a connection to the address and port in the registers from n on (DNAT).
func Translate(family service.Family, n uint32) expr.Any {
	return &expr.NAT{
		Type: expr.NATTypeDestNAT, Family: uint32(Proto(family)), RegAddrMin: Reg(n), RegProtoMin: Reg(n + Words(family)), Specified: true,
	}
}

// Generation returns the number that the kernel raises with every change of the
// rule set, whoever makes it (NFT_MSG_GETGEN).
func Generation() (uint32, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	replies, err := conn.Execute(netlink.Message{
		Header: netlink.Header{
			Type:  netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN),
			Flags: netlink.Request,
		},
		Data: []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, 0}, // struct nfgenmsg
	})
	if err != nil {
		return 0, fmt.Errorf("generation of the rule set: %w", err)
	}
	for _, r := range replies {
		attributes, err := netlink.UnmarshalAttributes(r.Data[4:])
		if err != nil {
			return 0, fmt.Errorf("generation of the rule set: %w", err)
		}
		for _, a := range attributes {
			if a.Type == unix.NFTA_GEN_ID && len(a.Data) == 4 {
				return binary.BigEndian.Uint32(a.Data), nil
			}
		}
	}
	return 0, errors.New("generation of the rule set: the kernel did not tell")
}
