package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
	"github.com/pentad/pentad/view"
)

func newService(at *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "service",
		Aliases: []string{"services", "svc"},
		Short:   "Show the mapping as the kernel has it",
		Long:    "Show the mapping as the kernel has it now, read from its maps. This works with the agent dead.",
	}
	cmd.AddCommand(newServiceList(at), newServiceShow(at))
	return cmd
}

func newServiceList(at *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List every listener and what it maps to now",
		Long: "List every listener and what it maps to now. BACKENDS says how many of its backends take the next connection,\n" +
			"and how many there are; FROM, where there is a table for packets, whose connections the line is about.",
		Example: "  pentad service list\n  pentad service list --refusing\n  pentad service list -o json",
		Args:    filtered,
	}
	o := addList(cmd)
	only := addService(cmd, at)
	refusing := cmd.Flags().Bool("refusing", false, "only listeners that refuse connections")
	watch := addWatch(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return watch.run(cmd, func(w io.Writer) error {
			h, err := view.Read(cmd.Context(), at.view(), only.name)
			if err != nil {
				return err
			}
			all, err := only.of(h)
			if err != nil {
				return err
			}
			if *refusing {
				all = refusingOnly(all)
			}
			if done, err := o.structured(w, all); done {
				return err
			}
			head, rows := serviceRows(all, o.wide())
			return o.print(w, head, rows)
		})
	}
	return cmd
}

// refusingOnly leaves the listeners that refuse connections.
func refusingOnly(all []view.Service) []view.Service {
	var some []view.Service
	for _, s := range all {
		s.Packets = nil
		s.Listeners = slices.DeleteFunc(slices.Clone(s.Listeners), func(l view.Listener) bool { return l.Verdict != view.Refused })
		if len(s.Listeners) > 0 {
			some = append(some, s)
		}
	}
	return some
}

// serviceRows is a row for each listener, as sockets and as packets find it. Where all
// find the same there is one row.
func serviceRows(all []view.Service, wide bool) (head []string, rows [][]string) {
	packets := slices.ContainsFunc(all, func(s view.Service) bool { return len(s.Packets) > 0 })
	head = []string{"SERVICE", "LISTENER", "BALANCE", "FROM", "BACKENDS", "MAPS TO"}
	for _, s := range all {
		first := len(rows)
		for _, l := range s.Listeners {
			rows = append(rows, []string{s.Name, l.Listen, s.Balance, "sockets", fmt.Sprintf("%d/%d", len(l.To), l.Total), leadsTo(l, wide)})
		}
		for _, p := range s.Packets {
			from, to := packetsText(p, wide)
			same := slices.IndexFunc(rows[first:], func(r []string) bool { return r[1] == p.Listen && r[5] == to })
			if same >= 0 {
				rows[first+same][3] += ", " + from
				continue
			}
			rows = append(rows, []string{s.Name, p.Listen, p.Balance, from, fmt.Sprint(len(p.Backends)), to})
		}
		slices.SortStableFunc(rows[first:], func(a, b []string) int { return cmp.Compare(a[1], b[1]) })
	}
	if packets {
		return head, rows
	}
	if wide {
		// Where all are of sockets the column has room for where services come from.
		head[3] = "SOURCE"
		sources := make(map[string]string)
		for _, s := range all {
			sources[s.Name] = s.Source
		}
		for i := range rows {
			rows[i][3] = sources[rows[i][0]]
		}
		return head, rows
	}
	for i, r := range rows {
		rows[i] = slices.Delete(r, 3, 4)
	}
	return slices.Delete(head, 3, 4), rows
}

// shownBackends is how many backends a row of the plain table names.
const shownBackends = 3

func leadsTo(l view.Listener, wide bool) string {
	switch {
	case l.Verdict == view.Refused:
		return "nothing: refused (" + l.Why + ")"
	case l.Verdict == view.Panic:
		return firstOf(l.To, wide) + " (" + l.Why + ")"
	}
	return firstOf(l.To, wide)
}

