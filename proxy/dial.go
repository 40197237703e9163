package proxy

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/proxy/relay"
	"github.com/pentad/pentad/proxy/socks5"
)

// dialer opens a connection to a target.
type dialer func(context.Context, target) (relay.Conn, error)

// nextAttempt is after how long the next address of a name is tried beside the one
// before (RFC 8305, section 8: Connection Attempt Delay).
const nextAttempt = 250 * time.Millisecond

// dialAny connects to the first address that answers.
func dialAny(ctx context.Context, addresses []netip.AddrPort) (relay.Conn, error) {
	if len(addresses) == 1 {
		return dialTCP(ctx, addresses[0], netip.Addr{})
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		conn relay.Conn
		err  error
	}
	results := make(chan result)
	dial := func(a netip.AddrPort) {
		c, err := dialTCP(ctx, a, netip.Addr{})
		select {
		case results <- result{c, err}:
		case <-ctx.Done():
			if err == nil {
				c.Close()
			}
		}
	}
	var first error
	next := time.NewTimer(0)
	defer next.Stop()
	for running := 0; len(addresses) > 0 || running > 0; {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-next.C:
			if len(addresses) == 0 {
				continue
			}
			go dial(addresses[0])
			addresses = addresses[1:]
			running++
			next.Reset(nextAttempt)
		case r := <-results:
			if r.err == nil {
				return r.conn, nil
			}
			running--
			if first == nil {
				first = r.err
			}
			next.Reset(0)
		}
	}
	if first == nil {
		first = errors.New("it has no address")
	}
	return nil, first
}

// dialTCP connects to an address, as if from another host if from is valid.
func dialTCP(ctx context.Context, a netip.AddrPort, from netip.Addr) (relay.Conn, error) {
	d := net.Dialer{KeepAlive: -1, Control: func(network, address string, raw syscall.RawConn) error {
		return errors.Join(mark(network, address, raw), keepalive(network, address, raw))
	}}
	d.SetMultipathTCP(false) // what is spliced has to be plain TCP
	if from.IsValid() {
		d.Control = func(network, address string, raw syscall.RawConn) error {
			return errors.Join(mark(network, address, raw), keepalive(network, address, raw), disguised(network, address, raw))
		}
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
	}
	c, err := d.DialContext(ctx, "tcp", a.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// mark marks a socket as one of a proxy of this host: what it sends is not led to a proxy.
// Without the right to do so nothing is captured either.
func mark(_, _ string, raw syscall.RawConn) error {
	return raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, host.ProxyMark) })
}

// disguised lets a socket have the address of another host, and a port that only its
// target cannot have twice.
func disguised(network, _ string, raw syscall.RawConn) error {
	var err error
	failed := raw.Control(func(fd uintptr) {
		err = errors.Join(transparent(int(fd), network), unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1))
	})
	return errors.Join(failed, err)
}

// keepaliveAfter is how long a connection is silent before its other end is asked whether
// it is there, and how long it has to answer each time; after nine times it is gone
// (net.ipv4.tcp_keepalive_probes).
const keepaliveAfter = 15 // seconds

func keepalive(_, _ string, raw syscall.RawConn) error {
	var err error
	failed := raw.Control(func(fd uintptr) {
		err = errors.Join(
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1),
			unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, keepaliveAfter),
			unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, keepaliveAfter))
	})
	return errors.Join(failed, err)
}

// target is where a client wants to go.
type target = socks5.Address

// resolver returns the addresses of a target.
type resolver func(context.Context, target) ([]netip.AddrPort, error)

// systemResolver asks the host, and returns IPv6 and IPv4 in turn (RFC 8305, section 4).
func systemResolver(ctx context.Context, to target) ([]netip.AddrPort, error) {
	if to.Name == "" {
		return []netip.AddrPort{to.AddrPort()}, nil
	}
	all, err := net.DefaultResolver.LookupNetIP(ctx, "ip", to.Name)
	if err != nil {
		return nil, err
	}
	var families [2][]netip.AddrPort
	for _, a := range all {
		a = a.Unmap()
		i := 0
		if a.Is4() {
			i = 1
		}
		families[i] = append(families[i], netip.AddrPortFrom(a, to.Port))
	}
	var mixed []netip.AddrPort
	for i := range max(len(families[0]), len(families[1])) {
		for _, f := range families {
			if i < len(f) {
				mixed = append(mixed, f[i])
			}
		}
	}
	return mixed, nil
}

