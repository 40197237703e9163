package main

import (
	"github.com/spf13/cobra"

	"github.com/pentad/pentad/config"
)

func newConfig() *cobra.Command {
	cmd := &cobra.Command{Use: "config", Short: "Show a configuration with its defaults"}
	cmd.AddCommand(newConfigShow())
	return cmd
}

func newConfigShow() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "show [FILE]",
		Short: "Show what a file says, with every default and where each value comes from",
		Long: "Show what a file, with those that it includes, says of each service: every key, its value, and where that comes from:\n" +
			"a line, the defaults of the file, or the default of pentad. What the kernel has is shown by `pentad service show`.",
		Example: "  pentad config show /etc/pentad/pentad.yaml",
		Args:    wants("[FILE]"),
	}
	addConfigFlag(cmd, &file)
	o := addFormat(cmd, plainFormats)
	only := cmd.Flags().String("service", "", "only this service")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		name, data, err := readConfig(cmd, file, args)
		if err != nil {
			return err
		}
		all, err := config.Values(config.WithIncluded(name, data), *only)
		if err != nil {
			return err
		}
		if done, err := o.structured(cmd.OutOrStdout(), all); done {
			return err
		}
		rows := make([][]string, len(all))
		for i, v := range all {
			rows[i] = []string{v.Path, v.Value, v.From}
		}
		return o.print(cmd.OutOrStdout(), []string{"KEY", "VALUE", "FROM"}, rows)
	}
	return cmd
}