func firstOf(names []string, wide bool) string {
	if n := len(names); n > shownBackends && !wide {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:shownBackends], ", "), n-shownBackends)
	}
	return strings.Join(names, ", ")
}

func packetsText(p view.Packets, wide bool) (from, to string) {
	from = strings.Join(p.From, ", ")
	if p.Guarded {
		from += " in the source ranges"
	}
	switch {
	case len(p.Backends) > 0:
		return from, firstOf(p.Backends, wide)
	case p.Dropped:
		return from, "nothing: dropped"
	}
	return from, "nothing: refused"
}

func newServiceShow(at *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:               "show SERVICE",
		Short:             "Show one service and the state of its backends",
		Example:           "  pentad service show orders-db",
		Args:              wants("SERVICE"),
		ValidArgsFunction: completeServices(at),
	}
	o := addFormat(cmd, wideFormats)
	watch := addWatch(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return watch.run(cmd, func(w io.Writer) error {
			h, err := view.Read(cmd.Context(), at.view(), args[0])
			if err != nil {
				return err
			}
			s, ok := h.Find(args[0])
			if !ok {
				return noService(h, args[0])
			}
			if done, err := o.structured(w, s); done {
				return err
			}
			return showService(w, o, s)
		})
	}
	return cmd
}

func noService(h *view.Host, name string) error {
	return fmt.Errorf("the kernel has no service %s%s; `pentad service list` shows those that it has", name, service.Nearest(name, h.Names()))
}

func showService(w io.Writer, o *output, s view.Service) error {
	if len(s.Listeners) > 0 {
		if err := table(w, settings(s)); err != nil {
			return err
		}
		fmt.Fprintln(w)
		head, rows := backendRows(s.Backends, o.wide(), false)
		if err := o.print(w, head, rows); err != nil {
			return err
		}
	}
	if len(s.Packets) == 0 {
		return nil
	}
	fmt.Fprintln(w)
	var rows [][]string
	for _, p := range s.Packets {
		from, to := packetsText(p, true)
		rows = append(rows, []string{p.Listen, from, to})
	}
	return o.print(w, []string{"PACKETS TO", "FROM", "MAP TO"}, rows)
}

// settings says what a service is and what the kernel does by itself for it.
func settings(s view.Service) [][]string {
	rows := [][]string{{"service", s.Name}, {"listen", strings.Join(s.Listen, ", ")}}
	for _, l := range s.Listeners {
		if l.Verdict != view.Serving {
			rows = append(rows, []string{l.Verdict, l.Listen + ": " + l.Why})
		}
	}
	rows = append(rows, []string{"from", s.Source}, []string{"balance", s.Balance})
	if s.Affinity != nil {
		rows = append(rows, []string{"affinity", s.Affinity.Timeout})
	}
	if k := s.Keepalive; k != nil {
		text := "after " + k.Idle
		if k.Interval != "" {
			text += ", every " + k.Interval
		}
		if k.Probes > 0 {
			text += fmt.Sprintf(", %d probes", k.Probes)
		}
		rows = append(rows, []string{"keepalive", text})
	}
	if b := s.Breaker; b != nil && b.MaxConnections > 0 {
		rows = append(rows, []string{"limit", fmt.Sprintf("%d connections per backend", b.MaxConnections)})
	}
	if b := s.Breaker; b != nil && b.Failures > 0 {
		rows = append(rows, []string{"ejection", fmt.Sprintf("after %s in a row, for the client that met them, for %s at first, at most %s of a group",
			view.Count(b.Failures, "failed connect"), b.Ejection, b.MaxEjected)})
	}
	if s.Connect != nil {
		rows = append(rows, []string{"connect timeout", s.Connect.Timeout})
	}
	if s.SlowStart != "" {
		rows = append(rows, []string{"slow start", s.SlowStart})
	}
	rows = append(rows, []string{"on down", s.OnDown})
	if s.Refused > 0 {
		rows = append(rows, []string{"refused so far", fmt.Sprint(s.Refused)})
	}
	if !s.Flows {
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
