package probe

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/service"
)

// newPostgres returns a probe that logs in and asks whether the server is in
// recovery, which a replica is (PostgreSQL documentation, 9.27.3).
func newPostgres(h service.Health, dial dialFunc) Func {
	return func(ctx context.Context, addr netip.AddrPort) error {
		password, err := host.ReadPassword(h.PasswordFile)
		if err != nil {
			return err
		}
		// Everything is said here, so that nothing comes from the environment.
		c, err := pgconn.ParseConfig("host=127.0.0.1 port=1 user=x password=x dbname=postgres sslmode=disable passfile=/dev/null servicefile=/dev/null")
		if err != nil {
			return err
		}
		c.Host, c.Port, c.User, c.Password = addr.Addr().String(), addr.Port(), h.User, password
		var d dialing
		defer d.close()
		c.DialFunc = func(_ context.Context, network, address string) (net.Conn, error) {
			// The library cancels a query by another connection, when the probe is over.
			return d.through(dial)(ctx, network, address)
		}
		// The library makes room for what a server announces before it comes.
		c.BuildFrontend = func(r io.Reader, w io.Writer) *pgproto3.Frontend {
			f := pgproto3.NewFrontend(r, w)
			f.SetMaxBodyLen(maxBody)
			return f
		}
		c.Fallbacks, c.RuntimeParams = nil, map[string]string{"application_name": "pentad"}
		if h.TLS {
			c.TLSConfig = tlsConfig(h)
		}
		conn, err := pgconn.ConnectConfig(ctx, c)
		if err != nil {
			return err
		}
		defer conn.Close(ctx)
		results, err := conn.Exec(ctx, "select pg_is_in_recovery()").ReadAll()
		if err != nil {
			return err
		}
		if len(results) != 1 || len(results[0].Rows) != 1 || len(results[0].Rows[0]) != 1 {
			return fmt.Errorf("it gave no answer to pg_is_in_recovery()")
		}
		return checkRole(h.Role, string(results[0].Rows[0][0]) == "f")
	}
}
