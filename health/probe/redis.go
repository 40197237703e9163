package probe

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"

	"github.com/pentad/pentad/service"
)

// The library's own log would say again what the probe returns.
func init() { redis.SetLogger(silence{}) }

type silence struct{}

// Printf says nothing.
func (silence) Printf(context.Context, string, ...any) {}

// newRedis returns a probe that asks for the role (redis.io/commands/role). Who
// asks for a replica wants one that follows: not one that has lost its primary.
func newRedis(h service.Health, dial dialFunc) Func {
	return func(ctx context.Context, addr netip.AddrPort) error {
		password, err := readPassword(h.PasswordFile)
		if err != nil {
			return err
		}
		o := &redis.Options{
			Addr: addr.String(), Username: h.User, Password: password, Dialer: dial,
			Protocol: 2, DisableIdentity: true, MaxRetries: -1, DialerRetries: 1, PoolSize: 1, ContextTimeoutEnabled: true,
			MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
		}
		if h.TLS {
			o.TLSConfig = tlsConfig(h)
		}
		c := redis.NewClient(o)
		defer c.Close()
		answer, err := c.Do(ctx, "ROLE").Slice()
		if err != nil {
			return err
		}
		if len(answer) == 0 {
			return errors.New("it gave no answer to ROLE")
		}
		if h.Role == service.RoleReplica && answer[0] == "slave" && len(answer) > 3 && answer[3] != "connected" {
			return fmt.Errorf("its link to the primary is in state %q", answer[3])
		}
		return checkRole(h.Role, answer[0] == "master")
	}
}
