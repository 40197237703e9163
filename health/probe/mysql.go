package probe

import (
	"context"
	"database/sql"
	"fmt"
	"io"
	"log"
	"net"
	"net/netip"

	"github.com/go-sql-driver/mysql"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/service"
)

// askReadOnly has one row where the server is read-only. The answer is how many
// rows there were: to read a row, the library makes room for as many columns as a
// server announces.
const askReadOnly = "select 1 from dual where @@global.read_only into @pentad"

// newMySQL returns a probe that logs in and asks whether the server takes writes:
// replicas are kept read-only (MySQL manual, system variable read_only).
func newMySQL(h service.Health, dial dialFunc) Func {
	quiet := log.New(io.Discard, "", 0)
	return func(ctx context.Context, addr netip.AddrPort) error {
		password, err := host.ReadPassword(h.PasswordFile)
		if err != nil {
			return err
		}
		c := mysql.NewConfig()
		c.Net, c.Addr, c.User, c.Passwd = "tcp", addr.String(), h.User, password
		var d dialing
		c.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := d.through(dial)(ctx, network, address)
			if err != nil {
				return nil, err
			}
			return &packets{Conn: conn, first: h.TLS}, nil
		}
		c.Logger = quiet
		if h.TLS {
			c.TLS = tlsConfig(h)
		}
		connector, err := mysql.NewConnector(c)
		if err != nil {
			return err
		}
		db := sql.OpenDB(connector)
		defer db.Close()
		r, err := db.ExecContext(ctx, askReadOnly)
		if err != nil {
			return own(err, d.noted())
		}
		rows, err := r.RowsAffected()
		if err != nil {
			return err
		}
		return checkRole(h.Role, rows == 0)
	}
}

// maxPacket is the longest packet that a server may announce to a probe, in bytes.
const maxPacket = 64 << 10

// packets is a connection that fails when the server announces a longer packet
// than an honest one has for a probe (MySQL internals, "MySQL Packets": three bytes
// of length, low byte first, and a number): the library makes room for what is
// announced before it comes.
type packets struct {
	net.Conn
	first  bool // look at the first packet only: what comes after it is TLS
	over   bool
	header [4]byte
	have   int // bytes of the header
	left   int // bytes of the packet
}

// Read reads, up to a packet that is too long.
func (p *packets) Read(b []byte) (int, error) {
	n, err := p.Conn.Read(b)
	if e := p.look(b[:n]); e != nil {
		return 0, e
	}
	return n, err
}

func (p *packets) look(b []byte) error {
	for len(b) > 0 && !p.over {
		if p.left > 0 {
			skip := min(p.left, len(b))
			p.left, b = p.left-skip, b[skip:]
			continue
		}
		if p.have == 0 && p.first && p.header != [4]byte{} {
			p.over = true
			break
		}
		n := copy(p.header[p.have:], b)
		p.have, b = p.have+n, b[n:]
		if p.have < len(p.header) {
			continue
		}
		p.have, p.left = 0, int(p.header[0])|int(p.header[1])<<8|int(p.header[2])<<16
		if p.left > maxPacket {
			return fmt.Errorf("the server announces %d bytes: %w", p.left, errTooMuch)
		}
	}
	return nil
}
