package main

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/plane/socket"
)

func newBackend(at *places) *cobra.Command {
	cmd := &cobra.Command{Use: "backend", Short: "Show, drain and enable backends"}
	cmd.AddCommand(newBackendList(at),
		newDrain(at, true, "drain", "Give a backend no new connections; let old ones finish",
			"Give a backend no new connections; old ones finish. This lasts until `pentad backend enable`, also\n"+
				"across restarts of the agent, but not across a restart of the host."),
		newDrain(at, false, "enable", "Give a drained backend new connections again",
			"Give a drained backend new connections again."))
	return cmd
}

func newBackendList(at *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "List every backend and its state",
		Long:    "List every backend and its state, read from the kernel's maps. This works with the agent dead.",
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
	head := []string{"BACKEND", "STATE", "FOR", "WEIGHT", "GROUP", "ZONE"}
	if named {
		head = append([]string{"SERVICE"}, head...)
	}
	if wide {
		head = append(head, "SINCE")
	}
	rows := [][]string{head}
	for _, b := range backends {
		row := []string{b.Address, b.State, ago(b.Since), strconv.Itoa(int(b.Weight)), strconv.Itoa(int(b.Group)), b.Zone}
		if named {
			row = append([]string{b.Service}, row...)
		}
		if wide {
			row = append(row, b.Since.Format("2006-01-02T15:04:05Z07:00"))
		}
		rows = append(rows, row)
	}
	return rows
}

func newDrain(at *places, drained bool, verb, short, long string) *cobra.Command {
	return &cobra.Command{
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
			err = api.NewClient(at.runDir).Drain(cmd.Context(), api.DrainRequest{Service: args[0], Address: addr, Drained: drained})
			if errors.Is(err, api.ErrNoAgent) {
				return fmt.Errorf("%w; start it: pentad run", err)
			}
			return err
		},
	}
}
