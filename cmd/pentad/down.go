package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/pentad/pentad/agent"
	"github.com/pentad/pentad/view"
)

func newDown(at *places) *cobra.Command {
	return &cobra.Command{
		Use:   "down",
		Short: "Remove everything of pentad from this kernel",
		Long: "Remove everything that pentad ever put into this kernel. A running agent is ended first. Needs no agent and\n" +
			"no configuration, works in any state, and may be repeated. VIPs are not translated any more; connections that\n" +
			"exist go on. Which backends are drained is forgotten.",
		Example: "  pentad down",
		Args:    wants(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			before, err := view.ReadKernel(at.view())
			if err := agent.Down(cmd.Context(), agent.Options{Pins: at.pins, RunDir: at.runDir, StateDir: at.state()}); err != nil {
				return err
			}
			text := "nothing was installed"
			if err == nil {
				text = fmt.Sprintf("%s removed; connections that exist go on", view.Count(len(before.Kernel.Services), "service"))
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), text)
			return err
		},
	}
}
