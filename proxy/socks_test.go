package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/proxy/socks5"
)

// withUsers is a proxy for alice, whose password is hunter2.
func withUsers(t *testing.T) config.Proxy {
	t.Helper()
	hash, err := bcrypt.GenerateFromPassword([]byte("hunter2"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "users")
	if err := os.WriteFile(path, append([]byte("# who may come in\nalice:"), append(hash, '\n')...), 0o600); err != nil {
		t.Fatal(err)
	}
	return config.Proxy{UsersFile: path}
}

// The greeting: RFC 1928, section 3.
func TestGreeting(t *testing.T) {
	t.Parallel()
	_, open := start(t, config.Proxy{Handshake: 500 * time.Millisecond, Protocols: []config.ProxyProtocol{config.SOCKS5}})
	_, locked := start(t, withUsers(t))
	t.Run("01 another version gets no answer", func(t *testing.T) {
		c := dial(t, open)
		c.say(6, 1, 0)
		if b, _ := io.ReadAll(c); len(b) > 0 {
			t.Errorf("heard % x", b)
		}
	})
	t.Run("02 one byte at a time", func(t *testing.T) {
		c := dial(t, open)
		for _, b := range []byte{5, 3, 9, 0, 7} {
			c.say(int(b))
			time.Sleep(2 * time.Millisecond)
		}
		c.hear(5, 0)
	})
	t.Run("03 a method that was offered", func(t *testing.T) {
		c := dial(t, locked)
		c.say(5, 2, 0, 2)
		c.hear(5, 2)
	})
	t.Run("04 none is acceptable", func(t *testing.T) {
		c := dial(t, locked)
		c.say(5, 2, 0, 1)
		c.hear(5, 0xff)
		c.ended()
	})
	t.Run("05 none is offered", func(t *testing.T) {
		c := dial(t, open)
		c.say(5, 0)
		c.hear(5, 0xff)
		c.ended()
	})
	t.Run("06 the server's preference", func(t *testing.T) {
		c := dial(t, open)
		c.say(5, 2, 2, 0)
		c.hear(5, 0)
	})
	t.Run("07 who says nothing is not waited for", func(t *testing.T) {
		for _, text := range []string{"", "\x05", "\x05\x02\x00"} {
			c := dial(t, open)
			c.say(text)
			began := time.Now()
			if b, _ := io.ReadAll(c); len(b) > 0 || time.Since(began) > patience/2 {
				t.Errorf("after %q heard % x in %s", text, b, time.Since(began))
			}
		}
	})
	t.Run("SOCKS4 is refused in its own words", func(t *testing.T) {
		c := dial(t, open)
		c.say(4, 1, 0, 80, 127, 0, 0, 1, 0)
		c.hear(0, 91, 0, 0, 0, 0, 0, 0)
		c.ended()
	})
}

// User and password: RFC 1929.
func TestPassword(t *testing.T) {
	t.Parallel()
	_, at := start(t, withUsers(t))
	to := listen(t, "127.0.0.1", echo)
	greeted := func(t *testing.T) *client {
		c := dial(t, at)
		c.say(5, 1, 2)
		c.hear(5, 2)
		return c
	}
	t.Run("08 version 1, not 5", func(t *testing.T) {
		c := greeted(t)
		c.say(5, 5, "alice", 7, "hunter2")
		if b := c.take(2); b[0] != 1 || b[1] == 0 {
			t.Errorf("heard % x", b)
		}
		c.ended()
	})
	t.Run("09 no empty user or password", func(t *testing.T) {
		for _, text := range []string{"\x01\x00\x07hunter2", "\x01\x05alice\x00"} {
			c := greeted(t)
			c.say(text)
			if b := c.take(2); b[0] != 1 || b[1] == 0 {
				t.Errorf("heard % x", b)
			}
			c.ended()
		}
	})
	t.Run("10 success", func(t *testing.T) {
		c := greeted(t)
		for _, b := range []byte("\x01\x05alice\x07hunter2") {
			c.say(int(b))
		}
		c.hear(1, 0)
		c.say(5, 1, 0, to, "hello")
		c.hear(5, 0, 0)
	})
	t.Run("11 failure, and the end", func(t *testing.T) {
		for _, text := range []string{"\x01\x05alice\x07hunter3", "\x01\x03bob\x07hunter2"} {
			c := greeted(t)
			c.say(text, 5, 1, 0, to) // whatever follows
			if b := c.take(2); b[0] != 1 || b[1] == 0 {
				t.Errorf("heard % x", b)
			}
			c.ended()
		}
	})
	t.Run("12 the longest", func(t *testing.T) {
		c := greeted(t)
		long := bytes.Repeat([]byte("x"), 255)
		c.say(1, 255, long, 255, long)
		if b := c.take(2); b[0] != 1 || b[1] == 0 {
			t.Errorf("heard % x", b)
		}
		c.ended()
	})
}

// asked returns a client that was let in and has asked for something.
func asked(t *testing.T, at string, request ...any) *client {
	t.Helper()
	c := dial(t, at)
	c.say(5, 1, 0)
	c.hear(5, 0)
	c.say(request...)
	return c
}

// Requests: RFC 1928, sections 4 to 6.
func TestRequest(t *testing.T) {
	t.Parallel()
	_, at := start(t, config.Proxy{Connect: 500 * time.Millisecond, Rules: []config.ProxyRule{
		{Ports: []config.PortRange{{First: 1, Last: 1}}, Via: []string{config.Refuse}},
		{Via: []string{config.Direct}},
	}})
	to := listen(t, "127.0.0.1", echo)
	fails := func(name string, reply int, request ...any) {
		t.Run(name, func(t *testing.T) {
			c := asked(t, at, request...)
			c.hear(5, reply, 0, nowhere)
			c.ended() // 17: a failing reply is followed by the end
		})
	}
	fails("13 another version", 1, 4, 1, 0, to)
	fails("13 a reserved byte that is not 0", 1, 5, 1, 1, to)
	fails("14 a name with a NUL", 1, 5, 1, 0, named("here.test\x00.example", to.Port()))
	fails("14 a name of no bytes", 1, 5, 1, 0, named("", to.Port()))
	fails("15 an unknown type of address", 8, 5, 1, 0, 7, 127, 0, 0, 1, 0, 80)
	fails("16 an unknown command", 7, 5, 9, 0, to)
	fails("18 refused by the rules", 2, 5, 1, 0, netip.MustParseAddrPort("127.0.0.1:1"))
	fails("18 refused by the rules, by name", 2, 5, 1, 0, named("here.test", 1))
	fails("18 connection refused", 5, 5, 1, 0, closedPort(t))
	fails("18 no such host", 4, 5, 1, 0, named("nobody.test", 80))
	fails("18 no answer in time", 4, 5, 1, 0, named("slow.test", 80))
	t.Run("the proxy itself is a target like others", func(t *testing.T) {
		c := asked(t, at, 5, 1, 0, netip.MustParseAddrPort(at), 5, 1, 0, 5, 1, 0, to)
		c.hear(5, 0, 0)
		c.take(7)
		c.hear(5, 0, 5, 0, 0)
	})
	t.Run("18 by what it is, not by its text", func(t *testing.T) {
		for err, want := range map[error]socks5.Reply{
			syscall.ENETUNREACH: 3, syscall.EHOSTUNREACH: 4, syscall.ETIMEDOUT: 4, context.DeadlineExceeded: 4, syscall.ECONNREFUSED: 5,
			syscall.EACCES: 2, syscall.EAFNOSUPPORT: 8, socks5.TTLExpired: 6, errors.New("connection refused"): 1,
		} {
			if have := replyOf(fmt.Errorf("dial: %w", &net.OpError{Op: "dial", Err: err})); have != want {
				t.Errorf("%v is answered by %d, want %d", err, have, want)
			}
		}
	})
	t.Run("14 an address that is written as a name", func(t *testing.T) {
		c := asked(t, at, 5, 1, 0, named("127.0.0.1", to.Port()))
		c.hear(5, 0, 0)
	})
}

func closedPort(t *testing.T) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return addrPort(l.Addr())
}

