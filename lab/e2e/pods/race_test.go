package pods_test

import (
	"net/netip"
	"testing"
	"time"

	"context"
	"net"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"

	"github.com/pentad/pentad/claim"
	"github.com/pentad/pentad/claim/etcd"
	"github.com/pentad/pentad/claim/race"
	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/ipam"
)

// 32 hosts claim blocks of one pool and give them back, and are killed all the
// time: no block is ever two hosts'.
func TestClaimsRaceInEtcd(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 0)
	dial := func(ctx context.Context, address string) (c net.Conn, err error) {
		doErr := f.store.Do(func() error {
			c, err = (&net.Dialer{}).DialContext(ctx, "tcp", address)
			return nil
		})
		if doErr != nil {
			err = doErr
		}
		return c, err
	}
	r := race.Race{Hosts: 32, Claims: 300, Frees: 50, Wanted: 5, Life: 400 * time.Millisecond, Pool: ipam.BlockPool{V4: netip.MustParsePrefix("10.0.0.0/16"), HostBits: 6}, Store: func() (claim.Store, error) {
		c, err := clientv3.New(clientv3.Config{Endpoints: []string{"http://127.0.0.1:2379"}, DialTimeout: 5 * time.Second, Logger: zap.NewNop(), DialOptions: []grpc.DialOption{grpc.WithContextDialer(dial)}})
		if err != nil {
			return nil, err
		}
		t.Cleanup(func() { _ = c.Close() })
		return etcd.New(c, &config.Etcd{Prefix: "/pentad/v1"}), nil
	}}
	began := time.Now()
	ctx, stop := context.WithTimeout(t.Context(), 2*time.Minute)
	defer stop()
	result, err := r.Run(ctx)
	t.Logf("%+v in %s", result, time.Since(began))
	if err != nil {
		t.Error(err)
	}
	if result.Freed < 50 || result.Refused > 2*result.Claimed {
		t.Errorf("hardly any was freed in two minutes, or most claims were refused: %+v", result)
	}
}
