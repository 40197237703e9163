package probe

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"time"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/service"
)

// newRedis returns a probe that asks for the role (redis.io/commands/role). Who
// asks for a replica wants one that follows: not one that has lost its primary.
//
// It speaks the two commands by itself: a client library makes room for as many
// elements as a server announces.
func newRedis(h service.Health, dial dialFunc) Func {
	return func(ctx context.Context, addr netip.AddrPort) error {
		password, err := host.ReadPassword(h.PasswordFile)
		if err != nil {
			return err
		}
		conn, err := dial(ctx, "tcp", addr.String())
		if err != nil {
			return err
		}
		defer conn.Close()
		defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
		c := newRedisConn(conn, h)
		if err := c.login(h.User, password); err != nil {
			return deadline(ctx, err)
		}
		r, err := c.role()
		if err != nil {
			return deadline(ctx, err)
		}
		if h.Role == service.RoleReplica && r.name == "slave" && r.link != "connected" {
			return fmt.Errorf("its link to the primary is in state %q", r.link)
		}
		return checkRole(h.Role, r.name == "master")
	}
}

// deadline returns why a probe was interrupted, if it was.
func deadline(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// The Redis serialization protocol (redis.io/docs/reference/protocol-spec), as
// much of it as a probe needs.
const (
	maxRedisString = 256 // bytes; of what a probe looks at, roles and states are the longest
	maxRedisLine   = 512 // bytes
)

var errRedis = errors.New("this is not what Redis answers to ROLE")

type redisConn struct {
	r *bufio.Reader
	w io.Writer
}

func newRedisConn(conn net.Conn, h service.Health) redisConn {
	if h.TLS {
		conn = tls.Client(conn, tlsConfig(h))
	}
	return redisConn{bufio.NewReaderSize(conn, maxRedisLine), conn}
}

// send writes a command, an array of bulk strings.
func (c redisConn) send(words ...string) error {
	b := fmt.Appendf(nil, "*%d\r\n", len(words))
	for _, w := range words {
		b = fmt.Appendf(b, "$%d\r\n%s\r\n", len(w), w)
	}
	_, err := c.w.Write(b)
	if err == nil {
		return nil
	}
	// A server that will not talk may have said why before it hung up: in protected mode
	// Redis does.
	if kind, text, readErr := c.line(); readErr == nil && kind == '-' {
		return fmt.Errorf("it said %q", text)
	}
	return err
}

func (c redisConn) login(user, password string) error {
	if password == "" {
		return nil
	}
	words := []string{"AUTH", password}
	if user != "" {
		words = []string{"AUTH", user, password}
	}
	if err := c.send(words...); err != nil {
		return err
	}
	kind, text, err := c.line()
	if err != nil {
		return err
	}
	if kind != '+' {
		return fmt.Errorf("it answered %q to AUTH", text)
	}
	return nil
}

// redisRole is the beginning of an answer to ROLE.
type redisRole struct {
	name string // master, slave or sentinel
	link string // of a replica: the state of its link to the primary
}

func (c redisConn) role() (r redisRole, err error) {
	if err := c.send("ROLE"); err != nil {
		return r, err
	}
	kind, text, err := c.line()
	if err != nil {
		return r, err
	}
	if kind == '-' {
		return r, fmt.Errorf("it said %q", text)
	}
	n, bad := strconv.Atoi(text)
	if kind != '*' || bad != nil || n < 1 {
		return r, errRedis
	}
	if r.name, err = c.element(); err != nil || r.name != "slave" {
		return r, err
	}
	// The primary's host and port stand before the state of the link.
	for range 3 {
		if r.link, err = c.element(); err != nil {
			return r, err
		}
	}
	return r, nil
}

// element reads a string or a number.
func (c redisConn) element() (string, error) {
	kind, text, err := c.line()
	if err != nil || kind == '+' || kind == ':' {
		return text, err
	}
	n, bad := strconv.Atoi(text)
	if kind != '$' || bad != nil || n < 0 || n > maxRedisString {
		return "", errRedis
	}
	b := make([]byte, n+len("\r\n"))
	if _, err := io.ReadFull(c.r, b); err != nil {
		return "", err
	}
	return string(b[:n]), nil
}

// line reads a line: what kind of value begins, and what is said of it. The error
// is the server's own, if that is what it sent.
func (c redisConn) line() (kind byte, text string, err error) {
	b, err := c.r.ReadSlice('\n')
	if errors.Is(err, bufio.ErrBufferFull) {
		return 0, "", errRedis
	}
	if err != nil {
		return 0, "", err
	}
	if len(b) < len("+\r\n") || b[len(b)-2] != '\r' {
		return 0, "", errRedis
	}
	kind, text = b[0], string(b[1:len(b)-2])
	if kind == '-' {
		return 0, "", fmt.Errorf("it answered %q", text)
	}
	return kind, text, nil
}