// CONNECT.
func TestConnect(t *testing.T) {
	t.Parallel()
	plane, at := start(t, config.Proxy{})
	peers := make(chan netip.AddrPort, 10)
	to := listen(t, "127.0.0.1", func(c *net.TCPConn) {
		peers <- addrPort(c.RemoteAddr())
		echo(c)
	})
	t.Run("20 BND is the server's address to the target", func(t *testing.T) {
		c := asked(t, at, 5, 1, 0, to)
		c.hear(5, 0, 0, <-peers)
	})
	t.Run("21 what follows the request is not lost, 22 half-close", func(t *testing.T) {
		c := asked(t, at, 5, 1, 0, to, "hello")
		c.take(10)
		c.say(", world")
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		c.hear("hello, world")
		c.ended()
		<-peers
	})
	t.Run("21 everything in one go", func(t *testing.T) {
		c := dial(t, at)
		c.say(5, 1, 0, 5, 1, 0, to, "hello")
		_ = c.CloseWrite()
		c.hear(5, 0, 5, 0, 0, <-peers, "hello")
		c.ended()
	})
	t.Run("22 the target ends first", func(t *testing.T) {
		heard := make(chan string, 1)
		first := listen(t, "127.0.0.1", func(c *net.TCPConn) {
			_, _ = c.Write([]byte("bye"))
			_ = c.CloseWrite()
			b, _ := io.ReadAll(c)
			heard <- string(b)
		})
		c := asked(t, at, 5, 1, 0, first)
		c.take(10)
		c.hear("bye")
		c.ended()
		c.say("still here")
		_ = c.CloseWrite()
		if text := <-heard; text != "still here" {
			t.Errorf("the target heard %q", text)
		}
	})
	t.Run("23 an abort goes through to the target", func(t *testing.T) {
		failed := make(chan error, 1)
		server := listen(t, "127.0.0.1", func(c *net.TCPConn) {
			_, err := io.ReadAll(c)
			failed <- err
		})
		c := asked(t, at, 5, 1, 0, server)
		c.take(10)
		_ = c.SetLinger(0)
		c.Close()
		if err := <-failed; !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the target met with %v", err)
		}
	})
	t.Run("23 an abort goes through to the client", func(t *testing.T) {
		server := listen(t, "127.0.0.1", func(c *net.TCPConn) {
			_, _ = io.ReadFull(c, make([]byte, 1))
			_ = c.SetLinger(0)
		})
		c := asked(t, at, 5, 1, 0, server, "x")
		c.take(10)
		if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the client met with %v", err)
		}
	})
	t.Run("24 a name of both families", func(t *testing.T) {
		c := asked(t, at, 5, 1, 0, named("both.test", to.Port()), "hello")
		_ = c.CloseWrite()
		c.hear(5, 0, 0, <-peers, "hello") // nobody listens at ::1
	})
	t.Run("a million bytes", func(t *testing.T) {
		c := asked(t, at, 5, 1, 0, to)
		c.take(10)
		text := make([]byte, 1_000_000)
		for i := range text {
			text[i] = byte(i * 7)
		}
		go func() {
			_, _ = c.Write(text)
			_ = c.CloseWrite()
		}()
		if back, err := io.ReadAll(c); err != nil || !bytes.Equal(back, text) {
			t.Errorf("%d bytes came back (%v)", len(back), err)
		}
	})
	within(t, "no flow is left", func() bool { return len(plane.Flows()) == 0 })
	if totals, _ := plane.Totals(); totals["test"].Connections != 8 || totals["test"].Failed != 0 || totals["test"].Sent < 1_000_000 {
		t.Errorf("totals are %+v", totals["test"])
	}
}

