package l2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mdlayher/arp"
	"github.com/mdlayher/ndp"
	"github.com/mdlayher/packet"

	"github.com/pentad/pentad/pins"
)

// announcers is where messages go: to all on the segment who listen to local experiments.
// The address is a multicast one that is administered locally.
var announcers = net.HardwareAddr{0x03, 'p', 'e', 'n', 't', 'd'}

var (
	everybody = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	nobody    = net.HardwareAddr{0, 0, 0, 0, 0, 0}
)

// wire is our end of one segment.
type wire struct {
	device  net.HardwareAddr
	index   uint32
	conn    *packet.Conn
	closed  atomic.Bool
	reading sync.WaitGroup
}

// openWire opens an interface. Messages of others are given to each.
func openWire(i pins.Interface, each func([]byte)) (*wire, error) {
	c, err := packet.Listen(&net.Interface{Index: int(i.Index), HardwareAddr: i.MAC[:]}, packet.Raw, etherType, nil)
	if err != nil {
		return nil, fmt.Errorf("packets: %w", err)
	}
	w := &wire{device: net.HardwareAddr(i.MAC[:]), index: i.Index, conn: c}
	w.reading.Go(func() { w.read(each) })
	// Cards take what is for them only.
	if err := joinMulticast(c, i.Index, announcers); err != nil {
		w.close()
		return nil, err
	}
	return w, nil
}

func (w *wire) read(each func([]byte)) {
	b := make([]byte, 2048)
	for {
		n, _, err := w.conn.ReadFrom(b)
		if w.closed.Load() {
			return
		}
		if err != nil {
			// The interface is down: the kernel says so once, and goes on when it is up.
			time.Sleep(tickEvery)
			continue
		}
		if n > headerSize {
			each(b[headerSize:n])
		}
	}
}

func (w *wire) close() {
	w.closed.Store(true)
	w.conn.Close()
	w.reading.Wait()
}

// headerSize is that of Ethernet.
const headerSize = 14

// send sends a frame. What fails is said again with the next.
func (w *wire) send(to net.HardwareAddr, kind uint16, payload []byte) error {
	b := make([]byte, 0, headerSize+len(payload))
	b = append(append(b, to...), w.device...)
	b = append(binary.BigEndian.AppendUint16(b, kind), payload...)
	_, err := w.conn.WriteTo(b, &packet.Addr{HardwareAddr: to})
	return err
}

const (
	kindARP  = 0x0806
	kindIPv6 = 0x86dd
)

// claim tells everybody that a VIP is here: an ARP announcement, as a request and as an
// answer, because some take only one of them (RFC 5227, section 3), or an advertisement
// that nobody has asked for (RFC 4861, section 7.2.6).
func (w *wire) claim(vip netip.Addr) error {
	if vip.Is6() {
		return w.advertise(vip)
	}
	var errs []error
	for _, op := range []arp.Operation{arp.OperationRequest, arp.OperationReply} {
		errs = append(errs, w.arp(op, vip, vip))
	}
	return errors.Join(errs...)
}

func (w *wire) arp(op arp.Operation, sender, target netip.Addr) error {
	p, err := arp.NewPacket(op, w.device, sender, nobody, target)
	if err != nil {
		return err
	}
	b, err := p.MarshalBinary()
	if err != nil {
		return err
	}
	return w.send(everybody, kindARP, b)
}

func (w *wire) advertise(vip netip.Addr) error {
	all := netip.MustParseAddr("ff02::1")
	return w.ndp(vip, all, &ndp.NeighborAdvertisement{
		Override: true, TargetAddress: vip,
		Options: []ndp.Option{&ndp.LinkLayerAddress{Direction: ndp.Target, Addr: w.device}},
	})
}

// ask asks who has a VIP, as one who has no address himself: nobody learns anything from
// the question (RFC 5227, section 2.1.1; RFC 4862, section 5.4.2).
func (w *wire) ask(vip netip.Addr) error {
	if vip.Is4() {
		return w.arp(arp.OperationRequest, netip.IPv4Unspecified(), vip)
	}
	group, err := ndp.SolicitedNodeMulticast(vip)
	if err != nil {
		return err
	}
	return w.ndp(netip.IPv6Unspecified(), group, &ndp.NeighborSolicitation{TargetAddress: vip})
}

// ndp sends a message of neighbour discovery to a multicast group.
func (w *wire) ndp(from, to netip.Addr, m ndp.Message) error {
	payload, err := ndp.MarshalMessageChecksum(m, from, to)
	if err != nil {
		return err
	}
	const icmp6, hops = 58, 255
	b := []byte{0x60, 0, 0, 0}
	b = binary.BigEndian.AppendUint16(b, uint16(len(payload)))
	b = append(b, icmp6, hops)
	b = append(append(b, from.AsSlice()...), to.AsSlice()...)
	a := to.As16()
	return w.send(net.HardwareAddr{0x33, 0x33, a[12], a[13], a[14], a[15]}, kindIPv6, append(b, payload...))
}

// joinMulticast has a card take frames to a multicast address for as long as the
// connection is open.
func joinMulticast(c *packet.Conn, index uint32, group net.HardwareAddr) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	return membership(raw, index, group)
}
