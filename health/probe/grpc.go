package probe

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/pentad/pentad/service"
)

// newGRPC returns a probe that calls Check of grpc.health.v1 (GRPC Health
// Checking Protocol, github.com/grpc/grpc/blob/master/doc/health-checking.md).
func newGRPC(h service.Health, dial dialFunc) Func {
	creds := insecure.NewCredentials()
	if h.TLS {
		creds = credentials.NewTLS(tlsConfig(h))
	}
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(creds),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxBody)),
		grpc.WithMaxHeaderListSize(maxBody),
		grpc.WithReadBufferSize(4 << 10),
		grpc.WithWriteBufferSize(4 << 10),
		grpc.WithNoProxy(),
	}
	return func(ctx context.Context, addr netip.AddrPort) error {
		var d dialing
		dialer := grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			return d.through(dial)(ctx, "tcp", address)
		})
		c, err := grpc.NewClient("passthrough:///"+addr.String(), append(slices.Clone(options), dialer)...)
		if err != nil {
			return err
		}
		defer c.Close()
		r, err := grpc_health_v1.NewHealthClient(c).Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: h.Path})
		if err != nil {
			return own(err, d.noted())
		}
		if r.Status != grpc_health_v1.HealthCheckResponse_SERVING {
			return fmt.Errorf("it says %s", r.Status)
		}
		return nil
	}
}
