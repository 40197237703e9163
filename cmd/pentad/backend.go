package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/pentad/pentad/agent"
	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
	"github.com/pentad/pentad/view"
)

func newBackend(at *places) *cobra.Command {
	cmd := &cobra.Command{Use: "backend", Aliases: []string{"backends"}, Short: "Show, drain and enable backends"}
	cmd.AddCommand(newBackendList(at), newDrain(at), newEnable(at))
	return cmd
}

func newBackendList(at *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List every backend, its state and why, and its load",
		Long: "List every backend, its state and why, and its load, read from the kernel's maps. This works with the agent\n" +
			"dead; what probes met with is the agent's to tell. IN-FLIGHT counts connections from connect() to their end; RTT\n" +
			"is of handshakes, smoothed; RESPONSE is from a request to the first byte of its answer, as measured last; FAILED\n" +
			"counts all failed connects.",
		Example: "  pentad backend list\n  pentad backend list --service orders-db\n  pentad backend list --state down,ejected -o wide",
		Args:    filtered,
	}
	o := addList(cmd)
	only, state := addService(cmd, at), addState(cmd)
	by := cmd.Flags().String("sort", "service", "service, address, state, in-flight, failed, rtt or response")
	watch := addWatch(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		order := orders[*by]
		if order == nil {
			return misused(cmd, "--sort: %q is no column%s", *by, service.Nearest(*by, orderWords()))
		}
		return watch.run(cmd, func(w io.Writer) error {
			h, err := view.Read(cmd.Context(), at.view(), "")
			if err != nil {
				return err
			}
			services, err := only.of(h)
			if err != nil {
				return err
			}
			all := []view.Backend{}
			for _, s := range services {
				for _, b := range s.Backends {
					b.Service = s.Name
					all = append(all, b)
				}
			}
			if all, err = state.of(cmd, all); err != nil {
				return err
			}
			slices.SortStableFunc(all, order)
			if done, err := o.structured(w, all); done {
				return err
			}
			head, rows := backendRows(all, o.wide(), true)
			return o.print(w, head, rows)
		})
	}
	return cmd
}

// orders are those of a list of backends; what is measured goes from the most to the
// least.
var orders = map[string]func(a, b view.Backend) int{
	"service":   func(a, b view.Backend) int { return cmp.Compare(a.Service, b.Service) },
	"address":   func(a, b view.Backend) int { return addrPort(a.Address).Compare(addrPort(b.Address)) },
	"state":     func(a, b view.Backend) int { return cmp.Compare(a.State, b.State) },
	"in-flight": func(a, b view.Backend) int { return cmp.Compare(b.InFlight, a.InFlight) },
	"failed":    func(a, b view.Backend) int { return cmp.Compare(b.Failed, a.Failed) },
	"rtt":       func(a, b view.Backend) int { return cmp.Compare(b.RTTSeconds, a.RTTSeconds) },
	"response":  func(a, b view.Backend) int { return cmp.Compare(b.ResponseSeconds, a.ResponseSeconds) },
}

func orderWords() []string {
	var words []string
	for w := range orders {
		words = append(words, w)
	}
	slices.Sort(words)
	return words
}

func addrPort(text string) netip.AddrPort {
	a, _ := netip.ParseAddrPort(text)
	return a
}

// backendRows is a table of backends; named says whether their services are in it.
func backendRows(backends []view.Backend, wide, named bool) (head []string, rows [][]string) {
	head = []string{"BACKEND", "STATE", "FOR", "IN-FLIGHT", "RTT", "RESPONSE", "FAILED", "WEIGHT", "GROUP", "ZONE", "WHY"}
	if wide {
		head = []string{"BACKEND", "STATE", "FOR", "SINCE", "IN-FLIGHT", "RTT", "RESPONSE", "MEASURED", "CONNECTIONS", "FAILED", "IN A ROW", "EJECTIONS",
			"PROBE", "WEIGHT", "GROUP", "ZONE", "WHY"}
	}
	if named {
		head = append([]string{"SERVICE"}, head...)
	}
	for _, b := range backends {
		since := view.Ago(b.Since)
		if b.State == service.Ejected.String() || b.State == service.Full.String() {
			since = "-" // the kernel knows until when, not since when
		}
		row := []string{
			b.Address, b.State, since, number(b.InFlight), or(view.Latency(b.RTTSeconds), "-"), or(view.Latency(b.ResponseSeconds), "-"), number(b.Failed),
			number(b.Weight), number(b.Group), or(b.Zone, "-"), b.Why,
		}
		if wide {
			measured := "-"
			if b.RTTSeconds > 0 || b.ResponseSeconds > 0 {
				measured = view.Ago(time.Now().Add(-time.Duration(b.MeasuredSeconds*float64(time.Second)))) + " ago"
			}
			row = []string{
				b.Address, b.State, since, b.Since.Format("2006-01-02T15:04:05Z07:00"), number(b.InFlight), or(view.Latency(b.RTTSeconds), "-"),
				or(view.Latency(b.ResponseSeconds), "-"), measured, number(b.Connections), number(b.Failed), number(b.FailedInARow), number(b.Ejections),
				probeText(b.Probe), number(b.Weight), number(b.Group), or(b.Zone, "-"), or(b.Why, "-"),
			}
		}
		if named {
			row = append([]string{b.Service}, row...)
		}
		rows = append(rows, row)
	}
	return head, rows
}

