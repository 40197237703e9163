package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/pentad/pentad/config"
)

func newCheck() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:     "check",
		Short:   "Validate a configuration file; change nothing",
		Long:    "Validate a configuration file and print every error as file:line:column. Exit code 0: valid, 1: not.",
		Example: "  pentad check -c /etc/pentad/pentad.yaml",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := config.Load(file)
			var all config.Errors
			if errors.As(err, &all) {
				fmt.Fprintln(cmd.ErrOrStderr(), all)
				return errNo
			}
			if err != nil {
				return err
			}
			listeners, backends := 0, 0
			for _, s := range c.Services {
				listeners += len(s.Listeners)
				backends += len(s.Backends)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s is valid: %s, %s, %s\n", file,
				count(len(c.Services), "service"), count(listeners, "listener"), count(backends, "backend"))
			return nil
		},
	}
	cmd.Flags().StringVarP(&file, "config", "c", config.DefaultPath, "configuration file")
	return cmd
}

// count writes a number with its noun.
func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
