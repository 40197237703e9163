package nat

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables"

	"github.com/pentad/pentad/nft"
	"github.com/pentad/pentad/service"
)

// A change of more elements than a first filling has in one transaction takes no
// listener away, not even for a moment.
func TestLargeChange(t *testing.T) {
	h := machine(t)
	want := func(third byte) Want {
		var all []*service.Service
		for i := range 3000 {
			s := &service.Service{Name: fmt.Sprintf("s%04d", i), Listeners: []service.Listener{{
				Address: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)}), 80), Protocol: service.TCP,
			}}}
			// One more backend changes the chain, so that listeners change as well.
			for b := range 9 + third {
				s.Backends = append(s.Backends, service.Backend{
					Address: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 200 + third, b, byte(i)}), 8080), Weight: 1,
				})
			}
			all = append(all, s)
		}
		return Want{Services: (&service.Snapshot{}).Next(all)}
	}
	if err := h.Do(func() error { return New(nil).Apply(t.Context(), want(1)) }); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	var looks sync.WaitGroup
	looks.Go(func() {
		if err := h.Do(func() error {
			for ctx.Err() == nil {
				if n, err := listeners(); err != nil {
					return err
				} else if n != 3000 {
					t.Errorf("%d of 3000 listeners", n)
				}
				time.Sleep(time.Millisecond)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	})
	// A plane that has just started finds all of it different.
	err := h.Do(func() error { return New(nil).Apply(t.Context(), want(2)) })
	stop()
	looks.Wait()
	if err != nil {
		t.Fatal(err)
	}
}

// listeners counts what packets find at one moment. A dump that a transaction
// interrupts is not of one moment, and one during which the kernel moves a set to a
// larger or smaller table may leave elements out, though packets find them: what is
// missing is missing twice.
func listeners() (int, error) {
	k, err := dial()
	if err != nil {
		return 0, err
	}
	defer k.close()
	for {
		before, err1 := nft.Generation()
		first, err := k.conn.GetSetElements(k.sets[set{setServices, service.V4}])
		second, err2 := k.conn.GetSetElements(k.sets[set{setServices, service.V4}])
		after, err3 := nft.Generation()
		if err := errors.Join(err1, err, err2, err3); err != nil {
			return 0, err
		}
		if before == after {
			return max(countKeys(first), countKeys(second)), nil
		}
	}
}

func countKeys(have []nftables.SetElement) int {
	keys := make(map[string]bool)
	for _, e := range have {
		keys[string(e.Key)] = true
	}
	return len(keys)
}
