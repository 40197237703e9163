package agent

import (
	"net/netip"
	"testing"
	"time"

	"github.com/pentad/pentad/health"
	"github.com/pentad/pentad/service"
)

// The end of a drain's time is not missed by who looks a second late, and comes once.
func TestNextDrainOver(t *testing.T) {
	key := health.Key{Service: "web", Address: netip.MustParseAddrPort("10.0.0.1:80")}
	at := time.Unix(1000, 0)
	all := states{key: {drained: true, drainUntil: 1005}}
	web := []*service.Service{{Name: "web", Backends: []service.Backend{{Address: key.Address, Weight: 1}}}}
	if next := all.nextDrainOver(at); next != 1005 {
		t.Errorf("next is %d", next)
	}
	if all.over(web, at)[0].Backends[0].DrainOver {
		t.Error("it is over before its time")
	}
	// Nothing was published since: it is still to come, whatever the clock says.
	late := at.Add(10 * time.Second)
	if next := all.nextDrainOver(at); next == 0 || time.Unix(int64(next), 0).After(late) {
		t.Errorf("at %v next is %d", late, next)
	}
	if !all.over(web, late)[0].Backends[0].DrainOver || all.nextDrainOver(late) != 0 {
		t.Error("after its time it is not over, or comes again")
	}
}
