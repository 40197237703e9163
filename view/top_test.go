package view

import (
	"net/netip"
	"testing"
	"time"

	"github.com/pentad/pentad/plane/nat"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
)

// Rates are differences over time: the busiest first, and a counter that began anew is
// not a huge number.
func TestRates(t *testing.T) {
	one, two := netip.MustParseAddrPort("10.0.0.1:80"), netip.MustParseAddrPort("10.0.0.2:80")
	services := []*service.Service{
		{Name: "idle", Backends: []service.Backend{{Address: one, Weight: 1}}},
		{Name: "web", Backends: []service.Backend{{Address: one, Weight: 1}, {Address: two, Weight: 1, Down: true}}},
	}
	look := func(web ...socket.Load) *Host {
		return &Host{Packets: &nat.View{}, Kernel: &socket.View{Services: services, Loads: map[string]map[netip.AddrPort]socket.Load{
			"web": {one: web[0], two: web[1]},
		}}}
	}
	before := look(socket.Load{Connections: 100, Failed: 1}, socket.Load{Connections: 1000})
	after := look(socket.Load{Connections: 140, Failed: 3, InFlight: 2, RTT: time.Millisecond}, socket.Load{Connections: 10, RTT: time.Second})
	rates := Rates(before.Tally(), after, 2*time.Second)
	want := Rate{Service: "web", ConnectionsPerSecond: 25, FailuresPerSecond: 1, InFlight: 2, RTTSeconds: 0.001, Usable: 1, Backends: 2}
	if len(rates) != 2 || rates[0] != want || rates[1].Service != "idle" || rates[1].ConnectionsPerSecond != 0 {
		t.Errorf("have %+v\nwant %+v", rates, want)
	}
}
