package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pentad/pentad/plane/nat"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
)

func newService(at *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "service",
		Short: "Show the mapping as the kernel has it",
		Long:  "Show the mapping as the kernel has it now, read from its maps. This works with the agent dead.",
	}
	cmd.AddCommand(newServiceList(at), newServiceShow(at))
	return cmd
}

func newServiceList(at *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "List every listener and what it maps to now",
		Example: "  pentad service list\n  pentad service list -o json",
		Args:    cobra.NoArgs,
	}
	f := addFormat(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		v, err := socket.Read(at.pins)
		if err != nil {
			return err
		}
		view, err := readPackets()
		if err != nil {
			return err
		}
		packets := view.Mappings
		all := make([]serviceOut, len(v.Services))
		for i, s := range v.Services {
			all[i] = newServiceOut(v, s)
		}
		all = addPackets(all, packets)
		if done, err := f.structured(cmd.OutOrStdout(), all); done {
			return err
		}
		header := []string{"SERVICE", "LISTENER", "BALANCE", "BACKENDS", "MAPS TO"}
		var rows [][]string
		for _, s := range v.Services {
			rows = append(rows, listenerRows(s, *f == "wide")...)
		}
		if packets != nil {
			header = append(header, "")
			copy(header[3:], []string{"FROM", "BACKENDS", "MAPS TO"})
			rows = withPackets(rows, packets, *f == "wide")
		}
		return table(cmd.OutOrStdout(), append([][]string{header}, rows...))
	}
	return cmd
}

// shownBackends is how many backends a row of the plain table names.
const shownBackends = 3

func listenerRows(s *service.Service, wide bool) [][]string {
	var rows [][]string
	states := s.States()
	for _, l := range s.Listeners {
		var serving []string
		total := 0
		for i, b := range s.Backends {
			if b.Address.Addr().Is4() != l.Address.Addr().Is4() {
				continue
			}
			total++
			if states[i] == service.Serving {
				serving = append(serving, b.Address.String())
			}
		}
		to := leadsTo(serving, wide)
		rows = append(rows, []string{s.Name, l.String(), s.Balance.String(), fmt.Sprintf("%d/%d", len(serving), total), to})
	}
	return rows
}

// leadsTo names the backends that take connections.
func leadsTo(serving []string, wide bool) string {
	if len(serving) == 0 {
		return "nothing: refused"
	}
	if n := len(serving); n > shownBackends && !wide {
		return fmt.Sprintf("%s and %d more", strings.Join(serving[:shownBackends], ", "), n-shownBackends)
	}
	return strings.Join(serving, ", ")
}

func newServiceShow(at *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:               "show NAME",
		Short:             "Show one service and the state of its backends",
		Example:           "  pentad service show orders-db",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeServices(at),
	}
	f := addFormat(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		v, err := socket.Read(at.pins)
		if err != nil {
			return err
		}
		view, err := readPackets()
		if err != nil {
			return err
		}
		packets := slices.DeleteFunc(view.Mappings, func(m nat.Mapping) bool { return m.Service != args[0] })
		s := (&service.Snapshot{Services: v.Services}).Find(args[0])
		if s == nil && len(packets) == 0 {
			return fmt.Errorf("the kernel has no service %s; `pentad service list` shows those that it has", args[0])
		}
		var all []serviceOut
		if s != nil {
			all = append(all, newServiceOut(v, s))
		}
		if done, err := f.structured(cmd.OutOrStdout(), addPackets(all, packets)[0]); done {
			return err
		}
		if s != nil {
			if err := showService(cmd.OutOrStdout(), v, s); err != nil || len(packets) == 0 {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout())
		}
		return table(cmd.OutOrStdout(), append([][]string{{"PACKETS TO", "FROM", "MAP TO"}}, packetRows(packets, true)...))
	}
	return cmd
}

func showService(w io.Writer, v *socket.View, s *service.Service) error {
	out := newServiceOut(v, s)
	rows := [][]string{{"service", out.Name}, {"listen", strings.Join(out.Listen, ", ")}, {"balance", out.Balance}}
	if out.Affinity != nil {
		rows = append(rows, []string{"affinity", out.Affinity.Timeout})
	}
	if k := s.Keepalive; k.Idle > 0 {
		text := "after " + k.Idle.String()
		if k.Interval > 0 {
			text += ", every " + k.Interval.String()
		}
		if k.Probes > 0 {
			text += fmt.Sprintf(", %d probes", k.Probes)
		}
		rows = append(rows, []string{"keepalive", text})
	}
	rows = append(rows, healingRows(s)...)
	if err := table(w, rows); err != nil {
		return err
	}
	fmt.Fprintln(w)
	return table(w, backendRows(out.Backends, false))
}

// healingRows say what the kernel does by itself for a service.
func healingRows(s *service.Service) [][]string {
	var rows [][]string
	if n := s.Breaker.MaxConnections; n > 0 {
		rows = append(rows, []string{"limit", fmt.Sprintf("%d connections per backend", n)})
	}
	if n := s.Breaker.Failures; n > 0 {
		rows = append(rows, []string{"ejection", fmt.Sprintf("after %s in a row, for the client that met them, for %s at first, at most %d%% of a group",
			count(n, "failed connect"), s.Breaker.Ejection, s.Breaker.MaxEjected)})
	}
	if s.ConnectTimeout > 0 {
		rows = append(rows, []string{"connect timeout", s.ConnectTimeout.String()})
	}
	if s.SlowStart > 0 {
		rows = append(rows, []string{"slow start", s.SlowStart.String()})
	}
	rows = append(rows, []string{"on down", s.OnDown.String()})
	if s.Silent {
		rows = append(rows, []string{"flows", "not told"})
	}
	return rows
}

// completeServices offers the names of the services that the kernel has.
func completeServices(at *places) cobra.CompletionFunc {
	return func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		v, err := socket.Read(at.pins)
		if err != nil || len(args) > 1 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		var words []string
		for _, s := range v.Services {
			if len(args) == 0 {
				words = append(words, s.Name)
				continue
			}
			if s.Name == args[0] {
				for _, b := range s.Backends {
					words = append(words, b.Address.String())
				}
			}
		}
		return words, cobra.ShellCompDirectiveNoFileComp
	}
}