// BIND.
func TestBind(t *testing.T) {
	t.Parallel()
	_, at := start(t, config.Proxy{})
	peer := netip.MustParseAddrPort("127.0.0.1:21")
	t.Run("25 where, 26 who has come, 30 one only", func(t *testing.T) {
		c := asked(t, at, 5, 2, 0, peer)
		where := c.bound()
		if where.Port() == 0 || where.Addr().IsUnspecified() {
			t.Fatalf("it listens at %s", where)
		}
		p := dial(t, where.String())
		c.hear(5, 0, 0, addrPort(p.LocalAddr()))
		if again, err := net.Dial("tcp", where.String()); err == nil {
			again.Close()
			t.Error("a second one came in")
		}
		p.say("from the server")
		c.hear("from the server")
		c.say("from the client")
		p.hear("from the client")
	})
	t.Run("27 another host is turned away", func(t *testing.T) {
		c := asked(t, at, 5, 2, 0, peer)
		where := c.bound()
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 9)}}
		if other, err := d.Dial("tcp", where.String()); err == nil { // it may be turned away before
			defer other.Close()
			_ = other.SetDeadline(time.Now().Add(patience))
			if _, err := other.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("the other host met with %v", err)
			}
		}
		p := dial(t, where.String())
		c.hear(5, 0, 0, addrPort(p.LocalAddr()))
	})
	t.Run("29 the client goes", func(t *testing.T) {
		c := asked(t, at, 5, 2, 0, peer)
		where := c.bound()
		c.Close()
		within(t, "nobody listens", func() bool {
			p, err := net.Dial("tcp", where.String())
			if err == nil {
				p.Close()
			}
			return errors.Is(err, syscall.ECONNREFUSED)
		})
	})
}

