package probe

import (
	"context"
	"fmt"
	"net"
	"net/netip"

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
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) { return dial(ctx, "tcp", address) }),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxBody)),
		grpc.WithNoProxy(),
	}
	return func(ctx context.Context, addr netip.AddrPort) error {
		c, err := grpc.NewClient("passthrough:///"+addr.String(), options...)
		if err != nil {
			return err
		}
		defer c.Close()
		r, err := grpc_health_v1.NewHealthClient(c).Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: h.Path})
		if err != nil {
			return err
		}
		if r.Status != grpc_health_v1.HealthCheckResponse_SERVING {
			return fmt.Errorf("it says %s", r.Status)
		}
		return nil
	}
}
