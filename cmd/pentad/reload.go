package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/view"
)

func newReload(at *places) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "reload",
		Short: "Have the agent read its file again, and wait until it is in force",
		Long: "Have the agent read its file again, and wait until the kernel has it. The agent does so by itself when the file\n" +
			"changes, or with SIGHUP; this command says what became of it. Exit code 0: it is in force; 1: it is not, and why.\n" +
			"With --force also when it takes away more than `guard` of the file lets it.",
		Example: "  pentad reload",
		Args:    wants(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			a, err := api.NewClient(at.runDir).Reload(cmd.Context(), api.ReloadRequest{Force: force})
			if errors.Is(err, api.ErrNoAgent) {
				return fmt.Errorf("%w; start it: systemctl start pentad, or pentad run", err)
			}
			if err != nil {
				return fmt.Errorf("not in force: %s", strings.TrimPrefix(err.Error(), api.ErrRefused.Error()+": "))
			}
			fmt.Fprintf(cmd.OutOrStdout(), "revision %d with %s is in force\n", a.Revision, view.Count(a.Services, "service"))
			for _, text := range a.Skipped {
				fmt.Fprintln(cmd.ErrOrStderr(), "pentad:", text)
			}
			if len(a.Skipped) > 0 {
				return errNo
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "whatever it takes away")
	return cmd
}