// UDP ASSOCIATE: RFC 1928, section 7.
func TestAssociate(t *testing.T) {
	t.Parallel()
	plane, at := start(t, config.Proxy{})
	to, answer := udpEcho(t, "127.0.0.1:0")
	associated := func(t *testing.T, from netip.AddrPort) (*client, netip.AddrPort) {
		t.Helper()
		c := asked(t, at, 5, 3, 0, from)
		return c, c.bound()
	}
	t.Run("31 no source is named, 32 where the relay is, 35 to 37 headers", func(t *testing.T) {
		_, relay := associated(t, nowhere)
		if relay.Addr().String() != "127.0.0.1" || relay.Port() == 0 {
			t.Fatalf("the relay is %s", relay)
		}
		u := udp(t, "127.0.0.1:0")
		u.send(relay, 0, 0, 0, to, "hello")
		u.hear(0, 0, 0, to, "hello")
		u.send(relay, 0, 0, 0, named("here.test", to.Port()), "by name")
		u.hear(0, 0, 0, to, "by name") // where it really came from
		u.send(relay, 0, 0, 0, named("both.test", to.Port()), "none at ::1")
		u.silent()
	})
	t.Run("31 a port is named", func(t *testing.T) {
		u, other := udp(t, "127.0.0.1:0"), udp(t, "127.0.0.1:0")
		_, relay := associated(t, addrPort(u.LocalAddr()))
		other.send(relay, 0, 0, 0, to, "other")
		other.silent()
		u.send(relay, 0, 0, 0, to, "hello")
		u.hear(0, 0, 0, to, "hello")
	})
	t.Run("33 it ends with its connection", func(t *testing.T) {
		c, relay := associated(t, nowhere)
		u := udp(t, "127.0.0.1:0")
		u.send(relay, 0, 0, 0, to, "hello")
		u.hear(0, 0, 0, to, "hello")
		c.Close()
		within(t, "the association is gone", func() bool {
			return !slices.ContainsFunc(plane.Flows(), func(f Flow) bool { return f.Client == addrPort(c.LocalAddr()) })
		})
		u.send(relay, 0, 0, 0, to, "more")
		u.silent()
	})
	t.Run("34 what is nothing is dropped", func(t *testing.T) {
		_, relay := associated(t, nowhere)
		u := udp(t, "127.0.0.1:0")
		for _, b := range [][]byte{{}, {0}, {0, 0, 0}, {0, 1, 0, 1, 127, 0, 0, 1, 0, 80}, {0, 0, 0, 9, 1, 2, 3}, join(0, 0, 0, 3, 200, "short")} {
			u.send(relay, b)
		}
		u.silent()
		u.send(relay, 0, 0, 0, to, "hello")
		u.hear(0, 0, 0, to, "hello")
	})
	t.Run("36 another address is dropped", func(t *testing.T) {
		_, relay := associated(t, nowhere)
		other := udp(t, "127.0.0.9:0")
		other.send(relay, 0, 0, 0, to, "hello")
		other.silent()
		u := udp(t, "127.0.0.1:0")
		u.send(relay, 0, 0, 0, to, "hello")
		u.hear(0, 0, 0, to, "hello")
	})
	t.Run("38 fragments", func(t *testing.T) {
		_, relay := associated(t, nowhere)
		u := udp(t, "127.0.0.1:0")
		u.send(relay, 0, 0, 1, to, "one ")
		u.send(relay, 0, 0, 2, to, "two ")
		u.send(relay, 0, 0, 0x83, to, "three")
		u.hear(0, 0, 0, to, "one two three")
		// One is missing; a number that is lower begins anew; a whole one ends all.
		u.send(relay, 0, 0, 1, to, "a")
		u.send(relay, 0, 0, 0x83, to, "c")
		u.silent()
		u.send(relay, 0, 0, 1, to, "old ")
		u.send(relay, 0, 0, 1, to, "new ")
		u.send(relay, 0, 0, 0x82, to, "end")
		u.hear(0, 0, 0, to, "new end")
		u.send(relay, 0, 0, 1, to, "old ")
		u.send(relay, 0, 0, 0, to, "whole")
		u.hear(0, 0, 0, to, "whole")
		u.send(relay, 0, 0, 0x82, to, "end")
		u.silent()
	})
	t.Run("39 a dead target ends nothing", func(t *testing.T) {
		_, relay := associated(t, nowhere)
		u := udp(t, "127.0.0.1:0")
		dead, _ := udpEcho(t, "127.0.0.1:0")
		dead = netip.AddrPortFrom(dead.Addr(), 1)
		for range 5 {
			u.send(relay, 0, 0, 0, dead, "hello")
		}
		u.send(relay, 0, 0, 0, to, "hello")
		u.hear(0, 0, 0, to, "hello")
	})
	t.Run("40 answers from another port, and from a stranger", func(t *testing.T) {
		_, relay := associated(t, nowhere)
		u := udp(t, "127.0.0.1:0")
		u.send(relay, 0, 0, 0, to, "hello")
		u.hear(0, 0, 0, to, "hello")
		back := answer() // where the target saw it come from
		same := udp(t, "127.0.0.1:0")
		same.send(back, "from another port")
		u.hear(0, 0, 0, addrPort(same.LocalAddr()), "from another port")
		stranger := udp(t, "127.0.0.9:0")
		stranger.send(netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), back.Port()), "from a stranger")
		u.silent()
	})
	t.Run("41 what else the client says means nothing", func(t *testing.T) {
		c, relay := associated(t, nowhere)
		c.say("anything")
		u := udp(t, "127.0.0.1:0")
		u.send(relay, 0, 0, 0, to, "hello")
		u.hear(0, 0, 0, to, "hello")
	})
	t.Run("the largest", func(t *testing.T) {
		_, relay := associated(t, nowhere)
		u := udp(t, "127.0.0.1:0")
		text := bytes.Repeat([]byte("x"), 65507-10)
		u.send(relay, 0, 0, 0, to, text)
		u.hear(0, 0, 0, to, text)
	})
}

