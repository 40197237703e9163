package main

import (
	"io"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/view"
)

func newForward(at *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "forward",
		Aliases: []string{"forwards"},
		Short:   "Show the forwards of this host",
	}
	cmd.AddCommand(newForwardList(at))
	return cmd
}

func newForwardList(at *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the forwards of this host and whether they are up",
		Long: "List the forwards of this host, whether their way is open, since when, and if it is not, why. Forwards are the\n" +
			"agent's: this asks it.",
		Example: "  pentad forward list\n  pentad forward list -o json",
		Args:    wants(),
	}
	o := addList(cmd)
	watch := addWatch(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return watch.run(cmd, func(w io.Writer) error {
			all, err := api.NewClient(at.runDir).Forwards(cmd.Context())
			if err != nil {
				return err
			}
			if done, err := o.structured(w, all); done {
				return err
			}
			var rows [][]string
			for _, f := range all {
				from, state := f.Listen, "up"
				if f.Remote != "" {
					from = f.Remote + " at " + f.Via[len(f.Via)-1]
				}
				switch {
				case !f.Up:
					state = "down"
				case f.Missing:
					state = "does not listen"
				}
				rows = append(rows, []string{f.Name, from, f.To, strings.Join(f.Via, ", "), state, view.Ago(f.Since), strconv.Itoa(f.Open), or(f.Why, "-")})
			}
			return o.print(w, []string{"FORWARD", "FROM", "TO", "VIA", "STATE", "FOR", "OPEN", "WHY"}, rows)
		})
	}
	return cmd
}
