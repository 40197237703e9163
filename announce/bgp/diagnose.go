package bgp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"syscall"
	"time"

	"github.com/osrg/gobgp/v4/pkg/packet/bgp"
	"golang.org/x/sys/unix"
)

// diagnoseEvery is how often a peer that has no session is asked for the reason, and
// patience is how long it has for its answer.
const (
	diagnoseEvery = 20 * time.Second
	patience      = 3 * time.Second
)

// diagnose finds out why there is no session with a peer, by beginning one: gobgp does
// not tell what a peer has answered to an OPEN, nor why it could not connect.
func diagnose(ctx context.Context, s settings) string {
	d := net.Dialer{Timeout: patience, Control: func(_, _ string, c syscall.RawConn) error { return prepare(c, s) }}
	if s.source.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(s.source, 0))
	}
	c, err := d.DialContext(ctx, "tcp", net.JoinHostPort(s.address.String(), strconv.Itoa(int(s.port))))
	if err != nil {
		return dialWords(s, err)
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err.Error()
	}
	m, err := greet(c, s)
	if err != nil {
		return answerWords(err)
	}
	switch body := m.Body.(type) {
	case *bgp.BGPNotification:
		return "it says: " + notification(body.ErrorCode, body.ErrorSubcode)
	case *bgp.BGPOpen:
		if as := asOf(body); as != s.peerAS {
			return fmt.Sprintf("it is of the autonomous system %d, and the file says %d", as, s.peerAS)
		}
		say(c, bgp.NewBGPNotificationMessage(bgp.BGP_ERROR_CEASE, bgp.BGP_ERROR_SUB_CONNECTION_COLLISION_RESOLUTION, nil))
		// It agrees; whether it says anything more is seen by the next OPEN only.
		if next, err := read(c); err == nil {
			if n, ok := next.Body.(*bgp.BGPNotification); ok {
				return "it says: " + notification(n.ErrorCode, n.ErrorSubcode)
			}
		}
	}
	return ""
}

// prepare makes a socket one that the peer takes for that of a speaker.
func prepare(c syscall.RawConn, s settings) error {
	var err error
	set := func(fd uintptr) {
		ttl := 1
		switch {
		case s.ttlSecurity:
			ttl = 255
		case s.multihop > 0:
			ttl = s.multihop
		case s.peerAS == s.as:
			ttl = 64
		}
		level, opt := unix.IPPROTO_IP, unix.IP_TTL
		if s.address.Is6() {
			level, opt = unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS
		}
		err = unix.SetsockoptInt(int(fd), level, opt, ttl)
		if s.password == "" {
			return
		}
		key := &unix.TCPMD5Sig{Keylen: uint16(len(s.password))}
		copy(key.Key[:], s.password)
		if a := s.address; a.Is4() {
			key.Addr.Family = unix.AF_INET
			copy(key.Addr.Data[2:], a.AsSlice())
		} else {
			key.Addr.Family = unix.AF_INET6
			copy(key.Addr.Data[6:], a.AsSlice())
		}
		err = errors.Join(err, unix.SetsockoptTCPMD5Sig(int(fd), unix.IPPROTO_TCP, unix.TCP_MD5SIG, key))
	}
	return errors.Join(c.Control(set), err)
}

// greet sends an OPEN and returns the answer.
func greet(c net.Conn, s settings) (*bgp.BGPMessage, error) {
	const asTrans = 23456 // RFC 6793
	short := uint16(asTrans)
	if s.as < 1<<16 {
		short = uint16(s.as)
	}
	capabilities := bgp.NewOptionParameterCapability([]bgp.ParameterCapabilityInterface{
		bgp.NewCapMultiProtocol(bgp.RF_IPv4_UC), bgp.NewCapMultiProtocol(bgp.RF_IPv6_UC), bgp.NewCapFourOctetASNumber(s.as),
	})
	open, err := bgp.NewBGPOpenMessage(short, uint16(seconds(s.hold)), s.id, []bgp.OptionParameterInterface{capabilities})
	if err != nil {
		return nil, err
	}
	say(c, open)
	return read(c)
}

// say sends a message; who has gone says so when it is read.
func say(c net.Conn, m *bgp.BGPMessage) {
	if b, err := m.Serialize(); err == nil {
		_, _ = c.Write(b)
	}
}

func read(c net.Conn) (*bgp.BGPMessage, error) {
	b := make([]byte, bgp.BGP_HEADER_LENGTH, bgp.BGP_MAX_MESSAGE_LENGTH)
	if _, err := io.ReadFull(c, b); err != nil {
		return nil, err
	}
	length := int(b[16])<<8 | int(b[17])
	if length < len(b) || length > cap(b) {
		return nil, errNoBGP
	}
	b = b[:length]
	if _, err := io.ReadFull(c, b[bgp.BGP_HEADER_LENGTH:]); err != nil {
		return nil, err
	}
	m, err := bgp.ParseBGPMessage(b)
	if err != nil {
		return nil, errNoBGP
	}
	return m, nil
}

var errNoBGP = errors.New("what it says is no BGP")

// asOf returns the autonomous system that an OPEN names (RFC 6793).
func asOf(o *bgp.BGPOpen) uint32 {
	for _, p := range o.OptParams {
		c, ok := p.(*bgp.OptionParameterCapability)
		if !ok {
			continue
		}
		for _, x := range c.Capability {
			if four, ok := x.(*bgp.CapFourOctetASNumber); ok {
				return four.CapValue
			}
		}
	}
	return uint32(o.MyAS)
}

func dialWords(s settings, err error) string {
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return fmt.Sprintf("nobody listens there at port %d, or it refuses this host", s.port)
	case errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.ENETUNREACH):
		return "there is no way to it, or nobody has its address"
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return fmt.Sprintf("this host has not the address %s, of \"source\"", s.source)
	case isTimeout(err):
		if s.password != "" {
			return "it does not answer: is it there, and has it the same password?"
		}
		return "it does not answer: is it there, does it want a password, or is it more hops away (multihop)?"
	}
	var code syscall.Errno
	if errors.As(err, &code) {
		return "it cannot be connected to: " + code.Error()
	}
	return "it cannot be connected to: " + err.Error()
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

func answerWords(err error) string {
	switch {
	case errors.Is(err, errNoBGP):
		return err.Error()
	case isTimeout(err):
		return "it takes the connection and says nothing"
	}
	return "it closes the connection without a word: is this host configured there as a neighbour?"
}
