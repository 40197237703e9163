package main

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/pentad/pentad/api"
)

func newAnnouncement(at *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "announcement",
		Aliases: []string{"announcements", "announce"},
		Short:   "Show what the network is told of VIPs",
	}
	cmd.AddCommand(newAnnouncementList(at), newAnnouncementPeers(at))
	return cmd
}

func newAnnouncementList(at *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the VIPs that the network may be told of, who is told, and why others are not",
		Long: "List the VIPs that the network may be told of: those of services with `forward` nat or direct. A VIP is announced\n" +
			"only while a backend of its service is usable and the kernel of this host forwards its packets.",
		Example: "  pentad announcement list\n  pentad announcement list -o json",
		Args:    wants(),
	}
	o := addList(cmd)
	watch := addWatch(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return watch.run(cmd, func(w io.Writer) error {
			all, err := api.NewClient(at.runDir).Announcements(cmd.Context())
			if err != nil {
				return err
			}
			if done, err := o.structured(w, all.VIPs); done {
				return err
			}
			var rows [][]string
			for _, v := range all.VIPs {
				rows = append(rows, []string{v.Address.String(), strings.Join(v.Services, ", "), or(strings.Join(v.To, ", "), "-"), or(whyNot(v), "-")})
			}
			return o.print(w, []string{"VIP", "SERVICES", "TO", "WHY NOT"}, rows)
		})
	}
	return cmd
}

// whyNot says why a VIP is not announced, or not to all.
func whyNot(v api.AnnouncedVIP) string {
	if v.Missing != "" {
		return v.Missing
	}
	return strings.Join(v.NotTo, "; ")
}

func newAnnouncementPeers(at *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "peers",
		Short:   "List the routers that are told of VIPs, and how their sessions are",
		Example: "  pentad announcement peers\n  pentad announcement peers -o json",
		Args:    wants(),
	}
	o := addList(cmd)
	watch := addWatch(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return watch.run(cmd, func(w io.Writer) error {
			all, err := api.NewClient(at.runDir).Announcements(cmd.Context())
			if err != nil {
				return err
			}
			if done, err := o.structured(w, all.Peers); done {
				return err
			}
			var rows [][]string
			for _, p := range all.Peers {
				rows = append(rows, []string{
					p.Address, strconv.FormatUint(uint64(p.AS), 10), p.State, sinceWhen(p.Since), strconv.Itoa(p.Prefixes), bfdOf(p.BFD), or(p.Why, "-"),
				})
			}
			return o.print(w, []string{"PEER", "AS", "STATE", "SINCE", "PREFIXES", "BFD", "WHY"}, rows)
		})
	}
	return cmd
}

func bfdOf(p *api.BFDPeer) string {
	if p == nil {
		return "-"
	}
	if p.Why != "" {
		return fmt.Sprintf("%s (%s)", p.State, p.Why)
	}
	return p.State
}

func sinceWhen(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.Local().Format(time.DateTime)
}
