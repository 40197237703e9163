package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/pentad/pentad/drops"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/view"
)

func newDrops(at *places) *cobra.Command {
	span := durationValue(5 * time.Second)
	var follow, all bool
	var only string
	cmd := &cobra.Command{
		Use:   "drops",
		Short: "Show packets that the kernel drops, and why",
		Long: "Watch for some seconds which packets the kernel drops, and show why, as it says itself: those from and to VIPs, backends\n" +
			"and pods of this host, in every network namespace, or with --all every one. Many of a kind are one line with their number.\n" +
			"With -f: a line a second for each kind, until interrupted. Nothing is watched while this command does not run.\n" +
			"Linux 5.17 is needed.",
		Example: "  pentad drops\n  pentad drops -f\n  pentad drops --all --for 30s --reason netfilter_drop -o json",
		Args:    wants(),
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on until interrupted")
	cmd.Flags().Var(&span, "for", "how long to watch")
	cmd.Flags().BoolVar(&all, "all", false, "also packets that have nothing to do with pentad")
	cmd.Flags().StringVar(&only, "reason", "", "only for this reason, such as netfilter_drop")
	o := addList(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if follow && cmd.Flags().Changed("for") {
			return misused(cmd, "--for and --follow: one of them")
		}
		ours, err := ownAddresses(at, all)
		if err != nil {
			return err
		}
		c, err := drops.Open(ours, all)
		if err != nil {
			return err
		}
		defer c.Close()
		w := dropWatch{counter: c, only: only, o: o, out: cmd.OutOrStdout(), errOut: cmd.ErrOrStderr()}
		if follow {
			return w.follow(cmd.Context())
		}
		pause(cmd.Context(), time.Duration(span))
		return w.once()
	}
	return cmd
}

// ownAddresses are those of VIPs, backends and pods. With all there need be none.
func ownAddresses(at *places, all bool) ([]netip.Addr, error) {
	if all {
		return nil, nil
	}
	found := make(map[netip.Addr]bool)
	h, err := view.ReadKernel(at.view())
	if err != nil && !errors.Is(err, socket.ErrNothingInstalled) {
		return nil, err
	}
	if err == nil {
		for _, a := range h.Addresses() {
			found[a] = true
		}
	}
	pods, err := view.ReadPods()
	if err != nil {
		return nil, err
	}
	for _, p := range pods {
		for _, a := range p.Addresses {
			found[a] = true
		}
	}
	if len(found) == 0 {
		return nil, errors.New("this host has no services and no pods; --all shows what is dropped of others")
	}
	return slices.Collect(maps.Keys(found)), nil
}

// dropLine is one kind of drops, as it is printed.
type dropLine struct {
	Time      time.Time `json:"time"` // of the last one
	Reason    string    `json:"reason"`
	Words     string    `json:"words,omitempty"`
	Packets   uint64    `json:"packets"`
	Bytes     uint64    `json:"bytes"`
	Protocol  string    `json:"protocol,omitempty"`
	From      string    `json:"from,omitempty"`
	To        string    `json:"to,omitempty"` // with the port, if it has one
	Interface uint32    `json:"interface,omitempty"`
	Namespace uint32    `json:"namespace,omitempty"` // inode of the network namespace
}

// protocols are the names of some (IANA); others are their numbers.
var protocols = map[uint8]string{1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6", 132: "sctp"}

func newDropLine(d drops.Drop) dropLine {
	l := dropLine{Time: d.Last.UTC(), Reason: d.Reason, Words: d.Words, Packets: d.Packets, Bytes: d.Bytes, Interface: d.Interface, Namespace: d.Namespace}
	if !d.From.IsValid() {
		return l
	}
	l.From, l.To = d.From.String(), d.To.String()
	if l.Protocol = protocols[d.Protocol]; l.Protocol == "" {
		l.Protocol = strconv.Itoa(int(d.Protocol))
	}
	if d.Port != 0 {
		l.To = netip.AddrPortFrom(d.To, d.Port).String()
	}
	return l
}

// dropWatch prints what a counter counts.
type dropWatch struct {
	counter     *drops.Counter
	only        string
	o           *output
	out, errOut io.Writer
	homeless    uint64 // that were said
}

// read returns the lines that are wanted. Without limit of their number.
func (w *dropWatch) read() ([]drops.Drop, error) {
	all, err := w.counter.Read()
	if err != nil {
		return nil, err
	}
	_, homeless, err := w.counter.Totals()
	if homeless > w.homeless {
		fmt.Fprintf(w.errOut, "pentad: %d more packets were dropped, of more addresses than there is room for\n", homeless-w.homeless)
		w.homeless = homeless
	}
	return slices.DeleteFunc(all, func(d drops.Drop) bool { return w.only != "" && d.Reason != strings.ToLower(w.only) }), err
}

func (w *dropWatch) once() error {
	all, err := w.read()
	if err != nil {
		return err
	}
	lines := make([]dropLine, len(all))
	for i, d := range all {
		lines[i] = newDropLine(d)
	}
	if done, err := w.o.structured(w.out, lines); done {
		return err
	}
	return w.o.print(w.out, w.head(), w.rows(lines))
}

func (w *dropWatch) head() []string {
	head := []string{"PACKETS", "REASON", "PROTOCOL", "FROM", "TO", "WHAT IT MEANS"}
	if w.o.wide() {
		head = []string{"PACKETS", "REASON", "PROTOCOL", "FROM", "TO", "BYTES", "INTERFACE", "NAMESPACE", "LAST", "WHAT IT MEANS"}
	}
	return head
}

func (w *dropWatch) rows(lines []dropLine) (rows [][]string) {
	for _, l := range lines {
		row := []string{number(l.Packets), l.Reason, or(l.Protocol, "-"), or(l.From, "-"), or(l.To, "-")}
		if w.o.wide() {
			row = append(row, number(l.Bytes), number(l.Interface), number(l.Namespace), l.Time.Local().Format("15:04:05.000"))
		}
		rows = append(rows, append(row, or(l.Words, "-")))
	}
	return rows
}

// follow prints each second what was dropped in it.
func (w *dropWatch) follow(ctx context.Context) error {
	had := make(map[drops.Drop]uint64) // packets, by what is the same each time
	if w.o.format == "table" || w.o.wide() {
		fmt.Fprintf(w.out, dropFormat, "TIME", "PACKETS", "REASON", "PROTOCOL", "FROM", "TO", "WHAT IT MEANS")
	}
	for pause(ctx, time.Second) {
		all, err := w.read()
		if err != nil {
			return err
		}
		for _, d := range all {
			key := d
			key.Packets, key.Bytes, key.Last = 0, 0, time.Time{}
			now := d.Packets
			if d.Packets -= had[key]; d.Packets == 0 {
				continue
			}
			had[key] = now
			if err := w.printOne(newDropLine(d)); err != nil {
				return err
			}
		}
	}
	return nil
}

const dropFormat = "%-12s  %-9s  %-24s  %-8s  %-21s  %-21s  %s\n"

func (w *dropWatch) printOne(l dropLine) error {
	l.Bytes = 0 // of all packets, not of these
	switch w.o.format {
	case "json":
		return writeCompact(w.out, l)
	case "yaml":
		if _, err := io.WriteString(w.out, "---\n"); err != nil {
			return err
		}
		return writeYAML(w.out, l)
	}
	_, err := fmt.Fprintf(w.out, dropFormat, l.Time.Local().Format("15:04:05.000"), number(l.Packets), l.Reason, or(l.Protocol, "-"), or(l.From, "-"), or(l.To, "-"), or(l.Words, "-"))
	return err
}
