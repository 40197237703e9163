package proxy

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/pentad/pentad/config"
)

// What is read of a client that does not know of the proxy, to find out which name it
// means: for how long, and how much. Whose server speaks first waits so long.
const (
	sniffWait = 300 * time.Millisecond
	maxSniff  = 32 << 10
)

// sniff returns the name that the client's first words say it means: that of TLS (SNI,
// RFC 6066, section 3), or the Host of HTTP; empty: none. It looks only if a rule asks
// for names.
func (s *session) sniff() (string, error) {
	if !slices.ContainsFunc(s.settings.Rules, func(r config.ProxyRule) bool { return len(r.Domains) > 0 }) {
		return "", nil
	}
	s.in = bufio.NewReaderSize(s.conn, maxHello)
	_ = s.conn.SetReadDeadline(time.Now().Add(sniffWait))
	defer func() { _ = s.conn.SetReadDeadline(time.Time{}) }()
	first, err := s.in.Peek(1)
	if errors.Is(err, syscall.ECONNRESET) {
		return "", err
	}
	if err != nil {
		return "", nil
	}
	var taken bytes.Buffer
	watched := &watchedReader{Reader: s.in}
	from := io.TeeReader(io.LimitReader(watched, maxSniff), &taken)
	name := ""
	if first[0] == recordHandshake {
		name = serverName(from)
	} else if first[0] >= 'A' && first[0] <= 'Z' {
		name = httpHost(from)
	}
	s.sent = taken.Bytes()
	if errors.Is(watched.err, syscall.ECONNRESET) {
		return "", watched.err // the target is not to take what there is for all
	}
	if checkHost(name) {
		return strings.TrimSuffix(name, "."), nil
	}
	return "", nil
}

// watchedReader remembers what ended it.
type watchedReader struct {
	io.Reader
	err error
}

func (r *watchedReader) Read(b []byte) (int, error) {
	n, err := r.Reader.Read(b)
	if err != nil {
		r.err = err
	}
	return n, err
}

// checkHost reports whether a text is a name, and no address.
func checkHost(name string) bool {
	if name == "" || len(name) > 255 || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return false
	}
	_, err := netip.ParseAddr(name)
	return err != nil
}

const recordHandshake = 22 // RFC 8446, section 5.1

var errSeen = errors.New("seen")

// serverName reads a ClientHello.
func serverName(from io.Reader) (name string) {
	_ = tls.Server(readOnly{Reader: from}, &tls.Config{GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		name = hello.ServerName
		return nil, errSeen
	}}).Handshake()
	return name
}

// readOnly is a connection that drops what is written.
type readOnly struct {
	net.Conn
	io.Reader
}

func (c readOnly) Read(b []byte) (int, error)     { return c.Reader.Read(b) }
func (readOnly) Write(b []byte) (int, error)      { return len(b), nil }
func (readOnly) SetDeadline(time.Time) error      { return nil }
func (readOnly) SetReadDeadline(time.Time) error  { return nil }
func (readOnly) SetWriteDeadline(time.Time) error { return nil }
func (readOnly) Close() error                     { return nil }

// httpHost reads the head of a request.
func httpHost(from io.Reader) string {
	r, err := http.ReadRequest(bufio.NewReader(from))
	if err != nil {
		return ""
	}
	host := r.Host
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	return host
}
