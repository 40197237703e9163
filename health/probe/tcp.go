package probe

import (
	"context"
	"net/netip"
)

// newTCP returns a probe that completes a handshake.
func newTCP(dial dialFunc) Func {
	return func(ctx context.Context, addr netip.AddrPort) error {
		c, err := dial(ctx, "tcp", addr.String())
		if err != nil {
			return err
		}
		return c.Close()
	}
}
