package main

import (
	"io"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pentad/pentad/view"
)

func newPod() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "pod",
		Aliases: []string{"pods"},
		Short:   "Show the pods of this host that pentad connects",
	}
	cmd.AddCommand(newPodList())
	return cmd
}

func newPodList() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the pods of this host, their addresses and devices",
		Long:    "List the pods of this host that have a device of the plugin pentad-cni, as the kernel has them: with the agent dead as well.",
		Example: "  pentad pod list\n  pentad pod list -o json",
		Args:    wants(),
	}
	o := addList(cmd)
	watch := addWatch(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return watch.run(cmd, func(w io.Writer) error {
			all, err := view.ReadPods()
			if err != nil {
				return err
			}
			if done, err := o.structured(w, all); done {
				return err
			}
			var rows [][]string
			for _, p := range all {
				addresses := make([]string, len(p.Addresses))
				for i, a := range p.Addresses {
					addresses[i] = a.String()
				}
				rows = append(rows, []string{or(p.Pod, "-"), p.Container, strings.Join(addresses, ", "), p.Device, p.IfName, strconv.Itoa(p.MTU)})
			}
			return o.print(w, []string{"POD", "CONTAINER", "ADDRESSES", "DEVICE", "IN-POD", "MTU"}, rows)
		})
	}
	return cmd
}
