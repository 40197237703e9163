package main

import (
	"github.com/spf13/cobra"

	"github.com/pentad/pentad/agent"
)

func newDown(at *places) *cobra.Command {
	return &cobra.Command{
		Use:   "down",
		Short: "Remove everything of pentad from this kernel",
		Long: "Remove everything that pentad ever put into this kernel. A running agent is ended first. Needs no agent and\n" +
			"no configuration, works in any state, and may be repeated. VIPs are not translated any more; connections that\n" +
			"exist go on.",
		Example: "  pentad down",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return agent.Down(cmd.Context(), at.pins, at.runDir)
		},
	}
}
