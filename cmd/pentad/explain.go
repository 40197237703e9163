package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"

	"github.com/spf13/cobra"

	"github.com/pentad/pentad/flow"
	"github.com/pentad/pentad/view"
)

func newExplain(at *places) *cobra.Command {
	var pid pidValue
	var from string
	cmd := &cobra.Command{
		Use:   "explain DEST[:PORT][/tcp|udp]",
		Short: "Explain what becomes of a connection, step by step",
		Long: "Walk through the decision for a destination, and with --pid a process, as the kernel would take it now, and end\n" +
			"with one sentence that says what happens and, when it is not what people expect, why and what to do. With --from the\n" +
			"connection is one whose packets arrive from an address: that of another host, or of a pod of this one. Without a\n" +
			"port every listener of the address is explained, and of a service, by its name, every listener that it has.\n" +
			"Exit code 0: the connection reaches a backend; 1: it does not; 2: the question makes no sense.",
		Example: "  pentad explain 10.96.0.10:3306\n  pentad explain orders-db\n  pentad explain --pid 4711 10.96.0.53:53/udp\n" +
			"  pentad explain --from 198.51.100.7 203.0.113.10:443",
		Args:              wants("DEST[:PORT][/tcp|udp]"),
		ValidArgsFunction: completeServices(at),
	}
	cmd.Flags().Var(&pid, "pid", "the process that connects")
	cmd.Flags().StringVar(&from, "from", "", "the address from which packets arrive")
	o := addFormat(cmd, plainFormats)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if cmd.Flags().Changed("pid") && cmd.Flags().Changed("from") {
			return misused(cmd, "--pid is for connections of a process and --from for packets from elsewhere: one of them")
		}
		var client netip.Addr
		if cmd.Flags().Changed("from") {
			a, err := netip.ParseAddr(from)
			if err != nil {
				return misused(cmd, "--from: %q is no address; want one such as 198.51.100.7", from)
			}
			client = a.Unmap()
		}
		e, err := view.NewExplainer(cmd.Context(), at.view(), client)
		if err != nil {
			return err
		}
		questions, err := e.Questions(args[0])
		if err != nil {
			return misused(cmd, "%v", err)
		}
		all := make([]*flow.Explanation, len(questions))
		works := true
		for i, q := range questions {
			q.PID = int(pid)
			if all[i], err = e.Explain(q); errors.Is(err, flow.ErrNoProcess) {
				return misused(cmd, "--pid: no such process: %d", pid)
			} else if err != nil {
				return err
			}
			works = works && all[i].Works
		}
		done, err := o.structured(cmd.OutOrStdout(), all)
		if !done {
			err = printExplanations(cmd.OutOrStdout(), all)
		}
		if err == nil && !works {
			err = errNo
		}
		return err
	}
	return cmd
}

func printExplanations(w io.Writer, all []*flow.Explanation) error {
	for i, e := range all {
		if i > 0 {
			fmt.Fprintln(w)
		}
		rows := make([][]string, len(e.Steps))
		for i, s := range e.Steps {
			rows[i] = []string{s.What, s.Found}
		}
		if err := wrapped(w, rows); err != nil {
			return err
		}
		if _, err := fmt.Fprintf(w, "=> %s\n", e.Conclusion); err != nil {
			return err
		}
	}
	return nil
}
