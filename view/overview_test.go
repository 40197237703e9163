package view

import (
	"net/netip"
	"testing"
	"time"

	"github.com/pentad/pentad/plane/nat"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
)

func listener(text string) service.Listener {
	return service.Listener{Address: netip.MustParseAddrPort(text), Protocol: service.TCP}
}

func backend(text string, down bool) service.Backend {
	return service.Backend{Address: netip.MustParseAddrPort(text), Weight: 100, Down: down}
}

func TestOverview(t *testing.T) {
	kernel := func(begun uint64) *Host {
		return &Host{
			Kernel: &socket.View{
				Services: []*service.Service{
					{Name: "both", Listeners: []service.Listener{listener("192.0.2.1:80"), listener("[2001:db8::1]:80")},
						Backends: []service.Backend{backend("10.0.0.1:80", false), backend("10.0.0.2:80", true), backend("[2001:db8::2]:80", true)}},
					{Name: "well", Listeners: []service.Listener{listener("192.0.2.2:80")}, Backends: []service.Backend{backend("10.0.0.1:80", false)}},
				},
				Loads: map[string]map[netip.AddrPort]socket.Load{"well": {netip.MustParseAddrPort("10.0.0.1:80"): {Connections: begun, InFlight: 3}}},
			},
			Packets: &nat.View{Mappings: []nat.Mapping{{Service: "packets", Listener: listener("192.0.2.3:80")}, {Service: "well", Listener: listener("192.0.2.2:80")}}},
		}
	}
	rows := Overview(kernel(100).Tally(), kernel(150), 10*time.Second)
	if len(rows) != 3 {
		t.Fatalf("%d rows", len(rows))
	}
	both, well, packets := rows[0], rows[1], rows[2]
	if both.Verdict != Refused || both.Why == "" || both.Out != 2 || both.Usable != 1 || both.Backends != 3 || both.States["down"] != 2 {
		t.Errorf("one family refuses: %+v", both)
	}
	if well.Verdict != Serving || well.Out != 0 || well.ConnectionsPerSecond != 5 || well.InFlight != 3 || len(well.Listen) != 1 {
		t.Errorf("one that is well: %+v", well)
	}
	if packets.Service != "packets" || packets.Verdict != Refused || len(packets.Listen) != 1 {
		t.Errorf("one for packets alone, without a backend: %+v", packets)
	}
	if first := Overview(nil, kernel(100), 0); first[1].ConnectionsPerSecond != 0 {
		t.Errorf("the first look says what happened before it: %+v", first[1])
	}
}

func TestHistory(t *testing.T) {
	at := netip.MustParseAddrPort("10.0.0.1:80")
	h := NewHistory()
	add := func(connections uint64, inFlight uint32) {
		h.Add([]socket.BackendLoad{{Service: "web", Address: at, Load: socket.Load{Connections: connections, InFlight: inFlight}}})
	}
	if h.Of("web", at) != nil {
		t.Error("it knows what was never said")
	}
	add(1000, 7)
	if p := h.Of("web", at); len(p) != 1 || p[0].Connections != 0 || p[0].InFlight != 7 {
		t.Errorf("what was before the first look counts: %+v", p)
	}
	add(1010, 8)
	add(4, 9) // it was taken out and put in again: its counters begin anew
	if p := h.Of("web", at); len(p) != 3 || p[1].Connections != 10 || p[2].Connections != 4 {
		t.Errorf("points are %+v", p)
	}
	for i := range 200 {
		add(uint64(4+i), uint32(i))
	}
	p := h.Of("web", at)
	if len(p) != historyPoints || p[len(p)-1].InFlight != 199 || p[0].InFlight != uint32(200-historyPoints) || p[1].Connections != 1 {
		t.Errorf("after many rounds: %d points from %+v to %+v", len(p), p[0], p[len(p)-1])
	}
	h.Add(nil)
	if h.Of("web", at) != nil || len(h.series) != 0 {
		t.Error("one that is gone is remembered")
	}
}