// udpClient is a socket that sends and hears exactly what it is told to.
type udpClient struct {
	*net.UDPConn
	t *testing.T
}

func udp(t *testing.T, at string) *udpClient {
	t.Helper()
	c, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(at)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return &udpClient{c, t}
}

func (c *udpClient) send(to netip.AddrPort, parts ...any) {
	c.t.Helper()
	if _, err := c.WriteToUDPAddrPort(join(parts...), to); err != nil {
		c.t.Fatal(err)
	}
}

func (c *udpClient) hear(parts ...any) {
	c.t.Helper()
	want := join(parts...)
	b := make([]byte, 70_000)
	_ = c.SetReadDeadline(time.Now().Add(patience))
	n, err := c.Read(b)
	if err != nil || !bytes.Equal(b[:n], want) {
		c.t.Fatalf("heard % x (%v), want % x", b[:min(n, 60)], err, want[:min(len(want), 60)])
	}
}

// silent fails the test if anything comes. It asks the relay's own loop: a datagram that
// was to be relayed would have been by the time that one sent after it is answered.
func (c *udpClient) silent() {
	c.t.Helper()
	b := make([]byte, 70_000)
	_ = c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if n, err := c.Read(b); err == nil {
		c.t.Fatalf("heard % x, want nothing", b[:n])
	}
}

// udpEcho answers datagrams. The function returns where the last one came from.
func udpEcho(t *testing.T, at string) (netip.AddrPort, func() netip.AddrPort) {
	t.Helper()
	c := udp(t, at)
	from := make(chan netip.AddrPort, 100)
	go func() {
		b := make([]byte, 70_000)
		for {
			n, peer, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			_, _ = c.WriteToUDPAddrPort(b[:n], peer)
			select {
			case from <- peer:
			default:
			}
		}
	}()
	return addrPort(c.LocalAddr()), func() (last netip.AddrPort) {
		for {
			select {
			case last = <-from:
			default:
				return last
			}
		}
	}
}

