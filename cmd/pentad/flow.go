package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"github.com/pentad/pentad/flow"
	"github.com/pentad/pentad/plane/socket"
)

func newFlow(at *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "flow",
		Short: "Show which process is connected where, or follow connections as they come and go",
		Long: "Show the connections through VIPs that are open now: process, VIP, backend, round trip time, age and bytes.\n" +
			"With -f: follow connections as they begin, succeed, fail and end. Both read the kernel and work with the agent\n" +
			"dead. Events that come faster than they can be shown are counted, and the count is shown.",
		Example: "  pentad flow\n  pentad flow -f --service orders-db\n  pentad flow -f -o json",
		Args:    cobra.NoArgs,
	}
	var follow bool
	var want filter
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "follow connections until interrupted")
	cmd.Flags().StringVar(&want.service, "service", "", "only of this service")
	cmd.Flags().IntVar(&want.pid, "pid", 0, "only of this process")
	// The flag was just defined: this cannot fail.
	_ = cmd.RegisterFlagCompletionFunc("service", completeServices(at))
	f := addFormat(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if follow {
			return followFlows(cmd.Context(), at.pins, want, *f, cmd.OutOrStdout(), cmd.ErrOrStderr())
		}
		return listFlows(cmd.Context(), at.pins, want, *f, cmd.OutOrStdout(), cmd.ErrOrStderr())
	}
	return cmd
}

// filter says which flows are wanted; zero fields say nothing.
type filter struct {
	service string
	pid     int
}

func (w filter) wants(f flow.Flow) bool {
	return (w.service == "" || f.Service == w.service) && (w.pid == 0 || f.PID == w.pid)
}

// flowOut is a flow for programs.
type flowOut struct {
	Time     time.Time `json:"time" yaml:"time"`
	Event    string    `json:"event" yaml:"event"`
	PID      int       `json:"pid,omitempty" yaml:"pid,omitempty"`
	Command  string    `json:"command,omitempty" yaml:"command,omitempty"`
	Service  string    `json:"service,omitempty" yaml:"service,omitempty"`
	Protocol string    `json:"protocol" yaml:"protocol"`
	VIP      string    `json:"vip" yaml:"vip"`
	Backend  string    `json:"backend,omitempty" yaml:"backend,omitempty"`
	Outcome  string    `json:"outcome" yaml:"outcome"`
	RTT      string    `json:"rtt,omitempty" yaml:"rtt,omitempty"`
	Duration string    `json:"duration,omitempty" yaml:"duration,omitempty"`
	Sent     uint64    `json:"sent" yaml:"sent"`
	Received uint64    `json:"received" yaml:"received"`
}

func newFlowOut(f flow.Flow) flowOut {
	out := flowOut{
		Time: f.Time.UTC(), Event: f.Event, PID: f.PID, Command: f.Command, Service: f.Service, Protocol: f.Protocol.String(),
		VIP: f.VIP.String(), Outcome: f.Outcome, RTT: latency(f.RTT), Sent: f.Sent, Received: f.Received,
	}
	if f.Backend.IsValid() {
		out.Backend = f.Backend.String()
	}
	if f.Duration > 0 {
		out.Duration = f.Duration.Round(time.Microsecond).String()
	}
	return out
}

func listFlows(ctx context.Context, pins string, want filter, f format, out, errOut io.Writer) error {
	flows, err := flow.Open(ctx, pins)
	if flows == nil && err != nil {
		return err
	}
	if err != nil {
		fmt.Fprintf(errOut, "pentad: %v\n", err)
	}
	all := []flowOut{}
	for _, x := range flows {
		if want.wants(x) {
			all = append(all, newFlowOut(x))
		}
	}
	if done, err := f.structured(out, all); done {
		return err
	}
	rows := [][]string{{"PROCESS", "SERVICE", "VIP", "BACKEND", "RTT", "AGE", "SENT", "RECEIVED", "OUTCOME"}}
	for _, x := range all {
		rows = append(rows, []string{
			process(x), or(x.Service, "-"), x.VIP, x.Backend, or(x.RTT, "-"), ago(x.Time), bytesText(x.Sent), bytesText(x.Received), x.Outcome,
		})
	}
	return table(out, rows)
}

func process(f flowOut) string {
	if f.PID == 0 {
		return "-"
	}
	return f.Command + "/" + strconv.Itoa(f.PID)
}

// lostEvery is how often it is said that events were lost.
const lostEvery = time.Second

func followFlows(ctx context.Context, pins string, want filter, f format, out, errOut io.Writer) error {
	follower, err := socket.Follow(pins)
	if err != nil {
		return err
	}
	defer follower.Close()
	show := f.flowPrinter(out)
	tracker := flow.NewTracker()
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
			checked = e.Time
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
func (f format) flowPrinter(out io.Writer) func(flow.Flow) error {
	switch f {
	case "json":
		e := json.NewEncoder(out)
		return func(x flow.Flow) error { return e.Encode(newFlowOut(x)) }
	case "yaml":
		e := yaml.NewEncoder(out)
		return func(x flow.Flow) error { return e.Encode(newFlowOut(x)) }
	}
	const line = "%-12s  %-11s  %-20s  %-20s  %-21s  %-21s  %-8s  %-10s  %-9s  %-9s  %s\n"
	fmt.Fprintf(out, line, "TIME", "EVENT", "PROCESS", "SERVICE", "VIP", "BACKEND", "RTT", "DURATION", "SENT", "RECEIVED", "OUTCOME")
	return func(x flow.Flow) error {
		o := newFlowOut(x)
		sent, received := "-", "-"
		if x.Event == socket.Closed.String() && o.Protocol == "tcp" {
			sent, received = bytesText(o.Sent), bytesText(o.Received)
		}
		_, err := fmt.Fprintf(out, line, x.Time.Local().Format("15:04:05.000"), o.Event, process(o), or(o.Service, "-"), o.VIP,
			or(o.Backend, "-"), or(o.RTT, "-"), or(latency(x.Duration), "-"), sent, received, o.Outcome)
		return err
	}
}
