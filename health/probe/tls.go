package probe

import (
	"context"
	"crypto/tls"
	"net/netip"

	"github.com/pentad/pentad/service"
)

// newTLS returns a probe that completes a TLS handshake.
func newTLS(h service.Health, dial dialFunc) Func {
	return func(ctx context.Context, addr netip.AddrPort) error {
		c, err := dial(ctx, "tcp", addr.String())
		if err != nil {
			return err
		}
		defer c.Close()
		return tls.Client(c, tlsConfig(h)).HandshakeContext(ctx)
	}
}
