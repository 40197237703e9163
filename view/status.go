package view

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/plane/nat"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
)

// Status is whether all is well with pentad on this host.
type Status struct {
	Healthy  bool     `json:"healthy"`  // there is no problem
	Problems []string `json:"problems"` // a sentence each
	Warnings []string `json:"warnings"`

	Agent  *api.Status `json:"agent"`  // null: it does not run, or does not answer
	Kernel *Kernel     `json:"kernel"` // null: nothing is installed

	Services  int `json:"services"`
	Listeners int `json:"listeners"`
	// Refusing are listeners that refuse connections, with their services.
	Refusing []Refusal `json:"refusing"`
	// Backends by state, those of each family as the listeners of that family find them.
	Backends map[string]int `json:"backends"`
	Ejected  []string       `json:"ejected"` // service and backend

	Connections Connections `json:"connections"`
	Packets     bool        `json:"packets"` // what arrives from elsewhere is served
}

// Refusal is a listener that refuses connections.
type Refusal struct {
	Service string `json:"service"`
	Listen  string `json:"listen"`
	Why     string `json:"why"`
}

// String writes the listener and its service.
func (r Refusal) String() string { return fmt.Sprintf("%s (%s)", r.Listen, r.Service) }

// Kernel is what is installed.
type Kernel struct {
	Version     string            `json:"version"` // of the pentad that installed it
	Hooks       map[string]bool   `json:"hooks"`   // whether it is attached
	MemoryBytes map[string]uint64 `json:"memoryBytes"`
}

// Connections are counts of connections.
type Connections struct {
	InFlight uint64 `json:"inFlight"`
	Leaving  int    `json:"leaving"` // of these, to backends that were removed
	socket.Counters
}

// ReadStatus finds out whether all is well. The error says what could not be read.
func ReadStatus(ctx context.Context, at Places) (*Status, error) {
	h, err := ReadKernel(at)
	return StatusOf(ctx, at, h, err)
}

// StatusOf finds out whether all is well with what ReadKernel has returned.
func StatusOf(ctx context.Context, at Places, h *Host, err error) (*Status, error) {
	s := &Status{Problems: []string{}, Warnings: []string{}, Refusing: []Refusal{}, Backends: map[string]int{}, Ejected: []string{}}
	s.askAgent(ctx, at)
	switch {
	case errors.Is(err, socket.ErrNothingInstalled):
		s.problem("nothing is installed in the kernel: no VIP is translated")
	case err != nil:
		return nil, err
	default:
		s.addKernel(h.Kernel)
		s.addServices(h)
		s.addPackets()
	}
	s.Healthy = len(s.Problems) == 0
	return s, nil
}

func (s *Status) problem(format string, args ...any) {
	s.Problems = append(s.Problems, fmt.Sprintf(format, args...))
}

func (s *Status) askAgent(ctx context.Context, at Places) {
	running, err := api.NewClient(at.RunDir).Status(ctx)
	switch {
	case err == nil:
		s.Agent = &running
		s.Problems = append(s.Problems, running.Problems...)
		s.Warnings = append(s.Warnings, running.Warnings...)
	case errors.Is(err, api.ErrNoAgent):
		s.problem("no agent is running: backends are not probed and the file is not watched; start it: systemctl start pentad, or pentad run")
	default:
		s.problem("the agent does not answer: %v", err)
	}
}

func (s *Status) addKernel(v *socket.View) {
	s.Kernel = &Kernel{Version: v.Version, Hooks: make(map[string]bool), MemoryBytes: v.Memory}
	var detached []string
	for _, h := range v.Hooks {
		s.Kernel.Hooks[h.Name] = h.Attached
		if !h.Attached {
			detached = append(detached, h.Name)
		}
	}
	if len(detached) > 0 {
		s.problem("hooks are not attached: %s; the agent puts them back", strings.Join(detached, ", "))
	}
	s.Connections = Connections{InFlight: uint64(v.Leaving), Leaving: v.Leaving, Counters: v.Counters}
	if n := v.Counters.Untracked; n > 0 {
		s.problem("%d connections could not be remembered: more sockets go through VIPs than there is room for, and getpeername shows those the backend", n)
	}
}

func (s *Status) addServices(h *Host) {
	s.Services = len(h.Kernel.Services)
	for _, x := range h.Kernel.Services {
		for _, f := range service.EachFamily {
			choice := h.choose(x, f)
			for _, b := range choice.Candidates {
				s.Backends[b.State.String()]++
				s.Connections.InFlight += uint64(h.Kernel.Loads[x.Name][b.Address].InFlight)
				if b.State == service.Ejected {
					s.Ejected = append(s.Ejected, x.Name+" "+b.Address.String())
				}
			}
			for _, l := range x.Listeners {
				if service.FamilyOf(l.Address.Addr()) != f {
					continue
				}
				s.Listeners++
				if out := newListener(l, choice, f); out.Verdict == Refused {
					s.Refusing = append(s.Refusing, Refusal{x.Name, out.Listen, out.Why})
				}
			}
		}
	}
}

func (s *Status) addPackets() {
	there, whole, err := nat.Installed()
	if err != nil {
		s.problem("packets: %v", err)
	}
	s.Packets = there
	if there && !whole {
		s.problem("the table inet %s is damaged: packets from elsewhere may not find services; the agent repairs it", nat.TableName)
	}
	if !there && s.Agent != nil && s.Agent.Cluster != nil {
		s.problem("the table inet %s is missing: packets from elsewhere find no services; the agent puts it back", nat.TableName)
	}
}
