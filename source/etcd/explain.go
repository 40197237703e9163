package etcd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/pentad/pentad/config"
)

// explainPatience is how long one member is waited for.
const explainPatience = time.Second

// Explain returns why etcd does not answer. The client only says that it took too long: it
// tries one member after the other, and keeps what it met with to itself. So each is tried
// once more here.
func Explain(ctx context.Context, c *config.Etcd, err error) error {
	if !errors.Is(err, context.DeadlineExceeded) && status.Code(err) != codes.DeadlineExceeded && status.Code(err) != codes.Unavailable {
		return err
	}
	all := make([]error, 0, len(c.Endpoints))
	for _, e := range c.Endpoints {
		if why := try(ctx, c, e); why != nil {
			all = append(all, fmt.Errorf("%s: %w", e, why))
		}
	}
	if len(all) == 0 {
		return fmt.Errorf("its members answer and have no majority: %w", err)
	}
	return errors.Join(all...)
}

// try connects to a member, and returns what it meets with.
func try(ctx context.Context, c *config.Etcd, endpoint string) error {
	u, err := url.Parse(endpoint)
	if err != nil {
		return err
	}
	ctx, stop := context.WithTimeout(ctx, explainPatience)
	defer stop()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", u.Host)
	if err != nil {
		return err
	}
	defer conn.Close()
	if u.Scheme != "https" {
		return nil
	}
	t, err := tlsOf(c)
	if err != nil {
		return err
	}
	t.ServerName = u.Hostname()
	return tls.Client(conn, t).HandshakeContext(ctx)
}
