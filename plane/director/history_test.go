package director_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/plane/director"
	"github.com/pentad/pentad/service"
)

// box is a host with a director whose program is run by packets that never were on a wire.
type box struct {
	*lab.Host
	plane *director.Plane
	name  string // of the interface
}

func newBox(t *testing.T) *box {
	lab.Need(t)
	h, err := lab.NewHost()
	if err != nil {
		t.Fatal(err)
	}
	b := &box{Host: h, plane: director.New(h.Pins, slog.New(slog.DiscardHandler))}
	ctx, stop := context.WithCancel(context.Background())
	var chores sync.WaitGroup
	chores.Go(func() { b.plane.Run(ctx) })
	t.Cleanup(func() {
		stop()
		chores.Wait()
		b.plane.Close()
		if err := h.Do(func() error { return director.Remove(h.Pins) }); err != nil {
			t.Error(err)
		}
		_ = os.Remove(filepath.Join(h.Pins, "director"))
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := h.Void("10.80.0.1/24"); err != nil {
		t.Fatal(err)
	}
	if err := h.Do(func() error {
		all, err := net.Interfaces()
		for _, i := range all {
			if strings.HasPrefix(i.Name, "void") && !strings.HasSuffix(i.Name, "x") {
				b.name = i.Name
			}
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return b
}

const (
	syn = 0x02
	ack = 0x10
)

// packet is one of TCP or UDP over IPv4, from a client to the VIP.
func packet(client netip.AddrPort, vip netip.AddrPort, udp bool, flags byte) []byte {
	b := make([]byte, 14+20+20)
	binary.BigEndian.PutUint16(b[12:], 0x0800)
	ip := b[14:]
	ip[0], ip[8], ip[9] = 0x45, 64, 6
	if udp {
		ip[9] = 17
	}
	binary.BigEndian.PutUint16(ip[2:], 40)
	copy(ip[12:], client.Addr().AsSlice())
	copy(ip[16:], vip.Addr().AsSlice())
	l4 := ip[20:]
	binary.BigEndian.PutUint16(l4, client.Port())
	binary.BigEndian.PutUint16(l4[2:], vip.Port())
	l4[12], l4[13] = 0x50, flags
	return b
}

// apply has the director serve a VIP by some servers, and opens what is needed to run
// its program.
func (b *box) apply(t *testing.T, s *service.Snapshot) {
	t.Helper()
	if err := b.Do(func() error {
		return b.plane.Apply(t.Context(), director.Want{Interfaces: []string{b.name}, Services: s})
	}); err != nil {
		t.Fatal(err)
	}
}

// program returns the program that is attached.
func (b *box) program(t *testing.T) *ebpf.Program {
	t.Helper()
	pins, err := filepath.Glob(filepath.Join(b.Pins, "director", "links", "*"))
	if err != nil || len(pins) != 1 {
		t.Fatalf("links: %q, %v", pins, err)
	}
	l, err := link.LoadPinnedLink(pins[0], nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		t.Fatal(err)
	}
	p, err := ebpf.NewProgramFromID(info.Program)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// pinned opens a map of the director.
func (b *box) pinned(t *testing.T, name string) *ebpf.Map {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(filepath.Join(b.Pins, "director", "maps-1", name), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// The verdicts of programs at tc (linux/pkt_cls.h).
const (
	goesOn     = 0xffffffff
	dropped    = 2
	redirected = 7
)

// router runs the program, and finds out to whom it has sent a packet.
type router struct {
	t        *testing.T
	box      *box
	counters *ebpf.Map
	reals    *ebpf.Map
}

func (r router) places() map[uint32]uint64 {
	all := make(map[uint32]uint64)
	for i := range uint32(16) {
		var each []struct{ Packets, Bytes, Opened uint64 }
		if err := r.counters.Lookup(i, &each); err != nil {
			r.t.Fatal(err)
		}
		for _, c := range each {
			all[i] += c.Packets
		}
	}
	return all
}

// send runs a packet, and returns to whom it went; the zero address: it was dropped.
func (r router) send(p []byte) netip.Addr {
	r.t.Helper()
	before := r.places()
	prog := r.box.program(r.t)
	defer prog.Close()
	verdict, err := prog.Run(&ebpf.RunOptions{Data: p})
	if err != nil {
		r.t.Fatal(err)
	}
	for i, n := range r.places() {
		if n == before[i] {
			continue
		}
		var x struct {
			Addr                                  [16]byte
			Ifindex, Traits, Generation, Reserved uint32
		}
		if err := r.reals.Lookup(i, &x); err != nil {
			r.t.Fatal(err)
		}
		if verdict != redirected {
			r.t.Fatalf("a packet counts for a server, and its verdict is %d", verdict)
		}
		return netip.AddrFrom16(x.Addr).Unmap()
	}
	if verdict != dropped {
		r.t.Fatalf("a packet to the VIP is for nobody, and its verdict is %d", verdict)
	}
	return netip.Addr{}
}

func newRouter(t *testing.T, b *box) router {
	return router{t, b, b.pinned(t, "real_counters"), b.pinned(t, "reals")}
}

var theVIP = netip.MustParseAddrPort("192.0.2.10:80")

// cluster is servers, and what they are now.
type cluster map[netip.Addr]string // up, drains, down; without one that is not there

func (c cluster) snapshot(last *service.Snapshot) *service.Snapshot {
	s := &service.Service{Name: "web", Forward: service.ForwardDirect, Listeners: []service.Listener{{Address: theVIP, Protocol: service.TCP}}}
	for _, a := range slices.SortedFunc(maps.Keys(c), netip.Addr.Compare) {
		s.Backends = append(s.Backends, service.Backend{Address: netip.AddrPortFrom(a, 80), Weight: 100, Drained: c[a] == "drains", Down: c[a] == "down"})
	}
	return last.Next([]*service.Service{s})
}

// Whatever happens, and however fast: a connection stays where it is as long as its
// server lives, new ones go to those who take some, and two directors say the same of
// them. An agent that has just started goes on where the one before was.
func TestHistories(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	boxes := []*box{newBox(t), newBox(t)}
	servers := make(cluster)
	address := func() netip.Addr { return netip.AddrFrom4([4]byte{10, 80, 0, byte(11 + rnd.IntN(6))}) }
	servers[address()] = "up"
	snap := servers.snapshot(&service.Snapshot{})
	apply := func() {
		snap = servers.snapshot(snap)
		for _, b := range boxes {
			b.apply(t, snap)
		}
	}
	apply()
	routers := []router{newRouter(t, boxes[0]), newRouter(t, boxes[1])}
	flows := make(map[netip.AddrPort]netip.Addr)
	for step := range 1000 {
		switch rnd.IntN(10) {
		case 0: // something changes
			switch a := address(); rnd.IntN(5) {
			case 0:
				delete(servers, a)
			case 1:
				servers[a] = "drains"
			case 2:
				servers[a] = "down"
			default:
				servers[a] = "up"
			}
			apply()
		case 1:
			if rnd.IntN(10) == 0 { // another agent
				b := boxes[0]
				b.plane.Close()
				b.plane = director.New(b.Pins, slog.New(slog.DiscardHandler))
				b.apply(t, snap)
			}
		case 2, 3, 4: // a connection begins
			client := netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(rnd.IntN(250))}), uint16(1024+rnd.IntN(60000)))
			if _, is := flows[client]; is {
				continue
			}
			to := routers[0].send(packet(client, theVIP, false, syn))
			if other := routers[1].send(packet(client, theVIP, false, syn)); other != to {
				t.Fatalf("step %d: of a new connection one director says %s, the other %s", step, to, other)
			}
			if to.IsValid() && servers[to] != "up" || !to.IsValid() && slices.Contains(slices.Collect(maps.Values(servers)), "up") {
				t.Fatalf("step %d: a new connection goes to %s, which is %q, of %v", step, to, servers[to], servers)
			}
			if to.IsValid() {
				flows[client] = to
			}
		default: // connections go on
			for client, server := range flows {
				if state := servers[server]; state != "up" && state != "drains" {
					delete(flows, client) // it is broken
					continue
				}
				if to := routers[0].send(packet(client, theVIP, false, ack)); to != server {
					t.Fatalf("step %d: a connection of %s, which is %s, goes to %s; servers %v", step, server, servers[server], to, servers)
				}
				break
			}
		}
	}
	for client, server := range flows {
		if state := servers[server]; state != "up" && state != "drains" {
			continue
		}
		if to := routers[0].send(packet(client, theVIP, false, ack)); to != server {
			t.Errorf("at the end: a connection of %s goes to %s", server, to)
		}
	}
}

// of returns services, each of which has one listener.
func of(last *service.Snapshot, all ...*service.Service) *service.Snapshot {
	for i, s := range all {
		s.Name, s.Forward = fmt.Sprint("s", i), service.ForwardDirect
	}
	return last.Next(all)
}

func backends(states ...string) (all []service.Backend) {
	for i, state := range states {
		if state == "" {
			continue
		}
		a := netip.AddrFrom4([4]byte{10, 80, 0, byte(11 + i)})
		all = append(all, service.Backend{Address: netip.AddrPortFrom(a, 80), Weight: 100, Drained: state == "drains", Down: state == "down"})
	}
	return all
}

func on(protocol service.Protocol, backends []service.Backend) *service.Service {
	return &service.Service{Listeners: []service.Listener{{Address: theVIP, Protocol: protocol}}, Backends: backends}
}

// begun has some connections begin, and returns where each has gone.
func (r router) begun(n int, flags byte) map[netip.AddrPort]netip.Addr {
	r.t.Helper()
	all := make(map[netip.AddrPort]netip.Addr)
	for i := range n {
		client := netip.AddrPortFrom(netip.MustParseAddr("198.51.100.9"), uint16(20000+i))
		all[client] = r.send(packet(client, theVIP, false, flags))
	}
	return all
}

// stay fails the test unless connections go where they went, but those of some servers.
func (r router) stay(when string, flows map[netip.AddrPort]netip.Addr, flags byte) {
	r.t.Helper()
	for client, server := range flows {
		if to := r.send(packet(client, theVIP, false, flags)); to != server {
			r.t.Fatalf("%s: %s went to %s, and goes to %s", when, client, server, to)
		}
	}
}

// Connections are told from earlier ones of the same ports, from what others send in
// their name, and from those of other services; and stay when the way to choose changes.
func TestWhoseConnection(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	snap := of(&service.Snapshot{}, on(service.TCP, backends("up", "up")))
	b.apply(t, snap)
	r := newRouter(t, b)

	idle := r.begun(60, syn)
	snap = of(snap, on(service.TCP, backends("up", "drains")))
	b.apply(t, snap)
	snap = of(snap, on(service.TCP, backends("up", "up")))
	b.apply(t, snap)
	r.stay("a server has drained and is back", idle, ack)

	hashed := on(service.TCP, backends("up", "up"))
	hashed.Balance = service.SourceHash
	snap = of(snap, hashed)
	b.apply(t, snap)
	r.stay("the balance is another", idle, ack)
	// They have been heard of since.
	r.stay("somebody sends SYN in their name", idle, syn)

	// Ports are used again: the first packet and those that follow go the same way.
	b2 := newBox(t)
	snap = of(&service.Snapshot{}, on(service.TCP, backends("up", "up")))
	b2.apply(t, snap)
	r2 := newRouter(t, b2)
	snap = of(snap, on(service.TCP, backends("up", "up", "up")))
	b2.apply(t, snap)
	r2.begun(60, syn)
	snap = of(snap, on(service.TCP, backends("up", "up", "down")))
	b2.apply(t, snap)
	again := r2.begun(60, syn)
	r2.stay("ports are used again", again, ack)
}

// A server may leave one service and be one of another.
func TestSharedServers(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	snap := of(&service.Snapshot{}, on(service.UDP, backends("up", "up")), on(service.TCP, backends("up", "up")))
	b.apply(t, snap)
	r := newRouter(t, b)
	leaver := netip.MustParseAddr("10.80.0.12")
	for _, state := range []string{"drains", "down", ""} {
		snap = of(snap, on(service.UDP, backends("up", state)), on(service.TCP, backends("up", "up")))
		b.apply(t, snap)
		seen := false
		for i := range 60 {
			client := netip.AddrPortFrom(netip.MustParseAddr("198.51.100.9"), uint16(20000+i))
			if to := r.send(packet(client, theVIP, true, 0)); to == leaver {
				t.Fatalf("a datagram goes to a server that is %q", state)
			}
			seen = seen || r.send(packet(client, theVIP, false, syn)) == leaver
		}
		if !seen {
			t.Errorf("with a server that is %q for one service the other has none of it", state)
		}
	}
}

// sumOf is the checksum of the internet (RFC 1071); of a message that has its own it is 0.
func sumOf(parts ...[]byte) uint16 {
	n := uint32(0)
	for _, b := range parts {
		for i := 0; i+1 < len(b); i += 2 {
			n += uint32(binary.BigEndian.Uint16(b[i:]))
		}
	}
	for n>>16 != 0 {
		n = n&0xffff + n>>16
	}
	return ^uint16(n)
}

// Pings of a VIP that the host has not are answered, and come back where they came from.
func TestPing(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	six := netip.MustParseAddrPort("[2001:db8:10::10]:80")
	s := on(service.TCP, backends("up"))
	s.Listeners = append(s.Listeners, service.Listener{Address: six, Protocol: service.TCP})
	b.apply(t, of(&service.Snapshot{}, s))
	prog := b.program(t)
	defer prog.Close()

	ping := packet(netip.MustParseAddrPort("198.51.100.9:1"), theVIP, false, 0)
	copy(ping[6:], "\x02cli-b") // to the address of the loopback, which is of zeros
	ip, icmp := ping[14:34], ping[34:]
	ip[9] = 1
	binary.BigEndian.PutUint16(ip[10:], sumOf(ip))
	clear(icmp)
	icmp[0], icmp[5], icmp[7] = 8, 1, 1
	binary.BigEndian.PutUint16(icmp[2:], sumOf(icmp))
	out := make([]byte, len(ping))
	verdict, err := prog.Run(&ebpf.RunOptions{Data: ping, DataOut: out})
	if err != nil || verdict != redirected {
		t.Fatalf("verdict %d, %v", verdict, err)
	}
	if string(out[:12]) != "\x02cli-b\x00\x00\x00\x00\x00\x00" || !bytes.Equal(out[26:30], ip[16:20]) || !bytes.Equal(out[30:34], ip[12:16]) ||
		out[34] != 0 || sumOf(out[14:34]) != 0 || sumOf(out[34:]) != 0 {
		t.Errorf("%x is answered by %x", ping, out)
	}

	ping6 := make([]byte, 14+40+8)
	copy(ping6[6:], "\x02cli-b\x86\xdd")
	ip, icmp = ping6[14:54], ping6[54:]
	ip[0], ip[5], ip[6], ip[7] = 0x60, 8, 58, 64
	copy(ip[8:], netip.MustParseAddr("2001:db8::9").AsSlice())
	copy(ip[24:], six.Addr().AsSlice())
	icmp[0], icmp[5] = 128, 1
	pseudo := []byte{0, 0, 0, 8, 0, 0, 0, 58}
	binary.BigEndian.PutUint16(icmp[2:], sumOf(ip[8:], pseudo, icmp))
	out = make([]byte, len(ping6))
	if verdict, err := prog.Run(&ebpf.RunOptions{Data: ping6, DataOut: out}); err != nil || verdict != redirected {
		t.Fatalf("IPv6: verdict %d, %v", verdict, err)
	}
	if !bytes.Equal(out[22:38], ip[24:]) || !bytes.Equal(out[38:54], ip[8:24]) || out[54] != 129 || sumOf(out[22:54], pseudo, out[54:]) != 0 {
		t.Errorf("%x is answered by %x", ping6, out)
	}
}

// Many services are directed, and one change is no more than that.
func TestManyVIPs(t *testing.T) {
	b := newBox(t)
	const services, each = 10_000, 10
	all := make([]*service.Service, services)
	snap := &service.Snapshot{}
	for i := range all {
		s := on(service.TCP, nil)
		s.Listeners[0].Address = netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i % 250)}), uint16(1000+i/250))
		for j := range each {
			s.Backends = append(s.Backends, service.Backend{Address: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 80, 0, byte(11 + (i%20+j)%200)}), 80), Weight: 100})
		}
		all[i] = s
	}
	snap = of(snap, all...)
	began := time.Now()
	b.apply(t, snap)
	t.Logf("%d VIPs with %d real servers each: %v", services, each, time.Since(began))
	const changes = 20
	var took []time.Duration
	for i := range changes {
		changed := *all[17*i]
		changed.Backends = slices.Clone(changed.Backends[1:])
		all[17*i] = &changed
		snap = of(snap, all...)
		time.Sleep(300 * time.Millisecond) // as long as it takes to have a table ready
		began = time.Now()
		b.apply(t, snap)
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	t.Logf("one of them changed: median %v of %v to %v", took[changes/2], took[0], took[changes-1])
	v, err := director.Read(b.Pins)
	if err != nil || len(v.VIPs) != services {
		t.Fatalf("%d VIPs are there, %v", len(v.VIPs), err)
	}
	for _, x := range v.VIPs {
		if want := each - btoi(x.Changing); len(x.Reals) != each || countUp(x) != want {
			t.Fatalf("%s has %d real servers, %d of them take something; want %d", x.Listener, len(x.Reals), countUp(x), want)
		}
	}
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

func countUp(x director.VIP) (n int) {
	for _, r := range x.Reals {
		n += btoi(r.Slots > 0)
	}
	return n
}

// Packets that make no sense, and those that are for nobody here, are sent to nobody.
func TestRandomPackets(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	servers := cluster{netip.MustParseAddr("10.80.0.11"): "up", netip.MustParseAddr("10.80.0.12"): "up"}
	b.apply(t, servers.snapshot(&service.Snapshot{}))
	prog := b.program(t)
	defer prog.Close()
	r := newRouter(t, b)
	client := netip.MustParseAddrPort("198.51.100.7:4000")
	for range 20_000 {
		p := packet(client, theVIP, rand.IntN(2) == 0, byte(rand.IntN(256)))
		if rand.IntN(2) == 0 {
			p = append(p, make([]byte, rand.IntN(100))...)
		}
		for range rand.IntN(6) {
			p[12+rand.IntN(len(p)-12)] = byte(rand.IntN(256))
		}
		p = p[:34+rand.IntN(len(p)-33)] // the kernel runs none that are shorter than IPv4
		before := r.places()
		verdict, err := prog.Run(&ebpf.RunOptions{Data: p})
		if err != nil {
			t.Fatalf("%x: %v", p, err)
		}
		sent := !maps.Equal(before, r.places())
		if (verdict == redirected) != sent || verdict != redirected && verdict != goesOn && verdict != dropped {
			t.Fatalf("%x: verdict %d, and it counts for a server: %v", p, verdict, sent)
		}
		// The VIP may stand in an ICMP error, after the header of that.
		if sent && !bytes.Contains(p, theVIP.Addr().AsSlice()) {
			t.Fatalf("%x has nothing of the VIP", p)
		}
	}
	elsewhere := packet(client, netip.MustParseAddrPort("192.0.2.10:81"), false, syn)
	if verdict, err := prog.Run(&ebpf.RunOptions{Data: elsewhere}); err != nil || verdict != goesOn {
		t.Errorf("another port of the VIP: verdict %d, %v", verdict, err)
	}
}