// through returns a dialer that goes through an upstream, which before reaches.
func through(u config.Upstream, before dialer) dialer {
	return func(ctx context.Context, to target) (relay.Conn, error) {
		at, err := upstreamAddress(u)
		if err != nil {
			return nil, err
		}
		login, err := loginOf(u)
		if err != nil {
			return nil, fmt.Errorf("upstream %s: %w", u.Name, err)
		}
		c, err := before(ctx, at)
		if err != nil {
			return nil, fmt.Errorf("upstream %s: %w", u.Name, err)
		}
		asked, err := ask(ctx, u, c, login, to)
		if err != nil {
			c.Close()
			return nil, fmt.Errorf("upstream %s: %w", u.Name, err)
		}
		return asked, nil
	}
}

func upstreamAddress(u config.Upstream) (target, error) {
	name, port, err := net.SplitHostPort(u.Address)
	if err != nil {
		return target{}, err
	}
	n, err := net.LookupPort("tcp", port)
	if err != nil {
		return target{}, err
	}
	return socks5.ParseAddress(name, uint16(n))
}

// ask has an upstream connect to a target. The context bounds it.
func ask(ctx context.Context, u config.Upstream, c relay.Conn, login socks5.Login, to target) (relay.Conn, error) {
	stop := context.AfterFunc(ctx, func() { c.Close() })
	var err error
	if u.Protocol == config.SOCKS5 {
		_, err = socks5.Ask(c, login, socks5.Request{Command: socks5.Connect, Address: to})
	} else {
		c, err = askHTTP(ctx, u, c, login, to)
	}
	if !stop() && ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return c, err
}

// maxHead bounds what an upstream may say before it is connected, in bytes.
const maxHead = 64 << 10

// askHTTP asks for a tunnel (RFC 9110, section 9.3.6).
func askHTTP(ctx context.Context, u config.Upstream, c relay.Conn, login socks5.Login, to target) (relay.Conn, error) {
	if u.TLS {
		name, _, _ := net.SplitHostPort(u.Address)
		t := tls.Client(c, &tls.Config{ServerName: name, MinVersion: tls.VersionTLS12})
		if err := t.HandshakeContext(ctx); err != nil {
			return nil, err
		}
		c = t
	}
	head := "CONNECT " + to.String() + " HTTP/1.1\r\nHost: " + to.String() + "\r\n"
	if login != (socks5.Login{}) {
		head += "Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(login.User+":"+login.Password)) + "\r\n"
	}
	if _, err := io.WriteString(c, head+"\r\n"); err != nil {
		return nil, err
	}
	r := bufio.NewReader(io.LimitReader(c, maxHead))
	answer, err := http.ReadResponse(r, &http.Request{Method: http.MethodConnect})
	if err != nil {
		return nil, fmt.Errorf("no answer to CONNECT that makes sense: %w", err)
	}
	if answer.StatusCode/100 != 2 {
		return nil, &statusError{answer.StatusCode, answer.Status}
	}
	if n := r.Buffered(); n > 0 {
		early := make([]byte, n)
		if _, err := io.ReadFull(r, early); err != nil {
			return nil, err
		}
		return relay.WithEarly(c, early), nil
	}
	return c, nil
}

// statusError is an HTTP proxy that does not do what it is asked for.
type statusError struct {
	code int
	text string
}

func (e *statusError) Error() string { return "it answers " + e.text }

// loginOf reads who we are to an upstream.
func loginOf(u config.Upstream) (socks5.Login, error) {
	if u.User == "" {
		return socks5.Login{}, nil
	}
	password, err := host.ReadPassword(u.PasswordFile)
	return socks5.Login{User: u.User, Password: password}, err
}
