package main

import (
	"github.com/spf13/cobra"

	"github.com/pentad/pentad/lab/demo"
)

func newDemo() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show a failover on a throw-away host inside this one",
		Long: "Build a throw-away host inside this one (own network namespace with no way out, own cgroup), run real clients\n" +
			"against real servers through a VIP, kill a server, bring it back, kill the agent, and count what the clients\n" +
			"saw. Takes under 30 seconds and leaves nothing behind, also when interrupted. Needs root.",
		Example: "  sudo pentad demo",
		Args:    wants(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return demo.Run(cmd.Context(), cmd.OutOrStdout())
		},
	}
	cmd.AddCommand(
		&cobra.Command{
			Use: "server NAME ADDRESS", Hidden: true, Args: wants("NAME", "ADDRESS"), Short: "A server of the demo",
			RunE: func(_ *cobra.Command, args []string) error { return demo.Serve(args[0], args[1]) },
		},
		&cobra.Command{
			Use: "client URL", Hidden: true, Args: wants("URL"), Short: "A client of the demo",
			RunE: func(cmd *cobra.Command, args []string) error {
				return demo.Request(cmd.Context(), args[0], cmd.OutOrStdout())
			},
		},
	)
	return cmd
}
