package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/view"
)

func newProxy(at *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "proxy",
		Aliases: []string{"proxies"},
		Short:   "Show the proxies of this host",
	}
	cmd.AddCommand(newProxyList(at))
	return cmd
}

func newProxyList(at *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the proxies of this host and what they have done",
		Long: "List the proxies of this host and what they have done since the agent has them. Proxies are the agent's: this\n" +
			"asks it. `pentad flow --proxy NAME` shows who is connected where.",
		Example: "  pentad proxy list\n  pentad proxy list -o json",
		Args:    wants(),
	}
	o := addList(cmd)
	watch := addWatch(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return watch.run(cmd, func(w io.Writer) error {
			all, err := api.NewClient(at.runDir).Proxies(cmd.Context())
			if err != nil {
				return err
			}
			if done, err := o.structured(w, all); done {
				return err
			}
			var rows [][]string
			for _, p := range all {
				rows = append(rows, []string{
					p.Name, strings.Join(p.Protocols, ", "), listens(p), fmt.Sprint(p.Open), number(p.Connections), number(p.Failed),
					view.Bytes(p.Sent), view.Bytes(p.Received),
				})
			}
			return o.print(w, []string{"PROXY", "PROTOCOL", "LISTEN", "OPEN", "CONNECTIONS", "FAILED", "SENT", "RECEIVED"}, rows)
		})
	}
	return cmd
}

// listens says where a proxy listens, and where it should and does not.
func listens(p api.Proxy) string {
	texts := make([]string, len(p.Listen))
	for i, at := range p.Listen {
		texts[i] = at
		for _, m := range p.Missing {
			if m == at {
				texts[i] += " (not now)"
			}
		}
	}
	return strings.Join(texts, ", ")
}