// probeText says in a few words how the last probe ended.
func probeText(p *view.Probe) string {
	switch {
	case p == nil:
		return "-"
	case p.Result == "none":
		return p.Probe + ": not yet"
	case p.Result == "success":
		return fmt.Sprintf("%s: ok in %s", p.Probe, view.Latency(p.TookSeconds))
	}
	return fmt.Sprintf("%s: failed in %s", p.Probe, view.Latency(p.TookSeconds))
}

func number[N uint32 | uint64](n N) string { return strconv.FormatUint(uint64(n), 10) }

func or(text, fallback string) string {
	if text == "" {
		return fallback
	}
	return text
}

// backendArgs reads SERVICE ADDRESS:PORT; with all an address alone, with or without a
// port, of every service. A service that has one port at an address has its backend
// named by that alone.
func backendArgs(cmd *cobra.Command, at *places, args []string, all bool) (api.DrainRequest, error) {
	var r api.DrainRequest
	if all {
		if len(args) != 1 {
			return r, misused(cmd, "want one ADDRESS with --all, found %d arguments", len(args))
		}
	} else if err := wants("SERVICE", "ADDRESS")(cmd, args); err != nil {
		return r, err
	} else {
		r.Service = args[0]
	}
	text := args[len(args)-1]
	if a, err := netip.ParseAddrPort(text); err == nil {
		r.Address = netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
		return r, nil
	}
	host, err := netip.ParseAddr(strings.Trim(text, "[]"))
	if err != nil {
		return r, misused(cmd, "%q is no backend address; want ADDRESS:PORT, such as 192.0.2.11:3306", text)
	}
	r.Host = host.Unmap()
	if all {
		return r, nil
	}
	v, err := socket.Read(at.pins)
	if err != nil {
		return r, err
	}
	var ports []string
	if (&service.Snapshot{Services: v.Services}).Find(r.Service) == nil {
		h, err := view.ReadKernel(at.view())
		if err != nil {
			return r, err
		}
		return r, noService(h, r.Service)
	}
	if s := (&service.Snapshot{Services: v.Services}).Find(r.Service); s != nil {
		for _, b := range s.Backends {
			if b.Address.Addr() == r.Host {
				ports = append(ports, b.Address.String())
			}
		}
	}
	if len(ports) != 1 {
		return r, misused(cmd, "%q names %d backends of the service %s; want ADDRESS:PORT, such as 192.0.2.11:3306", text, len(ports), r.Service)
	}
	return r, nil
}

