package main

import (
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/flow"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
)

func newExplain(at *places) *cobra.Command {
	var pid int
	var from string
	cmd := &cobra.Command{
		Use:   "explain DEST[:PORT][/tcp|udp]",
		Short: "Explain what becomes of a connection, step by step",
		Long: "Walk through the decision for a destination, and with --pid a process, as the kernel would take it now, and end\n" +
			"with one sentence that says what happens and, when it is not what people expect, why and what to do. With --from the\n" +
			"connection is one whose packets arrive from an address: that of another host, or of a guest of this one. Without a\n" +
			"port every listener of the address is explained. Exit code 0: the connection reaches a backend; 1: it does not.",
		Example: "  pentad explain 10.96.0.10:3306\n  pentad explain --pid 4711 10.96.0.53:53/udp\n  pentad explain --from 198.51.100.7 203.0.113.10:443",
		Args:    cobra.ExactArgs(1),
	}
	cmd.Flags().IntVar(&pid, "pid", 0, "the process that connects")
	cmd.Flags().StringVar(&from, "from", "", "the address from which packets arrive")
	cmd.MarkFlagsMutuallyExclusive("pid", "from")
	f := addFormat(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		packets, err := readPackets()
		if err != nil {
			return err
		}
		var explain func(flow.Question) (*flow.Explanation, error)
		owners := make(map[service.Listener][]string)
		for _, m := range packets.Mappings {
			owners[m.Listener.At()] = append(owners[m.Listener.At()], m.Service)
		}
		if from != "" {
			client, err := netip.ParseAddr(from)
			if err != nil {
				return fmt.Errorf("--from %q is no address; want one such as 198.51.100.7", from)
			}
			explain = func(q flow.Question) (*flow.Explanation, error) {
				return flow.ExplainPackets(packets, client.Unmap(), q), nil
			}
		} else {
			v, err := socket.Read(at.pins)
			if err != nil {
				return err
			}
			for _, s := range v.Services {
				for _, l := range s.Listeners {
					owners[l.At()] = append(owners[l.At()], s.Name)
				}
			}
			explain = func(q flow.Question) (*flow.Explanation, error) {
				q.PID = pid
				e, err := flow.Explain(v, q)
				if err == nil {
					e.AddPackets(packets, q)
				}
				return e, err
			}
		}
		questions, err := parseDestination(slices.Collect(maps.Keys(owners)), args[0])
		if err != nil {
			return err
		}
		var warnings []string
		// With the agent dead what the kernel does can be explained all the same.
		if running, err := api.NewClient(at.runDir).Status(cmd.Context()); err == nil {
			warnings = running.Warnings
		}
		all := make([]*flow.Explanation, len(questions))
		works := true
		for i, q := range questions {
			if all[i], err = explain(q); err != nil {
				return err
			}
			all[i].AddWarnings(q, owners[service.Listener{Address: q.Destination, Protocol: q.Protocol}], warnings)
			works = works && all[i].Works
		}
		done, err := f.structured(cmd.OutOrStdout(), all)
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

// parseDestination reads a destination. An address alone asks for each of its
// listeners.
func parseDestination(listeners []service.Listener, text string) ([]flow.Question, error) {
	dest, protocol, named := strings.Cut(text, "/")
	q := flow.Question{Protocol: service.TCP}
	switch {
	case !named || protocol == "tcp":
	case protocol == "udp":
		q.Protocol = service.UDP
	default:
		return nil, fmt.Errorf("%q: want protocol tcp or udp, found %q", text, protocol)
	}
	var err error
	if q.Destination, err = netip.ParseAddrPort(dest); err == nil {
		q.Destination = netip.AddrPortFrom(q.Destination.Addr().Unmap(), q.Destination.Port())
		return []flow.Question{q}, nil
	}
	addr, err := netip.ParseAddr(strings.Trim(dest, "[]"))
	if err != nil {
		return nil, fmt.Errorf("%q is no destination; want ADDRESS:PORT, such as 10.96.0.10:3306 or [2001:db8::10]:53/udp; names are not resolved", text)
	}
	slices.SortFunc(listeners, service.Listener.Compare)
	var all []flow.Question
	for _, l := range listeners {
		if l.Address.Addr() == addr.Unmap() && (!named || l.Protocol == q.Protocol) {
			all = append(all, flow.Question{Destination: l.Address, Protocol: l.Protocol})
		}
	}
	if all == nil {
		return nil, fmt.Errorf("no service listens on %s; name a port to have a connection explained all the same", addr)
	}
	return all, nil
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
		if err := table(w, rows); err != nil {
			return err
		}
		if _, err := fmt.Fprintf(w, "=> %s\n", e.Conclusion); err != nil {
			return err
		}
	}
	return nil
}
