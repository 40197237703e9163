package probe

import (
	"context"
	"net/netip"
)

// newTCP returns a probe that completes a handshake.
func newTCP(mark int) Func {
	d := dialer(mark)
	return func(ctx context.Context, addr netip.AddrPort) error {
		c, err := d.DialContext(ctx, "tcp", addr.String())
		if err != nil {
			return err
		}
		return c.Close()
	}
}
