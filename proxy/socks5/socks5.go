// Package socks5 speaks the SOCKS protocol, version 5 (RFC 1928), with authentication by
// user and password (RFC 1929): both ends of the handshake, and what is in front of
// datagrams.
//
// It opens no sockets and decides nothing. It reads a message to its last byte and not
// one byte more, however the bytes arrive.
package socks5

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"
)

const version = 5

// Method is a way to authenticate (RFC 1928, section 3).
type Method byte

// The methods that this package knows.
const (
	NoAuthentication Method = 0x00
	UserPassword     Method = 0x02
	noneAcceptable   Method = 0xff
)

// Command is what a client asks for (RFC 1928, section 4).
type Command byte

// The commands.
const (
	Connect   Command = 1
	Bind      Command = 2
	Associate Command = 3
)

// String returns the command as the RFC writes it.
func (c Command) String() string {
	switch c {
	case Connect:
		return "CONNECT"
	case Bind:
		return "BIND"
	case Associate:
		return "UDP ASSOCIATE"
	}
	return fmt.Sprintf("command %d", byte(c))
}

// Reply is the answer to a request (RFC 1928, section 6). All but Succeeded are errors.
type Reply byte

// The replies.
const (
	Succeeded               Reply = 0
	GeneralFailure          Reply = 1
	NotAllowed              Reply = 2
	NetworkUnreachable      Reply = 3
	HostUnreachable         Reply = 4
	ConnectionRefused       Reply = 5
	TTLExpired              Reply = 6
	CommandNotSupported     Reply = 7
	AddressTypeNotSupported Reply = 8
)

var replies = [...]string{
	"succeeded", "general SOCKS server failure", "not allowed by the rules of the server", "network unreachable", "host unreachable",
	"connection refused", "time to live expired", "command not supported", "address type not supported",
}

// Error returns what the reply says.
func (r Reply) Error() string {
	if int(r) < len(replies) {
		return replies[r]
	}
	return fmt.Sprintf("reply %d, which RFC 1928 does not know", byte(r))
}

// Errors of the handshake.
var (
	// ErrVersion is a first byte that is not that of the protocol.
	ErrVersion = errors.New("not SOCKS version 5")
	// ErrNoMethod says that both ends have no way to authenticate in common.
	ErrNoMethod = errors.New("no acceptable method of authentication")
	// ErrDenied says that the user or the password is wrong.
	ErrDenied = errors.New("user or password is wrong")
	// ErrMalformed is a message that the RFC does not allow.
	ErrMalformed = errors.New("malformed message")
)

// Address is where a request or a datagram goes, by name or by address.
type Address struct {
	Name string     // of a host; empty: IP says it
	IP   netip.Addr // never an IPv4-mapped IPv6 address; without a zone
	Port uint16
}

// AddressOf returns an address as one of this package.
func AddressOf(a netip.AddrPort) Address {
	return Address{IP: a.Addr().Unmap().WithZone(""), Port: a.Port()}
}

// ParseAddress reads HOST:PORT, where the host is a name or an address.
func ParseAddress(host string, port uint16) (Address, error) {
	if ip, err := netip.ParseAddr(strings.Trim(host, "[]")); err == nil {
		return Address{IP: ip.Unmap().WithZone(""), Port: port}, nil
	}
	if err := checkName(host); err != nil {
		return Address{}, err
	}
	return Address{Name: host, Port: port}, nil
}

// AddrPort returns the address of one that has no name.
func (a Address) AddrPort() netip.AddrPort { return netip.AddrPortFrom(a.IP, a.Port) }

// Host returns the name, or the address.
func (a Address) Host() string {
	if a.Name != "" {
		return a.Name
	}
	return a.IP.String()
}

// String returns HOST:PORT, with an IPv6 address in brackets.
func (a Address) String() string {
	if a.Name != "" {
		return a.Name + ":" + strconv.Itoa(int(a.Port))
	}
	return a.AddrPort().String()
}

// The types of addresses (RFC 1928, section 5).
const (
	typeIPv4 = 1
	typeName = 3
	typeIPv6 = 4
)

// maxAddress is the longest address on the wire: type, length, name, port.
const maxAddress = 1 + 1 + 255 + 2

// readAddress reads an address: its type, itself, its port. The error of a type that is
// not known is AddressTypeNotSupported.
func readAddress(r io.Reader) (Address, error) {
	var b [maxAddress]byte
	if _, err := io.ReadFull(r, b[:1]); err != nil {
		return Address{}, err
	}
	n := 0
	switch b[0] {
	case typeIPv4:
		n = 4
	case typeIPv6:
		n = 16
	case typeName:
		if _, err := io.ReadFull(r, b[:1]); err != nil {
			return Address{}, err
		}
		return readName(r, b[1:1+int(b[0])+2])
	default:
		return Address{}, AddressTypeNotSupported
	}
	if _, err := io.ReadFull(r, b[:n+2]); err != nil {
		return Address{}, err
	}
	ip, _ := netip.AddrFromSlice(b[:n])
	return Address{IP: ip.Unmap(), Port: binary.BigEndian.Uint16(b[n:])}, nil
}

// readName reads a name and its port into b, which is as long as both.
func readName(r io.Reader, b []byte) (Address, error) {
	if _, err := io.ReadFull(r, b); err != nil {
		return Address{}, err
	}
	n := len(b) - 2
	return ParseAddress(string(b[:n]), binary.BigEndian.Uint16(b[n:]))
}

// checkName refuses what no host is called. What else a name may be is the resolver's
// business.
func checkName(name string) error {
	if name == "" || len(name) > 255 {
		return fmt.Errorf("%w: a name of %d bytes", ErrMalformed, len(name))
	}
	for _, c := range []byte(name) {
		if c <= ' ' || c == 0x7f {
			return fmt.Errorf("%w: a name with a byte %#02x", ErrMalformed, c)
		}
	}
	return nil
}

// appendAddress writes an address; one that is not valid is written as 0.0.0.0.
func appendAddress(b []byte, a Address) []byte {
	switch ip := a.IP.Unmap(); {
	case a.Name != "":
		b = append(b, typeName, byte(len(a.Name)))
		b = append(b, a.Name...)
	case ip.Is6():
		b = append(b, typeIPv6)
		b = append(b, ip.AsSlice()...)
	case ip.Is4():
		b = append(b, typeIPv4)
		b = append(b, ip.AsSlice()...)
	default:
		b = append(b, typeIPv4, 0, 0, 0, 0)
	}
	return binary.BigEndian.AppendUint16(b, a.Port)
}
