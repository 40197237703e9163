package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/plane/nat"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
)

func newStatus(at *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show on one screen whether all is well",
		Long: "Show on one screen whether all is well. Exit code 0: the agent runs, every hook is attached, the newest\n" +
			"configuration is in force; 1: something of this is not so, and the last lines say what. Backends that\n" +
			"are down are a fact, not a failure of pentad.",
		Example: "  pentad status",
		Args:    cobra.NoArgs,
	}
	f := addFormat(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		s, err := readStatus(cmd.Context(), at)
		if err != nil {
			return err
		}
		done, err := f.structured(cmd.OutOrStdout(), s)
		if !done {
			err = s.print(cmd.OutOrStdout())
		}
		if err == nil && len(s.Problems) > 0 {
			err = errNo
		}
		return err
	}
	return cmd
}

// statusOut is the status of pentad on this host.
type statusOut struct {
	Agent       *api.Status       `json:"agent" yaml:"agent"` // absent: not running
	Installed   string            `json:"installed,omitempty" yaml:"installed,omitempty"`
	Hooks       map[string]bool   `json:"hooks" yaml:"hooks"`
	Services    int               `json:"services" yaml:"services"`
	Listeners   int               `json:"listeners" yaml:"listeners"`
	InFlight    uint64            `json:"inFlight" yaml:"inFlight"`                     // connections that are open
	Leaving     int               `json:"leaving,omitempty" yaml:"leaving,omitempty"`   // of these, to backends that were removed
	Ejected     []string          `json:"ejected,omitempty" yaml:"ejected,omitempty"`   // service and backend
	Refusing    []string          `json:"refusing,omitempty" yaml:"refusing,omitempty"` // services without a usable backend
	Backends    map[string]int    `json:"backends" yaml:"backends"`                     // by state
	Memory      map[string]uint64 `json:"memory" yaml:"memory"`                         // bytes of kernel memory by map
	Connections socket.Counters   `json:"connections" yaml:"connections"`
	Packets     bool              `json:"packets" yaml:"packets"` // what arrives from elsewhere is served
	Problems    []string          `json:"problems,omitempty" yaml:"problems,omitempty"`
	Warnings    []string          `json:"warnings,omitempty" yaml:"warnings,omitempty"`
}

func readStatus(ctx context.Context, at *places) (*statusOut, error) {
	s := &statusOut{Hooks: map[string]bool{}, Backends: map[string]int{}}
	running, err := api.NewClient(at.runDir).Status(ctx)
	switch {
	case err == nil:
		s.Agent = &running
		s.Problems, s.Warnings = running.Problems, running.Warnings
	case errors.Is(err, api.ErrNoAgent):
		s.Problems = append(s.Problems, "no agent is running: backends are not probed and the file is not watched; start it: pentad run")
	default:
		s.Problems = append(s.Problems, "the agent does not answer: "+err.Error())
	}
	v, err := socket.Read(at.pins)
	if errors.Is(err, socket.ErrNothingInstalled) {
		s.Problems = append(s.Problems, "nothing is installed in the kernel: no VIP is translated")
		return s, nil
	}
	if err != nil {
		return nil, err
	}
	s.addView(v)
	there, whole, err := nat.Installed()
	if err != nil {
		s.Problems = append(s.Problems, "packets: "+err.Error())
	}
	s.Packets = there
	if there && !whole {
		s.Problems = append(s.Problems, "the table inet "+nat.TableName+" is damaged: packets from elsewhere may not find services; the agent repairs it")
	}
	if !there && s.Agent != nil && s.Agent.Cluster != nil {
		s.Problems = append(s.Problems, "the table inet "+nat.TableName+" is missing: packets from elsewhere find no services; the agent puts it back")
	}
	return s, nil
}

func (s *statusOut) addView(v *socket.View) {
	s.Installed, s.Services, s.Memory, s.Connections = v.Version, len(v.Services), v.Memory, v.Counters
	var detached []string
	for _, h := range v.Hooks {
		s.Hooks[h.Name] = h.Attached
		if !h.Attached {
			detached = append(detached, h.Name)
		}
	}
	if len(detached) > 0 {
		s.Problems = append(s.Problems, "hooks are not attached: "+strings.Join(detached, ", "))
	}
	for _, x := range v.Services {
		s.Listeners += len(x.Listeners)
		serving := 0
		for _, state := range x.States() {
			s.Backends[state.String()]++
			if state == service.Serving {
				serving++
			}
		}
		if serving == 0 {
			s.Refusing = append(s.Refusing, x.Name)
		}
		for _, b := range x.Backends {
			l := v.Loads[x.Name][b.Address]
			s.InFlight += uint64(l.InFlight)
			if l.Ejected && b.Usable() {
				s.Ejected = append(s.Ejected, x.Name+" "+b.Address.String())
			}
		}
	}
	s.InFlight += uint64(v.Leaving)
	s.Leaving = v.Leaving
	if n := v.Counters.Untracked; n > 0 {
		s.Problems = append(s.Problems, fmt.Sprintf(
			"%d connections could not be remembered: more sockets go through VIPs than there is room for, and getpeername shows those the backend", n))
	}
}

