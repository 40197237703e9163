package main

import (
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/pentad/pentad/view"
)

func newTop(at *places) *cobra.Command {
	every := durationValue(time.Second)
	var once bool
	cmd := &cobra.Command{
		Use:   "top",
		Short: "Show services by connections a second, failures and latency, again and again",
		Long: "Show services by connections a second, failures and latency, the busiest first, again and again until interrupted.\n" +
			"RTT and RESPONSE are those of the slowest backend that takes connections. It works with the agent dead.",
		Example: "  pentad top\n  pentad top --once -o json",
		Args:    wants(),
	}
	cmd.Flags().Var(&every, "interval", "how long one look is from the next")
	cmd.Flags().BoolVar(&once, "once", false, "end after the first")
	o := addFormat(cmd, plainFormats)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if every < durationValue(100*time.Millisecond) {
			return misused(cmd, "--interval: want 100ms or more")
		}
		first, err := view.ReadKernel(at.view())
		if err != nil {
			return err
		}
		before := first.Tally()
		w := watcher{on: !once, every: every}
		looked := time.Now()
		if !pause(cmd.Context(), time.Duration(every)) {
			return nil
		}
		return w.run(cmd, func(out io.Writer) error {
			after, err := view.ReadKernel(at.view())
			if err != nil {
				return err
			}
			now := time.Now()
			rates := view.Rates(before, after, now.Sub(looked))
			before, looked = after.Tally(), now
			if done, err := o.structured(out, rates); done {
				return err
			}
			return o.print(out, []string{"SERVICE", "CONNECTIONS/s", "FAILED/s", "IN-FLIGHT", "RTT", "RESPONSE", "BACKENDS"}, rateRows(out, rates))
		})
	}
	return cmd
}

// shownServices is how many services there are lines for, where nobody's terminal says.
const shownServices = 50

func rateRows(out io.Writer, rates []view.Rate) [][]string {
	var rows [][]string
	for i, r := range rates {
		if i == linesOf(out) {
			break
		}
		rows = append(rows, []string{
			r.Service, fmt.Sprintf("%.1f", r.ConnectionsPerSecond), fmt.Sprintf("%.1f", r.FailuresPerSecond), number(r.InFlight),
			or(view.Latency(r.RTTSeconds), "-"), or(view.Latency(r.ResponseSeconds), "-"), fmt.Sprintf("%d/%d", r.Usable, r.Backends),
		})
	}
	return rows
}
