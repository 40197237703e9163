package proxy

import (
	"io"
	"log/slog"
	"net"
	"net/netip"
	"testing"

	"github.com/pentad/pentad/config"
)

// One connection of a client, from its first byte to its last.
func BenchmarkConnect(b *testing.B) {
	p := New(slog.New(slog.DiscardHandler))
	c := config.DefaultProxy
	c.Name, c.Protocols, c.Listen = "test", []config.ProxyProtocol{config.SOCKS5}, []netip.AddrPort{loopback}
	if err := p.Apply(b.Context(), Want{Proxies: []config.Proxy{c}}); err != nil {
		b.Fatal(err)
	}
	defer p.Close()
	var at string
	for _, l := range p.servers["test"].listeners {
		at = l.Addr().String()
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = c.Write([]byte("x"))
				c.Close()
			}()
		}
	}()
	request := join(5, 1, 0, addrPort(l.Addr()))
	b.ReportAllocs()
	for b.Loop() {
		c, err := net.Dial("tcp", at)
		if err != nil {
			b.Fatal(err)
		}
		_, _ = c.Write([]byte{5, 1, 0})
		_, _ = io.ReadFull(c, make([]byte, 2))
		_, _ = c.Write(request)
		if n, err := io.Copy(io.Discard, c); err != nil || n != 11 {
			b.Fatal(n, err)
		}
		c.Close()
	}
}