func (s *statusOut) print(w io.Writer) error {
	rows := [][]string{{"agent", "not running"}}
	if a := s.Agent; a != nil {
		rows = [][]string{
			{"agent", fmt.Sprintf("running, version %s, process %d, for %s", a.Version, a.PID, ago(a.Started))},
			{"configuration", fmt.Sprintf("%s, revision %d, read %s ago", a.Config.File, a.Revision, ago(a.Config.Loaded))},
			{"probes", fmt.Sprintf("%s, %d done", count(a.Probes.Targets, "backend"), a.Probes.Done)},
		}
		if c := a.Cluster; c != nil {
			rows = append(rows, []string{"cluster", clusterText(c)})
		}
	}
	if s.Installed == "" {
		rows = append(rows, []string{"kernel", "nothing installed"})
	} else {
		rows = append(rows, s.kernelRows()...)
	}
	for _, p := range s.Warnings {
		rows = append(rows, []string{"warning", strings.ReplaceAll(p, "\n", "\n\t")})
	}
	for _, p := range s.Problems {
		rows = append(rows, []string{"PROBLEM", strings.ReplaceAll(p, "\n", "\n\t")})
	}
	return table(w, rows)
}

func clusterText(c *api.Cluster) string {
	text := fmt.Sprintf("node %s, %s, last change %s ago", c.Node, count(c.Services, "service"), ago(c.Changed))
	if c.Changed.IsZero() {
		text = "node " + c.Node
	}
	if !c.Away.IsZero() {
		text += fmt.Sprintf("; the API server has not answered for %s", ago(c.Away))
		if c.Why != "" {
			text += ": " + c.Why
		}
	}
	if len(c.Untracked) > 0 {
		text += fmt.Sprintf("; connections between pods (%s) are not tracked", firstFew(c.Untracked))
	}
	if c.Leaving {
		text += "; the node is being deleted"
	}
	return text
}

func (s *statusOut) kernelRows() [][]string {
	attached, memory := 0, uint64(0)
	for _, ok := range s.Hooks {
		if ok {
			attached++
		}
	}
	for _, n := range s.Memory {
		memory += n
	}
	var states []string
	for _, state := range []service.State{service.Serving, service.Standby, service.Drained, service.Down} {
		if n := s.Backends[state.String()]; n > 0 {
			states = append(states, fmt.Sprintf("%d %s", n, state))
		}
	}
	if len(states) == 0 {
		states = []string{"none"}
	}
	rows := [][]string{
		{"hooks", fmt.Sprintf("%d of %d attached", attached, len(s.Hooks))},
		{"services", fmt.Sprintf("%d with %s", s.Services, count(s.Listeners, "listener"))},
		{"backends", strings.Join(states, ", ")},
		{"connections", fmt.Sprintf("%d open, %d translated, %d refused, %d reset", s.InFlight, s.Connections.Translated, s.Connections.Refused, s.Connections.Reset)},
		{"kernel memory", bytesText(memory)},
	}
	if s.Agent != nil && s.Agent.MemoryLimit > 0 {
		rows = append(rows, []string{"memory limit", bytesText(s.Agent.MemoryLimit) + ": what the kernel keeps of UDP sockets of others counts in it"})
	}
	if s.Packets {
		rows = append(rows, []string{"packets", "from elsewhere are served by the table inet " + nat.TableName})
	}
	if n := len(s.Ejected); n > 0 {
		rows = append(rows, []string{"ejected", fmt.Sprintf("%s by failed connects: %s", count(n, "backend"), firstFew(s.Ejected))})
	}
	if s.Leaving > 0 {
		rows = append(rows, []string{"leaving", fmt.Sprintf("%s to backends that were removed", count(s.Leaving, "connection"))})
	}
	if n := len(s.Refusing); n > 0 {
		rows = append(rows, []string{"refusing", fmt.Sprintf("%s without a usable backend: %s", count(n, "service"), firstFew(s.Refusing))})
	}
	return rows
}

func firstFew[T any](all []T) string {
	const few = 5
	var names []string
	for i, one := range all {
		if i == few {
			names = append(names, "...")
			break
		}
		names = append(names, fmt.Sprint(one))
	}
	return strings.Join(names, ", ")
}