func newDrain(at *places) *cobra.Command {
	var timeout durationValue
	var wait, force, all bool
	cmd := &cobra.Command{
		Use:   "drain SERVICE ADDRESS",
		Short: "Give a backend no new connections; let old ones finish",
		Long: "Give a backend no new connections; old ones finish. This lasts until `pentad backend enable`, also across restarts\n" +
			"of the agent and of the host, and when the backend is taken out of the file and put back. Connections that are\n" +
			"left are never closed, unless --timeout says after which time, to the second. A backend that is the last one to\n" +
			"take connections of a listener is drained with --force only. Where no agent runs the kernel is told directly, but --timeout\n" +
			"needs one.",
		Example: "  pentad backend drain orders-db 192.0.2.11:3306\n  pentad backend drain orders-db 192.0.2.11:3306 --timeout 60s --wait\n" +
			"  pentad backend drain --all 192.0.2.11",
		ValidArgsFunction: completeServices(at),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := backendArgs(cmd, at, args, all)
			if err != nil {
				return err
			}
			r.Drained, r.Timeout, r.Force = true, time.Duration(timeout), force
			answer, err := askDrain(cmd.Context(), at, r)
			if err != nil {
				return err
			}
			if err := tellDrained(cmd.OutOrStdout(), at, answer, "drained"); err != nil {
				return err
			}
			for _, l := range answer.Refusing {
				fmt.Fprintf(cmd.ErrOrStderr(), "warning: %s refuses every connection now\n", l)
			}
			if !wait {
				return nil
			}
			return awaitEmpty(cmd.Context(), cmd.OutOrStdout(), at, answer)
		},
	}
	cmd.Flags().Var(&timeout, "timeout", "close the connections that are left after this time; 0s: never")
	cmd.Flags().BoolVar(&wait, "wait", false, "return when no connection is left")
	cmd.Flags().BoolVar(&force, "force", false, "also the last backend that takes connections")
	cmd.Flags().BoolVar(&all, "all", false, "the backends at this ADDRESS, with any port, of every service")
	return cmd
}

func newEnable(at *places) *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:               "enable SERVICE ADDRESS",
		Short:             "Give a drained backend new connections again",
		Long:              "Give a drained backend new connections again. Where no agent runs the kernel is told directly.",
		Example:           "  pentad backend enable orders-db 192.0.2.11:3306\n  pentad backend enable --all 192.0.2.11",
		ValidArgsFunction: completeServices(at),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := backendArgs(cmd, at, args, all)
			if err != nil {
				return err
			}
			answer, err := askDrain(cmd.Context(), at, r)
			if err != nil {
				return err
			}
			return tellDrained(cmd.OutOrStdout(), at, answer, "enabled")
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "the backends at this ADDRESS, with any port, of every service")
	return cmd
}

func askDrain(ctx context.Context, at *places, r api.DrainRequest) (api.DrainAnswer, error) {
	answer, err := api.NewClient(at.runDir).Drain(ctx, r)
	if errors.Is(err, api.ErrNoAgent) {
		return agent.DrainAlone(agent.Options{Pins: at.pins, RunDir: at.runDir, StateDir: at.state(), Version: version}, r)
	}
	return answer, err
}

// tellDrained says what was done, and what the backends have left.
func tellDrained(w io.Writer, at *places, answer api.DrainAnswer, verb string) error {
	h, err := view.ReadKernel(at.view())
	if err != nil {
		return err
	}
	for _, b := range answer.Backends {
		text := fmt.Sprintf("%s %s: %s", b.Service, b.Address, verb)
		if b.Was {
			text = fmt.Sprintf("%s %s: it was %s before", b.Service, b.Address, verb)
		}
		if x, ok := findBackend(h, b); ok && verb == "drained" {
			text += ", " + view.Count(int(x.InFlight), "connection") + " left"
		}
		if b.Note != "" {
			text += "; " + b.Note
		}
		fmt.Fprintln(w, text)
	}
	return nil
}

func findBackend(h *view.Host, b api.Drained) (view.Backend, bool) {
	s, _ := h.Find(b.Service)
	for _, x := range s.Backends {
		if x.Address == b.Address.String() {
			return x, true
		}
	}
	return view.Backend{}, false
}

// waitEvery is how often --wait looks.
const waitEvery = 250 * time.Millisecond

// awaitEmpty returns when the backends have no connection left.
func awaitEmpty(ctx context.Context, w io.Writer, at *places, answer api.DrainAnswer) error {
	for last := -1; ; {
		h, err := view.ReadKernel(at.view())
		if err != nil {
			return err
		}
		left := 0
		for _, b := range answer.Backends {
			x, _ := findBackend(h, b)
			left += int(x.InFlight)
		}
		if left == 0 {
			_, err := fmt.Fprintln(w, "no connection is left")
			return err
		}
		if _, isTerminal := terminal(w); isTerminal && left != last {
			fmt.Fprintf(w, "%s left\n", view.Count(left, "connection"))
			last = left
		}
		if !pause(ctx, waitEvery) {
			return fmt.Errorf("interrupted with %s left; the backend stays drained", view.Count(left, "connection"))
		}
	}
}
