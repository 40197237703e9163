package probe

import (
	"context"
	"database/sql"
	"io"
	"log"
	"net"
	"net/netip"

	"github.com/go-sql-driver/mysql"

	"github.com/pentad/pentad/service"
)

// newMySQL returns a probe that logs in and asks whether the server takes writes:
// replicas are kept read-only (MySQL manual, system variable read_only).
func newMySQL(h service.Health, dial dialFunc) Func {
	quiet := log.New(io.Discard, "", 0)
	return func(ctx context.Context, addr netip.AddrPort) error {
		password, err := readPassword(h.PasswordFile)
		if err != nil {
			return err
		}
		c := mysql.NewConfig()
		c.Net, c.Addr, c.User, c.Passwd = "tcp", addr.String(), h.User, password
		c.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
			return dial(ctx, network, address)
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
		var readOnly bool
		if err := db.QueryRowContext(ctx, "select @@global.read_only").Scan(&readOnly); err != nil {
			return err
		}
		return checkRole(h.Role, !readOnly)
	}
}
