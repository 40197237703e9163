package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/pentad/pentad/flow"
	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/view"
)

func newFlow(at *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "flow",
		Aliases: []string{"flows"},
		Short:   "Show which process is connected where, or follow connections as they come and go",
		Long: "Show the connections through VIPs that are open now: process, VIP, backend, round trip time, age and bytes.\n" +
			"With -f: follow connections as they begin, succeed, fail and end. Both read the kernel and work with the agent\n" +
			"dead. Events that come faster than they can be shown are counted, and the count is shown.",
		Example: "  pentad flow\n  pentad flow -f --service orders-db\n  pentad flow -f -o json",
		Args:    wants(),
	}
	var follow bool
	var want filter
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "follow connections until interrupted")
	cmd.Flags().StringVar(&want.service, "service", "", "only of this service")
	cmd.Flags().Var(&want.pid, "pid", "only of this process")
	// The flag was just defined: this cannot fail.
	_ = cmd.RegisterFlagCompletionFunc("service", completeServices(at))
	o := addList(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := want.check(cmd, at); err != nil {
			return err
		}
		if follow {
			return followFlows(cmd.Context(), at.pins, want, o, cmd.OutOrStdout(), cmd.ErrOrStderr())
		}
		return listFlows(cmd.Context(), at.pins, want, o, cmd.OutOrStdout(), cmd.ErrOrStderr())
	}
	return cmd
}

// filter says which flows are wanted; zero fields say nothing.
type filter struct {
	service string
	pid     pidValue
}

func (w filter) wants(f flow.Flow) bool {
	return (w.service == "" || f.Service == w.service) && (w.pid == 0 || f.PID == int(w.pid))
}

// check refuses what no flow can be of.
func (w filter) check(cmd *cobra.Command, at *places) error {
	if w.pid != 0 {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", w.pid)); errors.Is(err, os.ErrNotExist) {
			return misused(cmd, "--pid: no such process: %d", w.pid)
		}
	}
	if w.service == "" {
		return nil
	}
	h, err := view.ReadKernel(at.view())
	if err != nil {
		return err
	}
	if !slices.Contains(h.Names(), w.service) {
		return noService(h, w.service)
	}
	return nil
}

func listFlows(ctx context.Context, pins string, want filter, o *output, out, errOut io.Writer) error {
	flows, err := flow.Open(ctx, pins)
	if flows == nil && err != nil {
		return err
	}
	if err != nil {
		fmt.Fprintf(errOut, "pentad: %v\n", err)
	}
	all := []view.Flow{}
	for _, x := range flows {
		if want.wants(x) {
			all = append(all, view.NewFlow(x))
		}
	}
	if done, err := o.structured(out, all); done {
		return err
	}
	head := []string{"PROCESS", "CLIENT", "SERVICE", "VIP", "BACKEND", "RTT", "AGE", "SENT", "RECEIVED", "OUTCOME"}
	if o.wide() {
		head = append(head, "UID", "CGROUP", "BEGAN")
	}
	var rows [][]string
	for _, x := range all {
		row := []string{
			process(x), or(x.Client, "-"), or(x.Service, "-"), address(x.VIP, x.Protocol), x.Backend, or(view.Latency(x.RTTSeconds), "-"), view.Ago(x.Time),
			bytesOr(x.Sent), bytesOr(x.Received), x.Outcome,
		}
		if o.wide() {
			row = append(row, uidOr(x.UID), or(x.Cgroup, "-"), x.Time.Local().Format("2006-01-02T15:04:05.000Z07:00"))
		}
		rows = append(rows, row)
	}
	return o.print(out, head, rows)
}

func process(f view.Flow) string {
	if f.PID == 0 {
		return "-"
	}
	return f.Command + "/" + strconv.Itoa(f.PID)
}

// address tells an address of UDP from one of TCP.
func address(text, protocol string) string {
	if protocol == "tcp" {
		return text
	}
	return text + "/" + protocol
}

func uidOr(uid *uint32) string {
	if uid == nil {
		return "-"
	}
	return number(*uid)
}

func bytesOr(n *uint64) string {
	if n == nil {
		return "-"
	}
	return view.Bytes(*n)
}

// lostEvery is how often it is said that events were lost.
const lostEvery = time.Second

func followFlows(ctx context.Context, pins string, want filter, o *output, out, errOut io.Writer) error {
	follower, err := socket.Follow(pins)
	if err != nil {
		return err
	}
	defer follower.Close()
	show := flowPrinter(o, out)
	tracker := flow.NewTracker()
	tracker.Agent, tracker.Whose = host.Holder(pins), o.format != "table"
	var told uint64
	var lapsed time.Duration
	var failed error
	tellLost := func() {
		if n := follower.Lost(); n > told {
			fmt.Fprintf(errOut, "pentad: %d events were lost: they came faster than they could be shown\n", n-told)
			told = n
		}
		if d := follower.Lapsed(); d > lapsed {
			fmt.Fprintf(errOut, "pentad: nothing was followed for %s: this command did not run, and what happened meanwhile is not shown\n",
				(d - lapsed).Round(100*time.Millisecond))
			lapsed = d
		}
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	checked := time.Now()
	err = follower.Run(ctx, func(e socket.Event) {
		if x := tracker.Note(e); want.wants(x) && failed == nil {
			if failed = show(x); failed != nil {
				stop()
			}
		}
		if e.Time.Sub(checked) > lostEvery {
			tellLost()
			checked, tracker.Agent = e.Time, host.Holder(pins)
		}
	})
	tellLost()
	if errors.Is(err, socket.ErrNothingInstalled) {
		return fmt.Errorf("%w any more", err)
	}
	return cmp.Or(err, failed)
}

// flowPrinter returns a function that prints one flow. What programs read is one
// document a flow.
func flowPrinter(o *output, out io.Writer) func(flow.Flow) error {
	switch o.format {
	case "json":
		e := json.NewEncoder(out)
		e.SetEscapeHTML(false)
		return func(x flow.Flow) error { return e.Encode(view.NewFlow(x)) }
	case "yaml":
		return func(x flow.Flow) error {
			if _, err := io.WriteString(out, "---\n"); err != nil {
				return err
			}
			return writeYAML(out, view.NewFlow(x))
		}
	}
	const line = "%-12s  %-11s  %-20s  %-20s  %-21s  %-21s  %-8s  %-10s  %-9s  %-9s  %s\n"
	more := func(texts ...string) string {
		if !o.wide() {
			return ""
		}
		return "  " + strings.Join(texts, "  ")
	}
	if !o.noHeaders {
		fmt.Fprintf(out, line, "TIME", "EVENT", "PROCESS", "SERVICE", "VIP", "BACKEND", "RTT", "DURATION", "SENT", "RECEIVED", "OUTCOME"+more("UID", "CGROUP"))
	}
	return func(x flow.Flow) error {
		f := view.NewFlow(x)
		outcome := f.Outcome
		if outcome == f.Event {
			outcome = "-"
		}
		_, err := fmt.Fprintf(out, line, x.Time.Local().Format("15:04:05.000"), f.Event, process(f), or(f.Service, "-"), address(f.VIP, f.Protocol),
			or(f.Backend, "-"), or(view.Latency(f.RTTSeconds), "-"), or(view.Latency(f.DurationSeconds), "-"), bytesOr(f.Sent), bytesOr(f.Received), outcome+more(uidOr(f.UID), or(f.Cgroup, "-")))
		return err
	}
}
