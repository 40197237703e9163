package main

import (
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/view"
)

func newPod(at *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "pod",
		Aliases: []string{"pods"},
		Short:   "Show the pods of this host that pentad connects, and the blocks of addresses of all hosts",
	}
	cmd.AddCommand(newPodList(), newPodBlocks(at), newPodRelease(at))
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

func newPodBlocks(at *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "blocks",
		Short: "List the blocks of addresses that hosts have claimed for their pods",
		Long: "List the blocks of addresses that hosts have claimed of pods.ranges, as the agent knows them: whose they are, and how\n" +
			"many addresses pods have, of those of this host.",
		Example: "  pentad pod blocks\n  pentad pod blocks -o json",
		Args:    wants(),
	}
	o := addList(cmd)
	watch := addWatch(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return watch.run(cmd, func(w io.Writer) error {
			all, err := api.NewClient(at.runDir).Blocks(cmd.Context())
			if err != nil {
				return err
			}
			if done, err := o.structured(w, all); done {
				return err
			}
			var rows [][]string
			for _, b := range all {
				used, state := "-", "owned"
				if b.Used != nil {
					used = strconv.Itoa(*b.Used)
				}
				if b.Draining {
					state = "draining"
				}
				whose := or(b.Host, "nobody can tell")
				if b.Own {
					whose += " (this host)"
				}
				rows = append(rows, []string{joined(b.Prefixes), whose, or(joined(b.Addresses), "-"), used, state})
			}
			return o.print(w, []string{"BLOCK", "HOST", "AT", "USED", "STATE"}, rows)
		})
	}
	return cmd
}

func joined[T fmt.Stringer](all []T) string {
	texts := make([]string, len(all))
	for i, x := range all {
		texts[i] = x.String()
	}
	return strings.Join(texts, ", ")
}

func newPodRelease(at *places) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "release BLOCK",
		Short: "Free a block of addresses of a host that is gone",
		Long: "Free a block of addresses of a host that is gone for good. A host that still runs gives its blocks back by itself,\n" +
			"when no pod has an address of them; to take one from it has two hosts use the same addresses. That is why it\n" +
			"needs --force. In a cluster the controller does it when the Node has been gone for ten minutes.",
		Example: "  pentad pod release 10.244.3.64/26 --force",
		Args:    wants("BLOCK"),
	}
	cmd.Flags().BoolVar(&force, "force", false, "the host is gone, and will not come back with these addresses")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		name, err := netip.ParsePrefix(args[0])
		if err != nil {
			return misused(cmd, "%q is not a block such as 10.244.3.64/26; `pentad pod blocks` lists them", args[0])
		}
		if !force {
			return misused(cmd, "a block is taken only from a host that is gone for good; if it is: --force")
		}
		b, err := api.NewClient(at.runDir).ReleaseBlock(cmd.Context(), api.ReleaseRequest{Block: name.Masked()})
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s is free; it was that of %s\n", joined(b.Prefixes), or(b.Host, "nobody"))
		return err
	}
	return cmd
}
