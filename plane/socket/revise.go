package socket

import (
	"fmt"

	"github.com/pentad/pentad/service"
)

// Revise has the maps under the pins show other services than they do. The programs that
// are attached go on with them: no agent is needed, and none may run. The caller holds
// the lock on the pins. Maps of another layout are left to an agent.
func Revise(opts Options, services *service.Snapshot) error {
	p := New(opts)
	defer p.Close()
	set, _, err := openAndTell(p.dir, true)
	if err != nil {
		return err
	}
	set.close()
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.open(services); err != nil {
		return err
	}
	full, err := p.install(Want{Services: services})
	if err == nil && full != nil {
		err = full
	}
	if err != nil {
		return fmt.Errorf("pins under %s: %w", p.dir, err)
	}
	return nil
}
