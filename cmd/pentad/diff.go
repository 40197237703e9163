package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/view"
)

func newDiff(at *places) *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "diff [FILE]",
		Short: "Show what a file would change, and how many connections it would close",
		Long: "Compare a file with what the kernel has, and show what it would change if it were put in force. Services that\n" +
			"come from elsewhere than the file are left out, and so is what the kernel does not know: probes, and the other sections.\n" +
			"Exit code 0: nothing would change; 1: something would.",
		Example: "  pentad diff /etc/pentad/pentad.yaml.new",
		Args:    wants("[FILE]"),
	}
	addConfigFlag(cmd, &file)
	o := addFormat(cmd, plainFormats)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, _, err := loadConfig(cmd, file, args)
		if err != nil {
			return err
		}
		h, err := view.ReadKernel(at.view())
		if errors.Is(err, socket.ErrNothingInstalled) {
			h, err = &view.Host{Kernel: &socket.View{}}, nil
		}
		if err != nil {
			return err
		}
		d := h.Diff(c.Services)
		if done, err := o.structured(cmd.OutOrStdout(), d); done {
			return errors.Join(err, changed(d))
		}
		return errors.Join(printDiff(cmd.OutOrStdout(), d), changed(d))
	}
	return cmd
}

func changed(d view.Diff) error {
	if d.Empty() {
		return nil
	}
	return errNo
}

func printDiff(w io.Writer, d view.Diff) error {
	if d.Empty() {
		_, err := fmt.Fprintln(w, "nothing would change")
		return err
	}
	for _, c := range d.Changes {
		fmt.Fprintf(w, "%s %s: %s\n", c.Sign, c.Service, c.What)
	}
	_, err := fmt.Fprintf(w, "%s would be closed\n", view.Count(d.Closes, "connection"))
	return err
}