// What strangers may use, and what of a host is nobody else's.
func TestLimits(t *testing.T) {
	t.Parallel()
	to := listen(t, "127.0.0.1", echo)
	t.Run("connections", func(t *testing.T) {
		_, at := start(t, config.Proxy{MaxConnections: 2, MaxPerClient: 100})
		one, two := asked(t, at, 5, 1, 0, to), asked(t, at, 5, 1, 0, to)
		one.take(10)
		two.take(10)
		three := dial(t, at) // in the kernel's queue
		three.say(5, 1, 0)
		_ = three.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		if _, err := three.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("the third one met with %v", err)
		}
		one.Close()
		_ = three.SetReadDeadline(time.Now().Add(patience))
		three.hear(5, 0)
	})
	t.Run("per client", func(t *testing.T) {
		_, at := start(t, config.Proxy{MaxConnections: 100, MaxPerClient: 1})
		asked(t, at, 5, 1, 0, to).take(10)
		c, err := net.Dial("tcp", at)
		if err != nil {
			return // it was so fast
		}
		defer c.Close()
		_, _ = c.Write([]byte{5, 1, 0})
		if b, _ := io.ReadAll(c); len(b) > 0 {
			t.Error("a second one of the same client was served")
		}
	})
	t.Run("who may come", func(t *testing.T) {
		_, at := start(t, config.Proxy{Allow: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}})
		c, err := net.Dial("tcp", at)
		if err != nil {
			return // it was so fast
		}
		defer c.Close()
		_, _ = c.Write([]byte{5, 1, 0})
		if b, _ := io.ReadAll(c); len(b) > 0 {
			t.Errorf("heard % x", b)
		}
	})
	t.Run("idle", func(t *testing.T) {
		plane, at := start(t, config.Proxy{Idle: 200 * time.Millisecond})
		c := asked(t, at, 5, 1, 0, to)
		c.take(10)
		flows, stop := plane.Follow()
		defer stop()
		_, _ = io.ReadAll(c)
		for f := range flows {
			if !f.Ended.IsZero() {
				if f.Outcome != "closed: nothing was sent for too long" {
					t.Errorf("it ended as %q", f.Outcome)
				}
				return
			}
		}
	})
	t.Run("settings that change", func(t *testing.T) {
		plane, at := start(t, config.Proxy{})
		c := asked(t, at, 5, 1, 0, to)
		c.take(10)
		next := plane.servers["test"].now.Load().Proxy
		next.Rules = []config.ProxyRule{{Via: []string{config.Refuse}}}
		if err := plane.Apply(t.Context(), Want{Proxies: []config.Proxy{next}}); err != nil {
			t.Fatal(err)
		}
		asked(t, at, 5, 1, 0, to).hear(5, 2, 0, nowhere)
		c.say("hello")
		_ = c.CloseWrite()
		c.hear("hello") // who was there stays
		if err := plane.Apply(t.Context(), Want{}); err != nil {
			t.Fatal(err)
		}
		if _, err := net.Dial("tcp", at); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("the proxy is gone, and a client meets with %v", err)
		}
	})
}

// A name that a rule has looked up is not looked up again to connect: it could be another
// address then.
func TestRebinding(t *testing.T) {
	t.Parallel()
	plane, at := start(t, config.Proxy{Rules: []config.ProxyRule{
		{Destinations: []netip.Prefix{netip.MustParsePrefix("127.0.0.9/32")}, Via: []string{config.Direct}},
	}})
	inside := listen(t, "127.0.0.1", echo)
	asks := 0
	plane.resolve = func(_ context.Context, to target) ([]netip.AddrPort, error) {
		asks++
		if asks > 1 {
			return []netip.AddrPort{inside}, nil
		}
		return []netip.AddrPort{netip.AddrPortFrom(netip.MustParseAddr("127.0.0.9"), inside.Port())}, nil
	}
	asked(t, at, 5, 1, 0, named("rebinds.test", inside.Port())).hear(5, 5, 0, nowhere)
	if asks != 1 {
		t.Errorf("the name was resolved %d times", asks)
	}
}
