package main

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/plane/socket"
)

func newBackend(at *places) *cobra.Command {
	cmd := &cobra.Command{Use: "backend", Short: "Show, drain and enable backends"}
	cmd.AddCommand(newBackendList(at),
		newDrain(at, true, "drain", "Give a backend no new connections; let old ones finish",
			"Give a backend no new connections; old ones finish. This lasts until `pentad backend enable`, also\n"+
				"across restarts of the agent, but not across a restart of the host. Connections that are left are never closed,\n"+
				"unless --timeout says after which time, to the second."),
		newDrain(at, false, "enable", "Give a drained backend new connections again",
			"Give a drained backend new connections again."))
	return cmd
}

func newBackendList(at *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List every backend, its state and why, and its load",
		Long: "List every backend, its state and why, and its load, read from the kernel's maps. This works with the agent\n" +
			"dead. IN-FLIGHT counts connections from connect() to their end; RTT is of handshakes, RESPONSE from a request to\n" +
			"the first byte of its answer, both smoothed; FAILED counts all failed connects.",
		Example: "  pentad backend list\n  pentad backend list -o wide",
		Args:    cobra.NoArgs,
	}
	f := addFormat(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		v, err := socket.Read(at.pins)
		if err != nil {
			return err
		}
		all := []backendOut{}
		for _, s := range v.Services {
			for _, b := range newBackendsOut(v, s) {
				b.Service = s.Name
				all = append(all, b)
			}
		}
		if done, err := f.structured(cmd.OutOrStdout(), all); done {
			return err
		}
		return table(cmd.OutOrStdout(), backendRows(all, *f == "wide"))
	}
	return cmd
}

// backendRows is a table of backends; the service is named when they have one.
func backendRows(backends []backendOut, wide bool) [][]string {
	named := len(backends) > 0 && backends[0].Service != ""
	head := []string{"BACKEND", "STATE", "FOR", "IN-FLIGHT", "RTT", "RESPONSE", "FAILED", "WEIGHT", "GROUP", "ZONE", "WHY"}
	if named {
		head = append([]string{"SERVICE"}, head...)
	}
	if wide {
		head = append(head, "SINCE", "CONNECTIONS", "IN A ROW", "EJECTIONS")
	}
	rows := [][]string{head}
	for _, b := range backends {
		since := ago(b.Since)
		if b.State == ejectedState {
			since = "-" // the kernel knows until when, not since when
		}
		row := []string{
			b.Address, b.State, since, number(b.InFlight), or(b.RTT, "-"), or(b.Response, "-"), number(b.Failed),
			number(b.Weight), number(b.Group), or(b.Zone, "-"), b.Why,
		}
		if named {
			row = append([]string{b.Service}, row...)
		}
		if wide {
			row[len(row)-1] = or(b.Why, "-")
			row = append(row, b.Since.Format("2006-01-02T15:04:05Z07:00"), number(b.Connections), number(b.Failures), number(b.Ejections))
		}
		rows = append(rows, row)
	}
	return rows
}

func number[N uint32 | uint64](n N) string { return strconv.FormatUint(uint64(n), 10) }

func or(text, fallback string) string {
	if text == "" {
		return fallback
	}
	return text
}

func newDrain(at *places, drained bool, verb, short, long string) *cobra.Command {
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:               verb + " SERVICE ADDRESS",
		Short:             short,
		Long:              long,
		Example:           "  pentad backend " + verb + " orders-db 192.0.2.11:3306",
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: completeServices(at),
		RunE: func(cmd *cobra.Command, args []string) error {
			addr, err := netip.ParseAddrPort(args[1])
			if err != nil {
				return fmt.Errorf("%q is no backend address; want ADDRESS:PORT, such as 192.0.2.11:3306", args[1])
			}
			err = api.NewClient(at.runDir).Drain(cmd.Context(), api.DrainRequest{
				Service: args[0], Address: addr, Drained: drained, Timeout: timeout,
			})
			if errors.Is(err, api.ErrNoAgent) {
				return fmt.Errorf("%w; start it: pentad run", err)
			}
			return err
		},
	}
	if drained {
		cmd.Flags().DurationVar(&timeout, "timeout", 0, "close the connections that are left after this time; 0: never")
		cmd.Example += "\n  pentad backend drain orders-db 192.0.2.11:3306 --timeout 60s"
	}
	return cmd
}
