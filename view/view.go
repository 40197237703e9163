// Package view is what services, backends, flows and the state of a host look like to
// people and to programs: values with JSON names, read from the kernel and, where it
// runs, from the agent. Commands print them and the page draws them; no other place may
// decide what is true.
//
// Names are those of the configuration, and values of the configuration are written as
// there. What was measured is a number with its unit in the name.
package view

import (
	"cmp"
	"context"
	"errors"
	"net/netip"
	"slices"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/plane/nat"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
)

// Places are where pentad is on this host.
type Places struct {
	Pins   string // directory on bpffs
	RunDir string // of the agent's socket
}

// Host is one look at everything that pentad has on this host.
type Host struct {
	Kernel  *socket.View // nil: nothing is installed
	Packets *nat.View    // empty without a table for packets

	Agent    *api.Status // nil: it could not be asked
	AgentErr error       // why not
	probes   map[backendKey]api.ProbeRecord
}

type backendKey struct {
	service string
	address netip.AddrPort
}

// ReadKernel looks at the kernel alone. The error is socket.ErrNothingInstalled or says
// what could not be read.
func ReadKernel(at Places) (*Host, error) {
	v, err := socket.Read(at.Pins)
	if err != nil {
		return nil, err
	}
	packets, err := readPackets()
	return &Host{Kernel: v, Packets: packets}, err
}

// Read looks at the kernel and asks the agent what its probes of a service, or of all
// with "", met with. An agent that cannot be asked is no error.
func Read(ctx context.Context, at Places, ofService string) (*Host, error) {
	h, err := ReadKernel(at)
	if err != nil {
		return nil, err
	}
	return h.WithProbes(ctx, at, ofService), nil
}

// WithProbes returns the same look with what the agent says of the probes of a service, or
// of all with "".
func (h *Host) WithProbes(ctx context.Context, at Places, ofService string) *Host {
	with := *h
	records, err := api.NewClient(at.RunDir).Probes(ctx, ofService)
	with.AgentErr = err
	with.probes = make(map[backendKey]api.ProbeRecord, len(records))
	for _, r := range records {
		with.probes[backendKey{r.Service, r.Address}] = r
	}
	return &with
}

// readPackets reads the table for packets; without one the view is empty.
func readPackets() (*nat.View, error) {
	v, err := nat.Read()
	if errors.Is(err, nat.ErrNothingInstalled) {
		return &nat.View{}, nil
	}
	return v, err
}

// choose returns what becomes of connections of a family to a service.
func (h *Host) choose(s *service.Service, f service.Family) service.Choice {
	return h.Kernel.Choose(s, f)
}

// Find returns a service by its name. ok is false where neither sockets nor packets find
// one of that name.
func (h *Host) Find(name string) (s Service, ok bool) {
	some := *h
	kernel := *h.Kernel
	kernel.Services = slices.DeleteFunc(slices.Clone(h.Kernel.Services), func(s *service.Service) bool { return s.Name != name })
	packets := *h.Packets
	packets.Mappings = slices.DeleteFunc(slices.Clone(h.Packets.Mappings), func(m nat.Mapping) bool { return m.Service != name })
	some.Kernel, some.Packets = &kernel, &packets
	if all := some.Services(); len(all) > 0 {
		return all[0], true
	}
	return Service{}, false
}

// Names returns the names of all services, sorted.
func (h *Host) Names() []string {
	var names []string
	for _, s := range h.Kernel.Services {
		names = append(names, s.Name)
	}
	for _, m := range h.Packets.Mappings {
		names = append(names, m.Service)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// Services returns all services, by name.
func (h *Host) Services() []Service {
	all := make([]Service, 0, len(h.Kernel.Services))
	at := make(map[string]int, len(h.Kernel.Services))
	for _, s := range h.Kernel.Services {
		at[s.Name] = len(all)
		all = append(all, h.service(s))
	}
	for _, m := range h.Packets.Mappings {
		i, known := at[m.Service]
		if !known {
			i = len(all)
			at[m.Service] = i
			all = append(all, Service{Name: m.Service, Listen: []string{}, Listeners: []Listener{}, Backends: []Backend{}})
		}
		all[i].Packets = append(all[i].Packets, newPackets(m))
	}
	slices.SortStableFunc(all, func(a, b Service) int { return cmp.Compare(a.Name, b.Name) })
	return all
}

// Backends returns the backends of all services, in the order of these.
func (h *Host) Backends() []Backend {
	all := []Backend{}
	for _, s := range h.Services() {
		for _, b := range s.Backends {
			b.Service = s.Name
			all = append(all, b)
		}
	}
	return all
}

// Addresses returns the addresses of all listeners and backends.
func (h *Host) Addresses() []netip.Addr {
	var all []netip.Addr
	for _, s := range h.Kernel.Services {
		for _, l := range s.Listeners {
			all = append(all, l.Address.Addr())
		}
		for _, b := range s.Backends {
			all = append(all, b.Address.Addr())
		}
	}
	for _, m := range h.Packets.Mappings {
		all = append(all, m.Listener.Address.Addr())
		for _, b := range m.Backends {
			all = append(all, b.Address.Addr())
		}
	}
	slices.SortFunc(all, netip.Addr.Compare)
	return slices.Compact(all)
}
