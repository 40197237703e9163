package proxy

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/pentad/pentad/config"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds every wait for something that should happen soon.
const patience = 10 * time.Second

var loopback = netip.MustParseAddrPort("127.0.0.1:0")

// start runs a proxy at a free port of the loopback, and returns where.
func start(t *testing.T, c config.Proxy, upstreams ...config.Upstream) (*Plane, string) {
	t.Helper()
	p := New(slog.New(slog.DiscardHandler))
	p.resolve = testResolver
	if c.Protocols == nil {
		c.Protocols = []config.ProxyProtocol{config.SOCKS5, config.HTTP}
	}
	if c.Listen == nil {
		c.Listen = []netip.AddrPort{loopback}
	}
	c.Name = "test"
	for value, fallback := range map[*time.Duration]time.Duration{
		&c.Handshake: patience, &c.Connect: patience, &c.Idle: time.Minute, &c.IdleUDP: time.Minute,
	} {
		if *value == 0 {
			*value = fallback
		}
	}
	if c.MaxConnections == 0 {
		c.MaxConnections, c.MaxPerClient = 100, 100
	}
	if err := p.Apply(t.Context(), Want{Proxies: []config.Proxy{c}, Upstreams: upstreams}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	for _, l := range p.servers["test"].listeners {
		return p, l.Addr().String()
	}
	t.Fatal("it does not listen")
	return nil, ""
}

// testResolver knows a few names.
func testResolver(ctx context.Context, to target) ([]netip.AddrPort, error) {
	at := func(texts ...string) (all []netip.AddrPort) {
		for _, text := range texts {
			all = append(all, netip.AddrPortFrom(netip.MustParseAddr(text), to.Port))
		}
		return all
	}
	switch to.Name {
	case "":
		return []netip.AddrPort{to.AddrPort()}, nil
	case "here.test":
		return at("127.0.0.1"), nil
	case "both.test":
		return at("::1", "127.0.0.1"), nil
	case "slow.test":
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return nil, &net.DNSError{Err: "no such host", Name: to.Name, IsNotFound: true}
}

// listen serves each connection at a free port of an address.
func listen(t *testing.T, at string, each func(*net.TCPConn)) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(at, "0"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				each(c.(*net.TCPConn))
			}()
		}
	}()
	return addrPort(l.Addr())
}

// echo answers what it hears when the other side has ended.
func echo(c *net.TCPConn) {
	b, err := io.ReadAll(c)
	if err == nil {
		_, _ = c.Write(b)
	}
}

// client is a client that says exactly what it is told to.
type client struct {
	*net.TCPConn
	t *testing.T
}

func dial(t *testing.T, address string) *client {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return &client{c.(*net.TCPConn), t}
}

func (c *client) say(parts ...any) {
	c.t.Helper()
	if _, err := c.Write(join(parts...)); err != nil {
		c.t.Fatalf("writing: %v", err)
	}
}

// hear fails the test unless exactly these bytes come.
func (c *client) hear(parts ...any) {
	c.t.Helper()
	want := join(parts...)
	have := make([]byte, len(want))
	if n, err := io.ReadFull(c, have); err != nil || !bytes.Equal(have, want) {
		c.t.Fatalf("heard % x (%v), want % x", have[:n], err, want)
	}
}

func (c *client) take(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(c, b); err != nil {
		c.t.Fatalf("reading %d bytes: %v", n, err)
	}
	return b
}

// bound fails the test unless the answer is a success, and returns the IPv4 address in it.
func (c *client) bound() netip.AddrPort {
	c.t.Helper()
	b := c.take(10)
	if b[1] != 0 || b[3] != 1 {
		c.t.Fatalf("heard % x", b)
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), uint16(b[8])<<8|uint16(b[9]))
}

// ended fails the test unless nothing more comes.
func (c *client) ended() {
	c.t.Helper()
	if b, err := io.ReadAll(c); err != nil || len(b) > 0 {
		c.t.Fatalf("heard % x (%v), want the end", b, err)
	}
}

// join puts bytes, texts and addresses together.
func join(parts ...any) (b []byte) {
	for _, p := range parts {
		switch p := p.(type) {
		case int:
			b = append(b, byte(p))
		case string:
			b = append(b, p...)
		case []byte:
			b = append(b, p...)
		case netip.AddrPort:
			if p.Addr().Is4() {
				b = append(b, 1)
			} else {
				b = append(b, 4)
			}
			b = append(b, p.Addr().AsSlice()...)
			b = append(b, byte(p.Port()>>8), byte(p.Port()))
		default:
			panic(fmt.Sprintf("%T", p))
		}
	}
	return b
}

// named is an address by name.
func named(name string, port uint16) []byte {
	return join(3, len(name), name, int(port>>8), int(port&0xff))
}

// nowhere is the address of a failure.
var nowhere = netip.MustParseAddrPort("0.0.0.0:0")

// within polls a condition.
func within(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
	}
}
