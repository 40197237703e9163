package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/flow"
	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
	"github.com/pentad/pentad/view"
)

func newFlow(at *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "flow",
		Aliases: []string{"flows"},
		Short:   "Show which process is connected where, or follow connections as they come and go",
		Long: "Show the connections through VIPs that are open now: process, VIP, backend, round trip time, age and bytes.\n" +
			"With -f: follow connections as they begin, succeed, fail and end. Both read the kernel and work with the agent\n" +
			"dead. Events that come faster than they can be shown are counted, and the count is shown.\n" +
			"Clients of the agent's proxies are shown, too: their proxy as SERVICE, their target as VIP, and by which\n" +
			"upstreams they go, or direct, as BACKEND.",
		Example: "  pentad flow\n  pentad flow -f --service orders-db\n  pentad flow --proxy out\n  pentad flow -f -o json",
		Args:    wants(),
	}
	var follow bool
	var want filter
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "follow connections until interrupted")
	cmd.Flags().StringVar(&want.service, "service", "", "only of this service")
	cmd.Flags().Var(&want.pid, "pid", "only of this process")
	cmd.Flags().StringVar(&want.proxy, "proxy", "", "only of clients of this proxy or forward")
	// The flag was just defined: this cannot fail.
	_ = cmd.RegisterFlagCompletionFunc("service", completeServices(at))
	o := addList(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := want.check(cmd, at); err != nil {
			return err
		}
		if follow {
			return followFlows(cmd.Context(), at, want, o, cmd.OutOrStdout(), cmd.ErrOrStderr())
		}
		return listFlows(cmd.Context(), at, want, o, cmd.OutOrStdout(), cmd.ErrOrStderr())
	}
	return cmd
}

// filter says which flows are wanted; zero fields say nothing.
type filter struct {
	service string
	pid     pidValue
	proxy   string
}

func (w filter) wants(f view.Flow) bool {
	return (w.service == "" || f.Service == w.service) && (w.pid == 0 || f.PID == int(w.pid)) && (w.proxy == "" || f.Proxy == w.proxy)
}

// check refuses what no flow can be of.
func (w filter) check(cmd *cobra.Command, at *places) error {
	if w.pid != 0 {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", w.pid)); errors.Is(err, os.ErrNotExist) {
			return misused(cmd, "--pid: no such process: %d", w.pid)
		}
	}
	if w.proxy != "" {
		if err := w.checkProxy(cmd.Context(), at); err != nil {
			return err
		}
	}
	if w.service == "" {
		return nil
	}
	h, err := view.ReadKernel(at.view())
	if err != nil {
		return err
	}
	if !slices.Contains(h.Names(), w.service) {
		return noService(h, w.service)
	}
	return nil
}

// checkProxy refuses a name that neither a proxy nor a forward has.
func (w filter) checkProxy(ctx context.Context, at *places) error {
	agent := api.NewClient(at.runDir)
	proxies, err := agent.Proxies(ctx)
	if err != nil {
		return err
	}
	forwards, err := agent.Forwards(ctx)
	if err != nil {
		return err
	}
	var names []string
	for _, p := range proxies {
		names = append(names, p.Name)
	}
	for _, f := range forwards {
		names = append(names, f.Name)
	}
	if slices.Contains(names, w.proxy) {
		return nil
	}
	return fmt.Errorf("there is no proxy or forward %s%s; `pentad proxy list` and `pentad forward list` show them", w.proxy, service.Nearest(w.proxy, names))
}

func listFlows(ctx context.Context, at *places, want filter, o *output, out, errOut io.Writer) error {
	flows, err := flow.Open(ctx, at.pins)
	if flows == nil && err != nil {
		return err
	}
	if err != nil {
		fmt.Fprintf(errOut, "pentad: %v\n", err)
	}
	all := []view.Flow{}
	for _, x := range flows {
		if f := view.NewFlow(x); want.wants(f) {
			all = append(all, f)
		}
	}
	// Without an agent there is no proxy.
	proxied, _ := api.NewClient(at.runDir).ProxyFlows(ctx)
	for _, x := range proxied {
		if f := view.NewProxyFlow(x); want.wants(f) {
			all = append(all, f)
		}
	}
	if done, err := o.structured(out, all); done {
		return err
	}
	head := []string{"PROCESS", "CLIENT", "SERVICE", "VIP", "BACKEND", "RTT", "AGE", "SENT", "RECEIVED", "OUTCOME"}
	if o.wide() {
		head = append(head, "UID", "CGROUP", "BEGAN")
	}
	var rows [][]string
	for _, x := range all {
		row := []string{
			process(x), or(x.Client, "-"), serviceOf(x), address(toOf(x), x.Protocol), byOf(x), or(view.Latency(x.RTTSeconds), "-"), view.Ago(x.Time),
			bytesOr(x.Sent), bytesOr(x.Received), x.Outcome,
		}
		if o.wide() {
			row = append(row, uidOr(x.UID), or(x.Cgroup, "-"), x.Time.Local().Format("2006-01-02T15:04:05.000Z07:00"))
		}
		rows = append(rows, row)
	}
	return o.print(out, head, rows)
}

// serviceOf, toOf and byOf are what stands in the columns SERVICE, VIP and BACKEND.
func serviceOf(f view.Flow) string { return or(f.Service, or(f.Proxy, "-")) }

func toOf(f view.Flow) string { return or(f.VIP, or(f.Target, "-")) }

func byOf(f view.Flow) string { return or(f.Backend, or(strings.Join(f.Via, ", "), "-")) }

func process(f view.Flow) string {
	switch {
	case f.User != "":
		return "user " + f.User
	case f.PID == 0:
		return "-"
	}
	return f.Command + "/" + strconv.Itoa(f.PID)
}

// address tells an address of UDP from one of TCP.
func address(text, protocol string) string {
	if protocol == "tcp" {
		return text
	}
	return text + "/" + protocol
}

func uidOr(uid *uint32) string {
	if uid == nil {
		return "-"
	}
	return number(*uid)
}

func bytesOr(n *uint64) string {
	if n == nil {
		return "-"
	}
	return view.Bytes(*n)
}

// lostEvery is how often it is said that events were lost.
const lostEvery = time.Second

func followFlows(ctx context.Context, at *places, want filter, o *output, out, errOut io.Writer) error {
	follower, err := socket.Follow(at.pins)
	if err != nil {
		return err
	}
	defer follower.Close()
	// Every line leaves some strings behind, and a collection takes time that events do
	// not wait for: memory is the cheaper of both.
	debug.SetGCPercent(800)
	lines := newLateWriter(out)
	show := oneAtATime(flowPrinter(o, lines))
	tracker := flow.NewTracker()
	tracker.Agent, tracker.Whose = host.Holder(at.pins), o.format != "table"
	var told uint64
	var lapsed time.Duration
	var failed error
	tellLost := func() {
		if n := follower.Lost(); n > told {
			fmt.Fprintf(errOut, "pentad: %d events were lost: they came faster than they could be shown\n", n-told)
			told = n
		}
		if d := follower.Lapsed(); d > lapsed {
			fmt.Fprintf(errOut, "pentad: nothing was followed for %s: this command did not run, and what happened meanwhile is not shown\n",
				(d - lapsed).Round(100*time.Millisecond))
			lapsed = d
		}
	}
	ctx, stop := context.WithCancel(ctx)
	var proxies sync.WaitGroup
	defer proxies.Wait()
	defer stop()
	proxies.Go(func() { followProxies(ctx, at, want, show) })
	checked := time.Now()
	err = follower.Run(ctx, func(e socket.Event) {
		if f := view.NewFlow(tracker.Note(e)); want.wants(f) && failed == nil {
			if failed = show(f); failed != nil {
				stop()
			}
		}
		if e.Time.Sub(checked) > lostEvery {
			tellLost()
			checked, tracker.Agent = e.Time, host.Holder(at.pins)
		}
	})
	tellLost()
	if errors.Is(err, socket.ErrNothingInstalled) {
		return fmt.Errorf("%w any more", err)
	}
	return cmp.Or(err, failed, lines.Flush())
}

// followProxies shows the clients of the agent's proxies, of whichever agent runs.
func followProxies(ctx context.Context, at *places, want filter, show func(view.Flow) error) {
	for {
		_ = api.NewClient(at.runDir).FollowProxies(ctx, func() {}, func(x api.ProxyFlow) {
			if f := view.NewProxyFlow(x); want.wants(f) {
				_ = show(f) // what is wrong with the output the other follower meets with, too
			}
		})
		if !pause(ctx, time.Second) {
			return
		}
	}
}

// oneAtATime has only one flow at a time be shown.
func oneAtATime(show func(view.Flow) error) func(view.Flow) error {
	var mu sync.Mutex
	return func(f view.Flow) error {
		mu.Lock()
		defer mu.Unlock()
		return show(f)
	}
}

// flowPrinter returns a function that prints one flow. What programs read is one
// document a flow.
func flowPrinter(o *output, out io.Writer) func(view.Flow) error {
	switch o.format {
	case "json":
		e := json.NewEncoder(out)
		e.SetEscapeHTML(false)
		return func(f view.Flow) error { return e.Encode(f) }
	case "yaml":
		return func(f view.Flow) error {
			if _, err := io.WriteString(out, "---\n"); err != nil {
				return err
			}
			return writeYAML(out, f)
		}
	}
	const line = "%-12s  %-11s  %-20s  %-20s  %-21s  %-21s  %-8s  %-10s  %-9s  %-9s  %s\n"
	more := func(texts ...string) string {
		if !o.wide() {
			return ""
		}
		return "  " + strings.Join(texts, "  ")
	}
	if !o.noHeaders {
		fmt.Fprintf(out, line, "TIME", "EVENT", "PROCESS", "SERVICE", "VIP", "BACKEND", "RTT", "DURATION", "SENT", "RECEIVED", "OUTCOME"+more("UID", "CGROUP"))
	}
	return func(f view.Flow) error {
		outcome := f.Outcome
		if outcome == f.Event {
			outcome = "-"
		}
		_, err := fmt.Fprintf(out, line, f.Time.Local().Format("15:04:05.000"), f.Event, process(f), serviceOf(f), address(toOf(f), f.Protocol),
			byOf(f), or(view.Latency(f.RTTSeconds), "-"), or(view.Latency(f.DurationSeconds), "-"), bytesOr(f.Sent), bytesOr(f.Received), outcome+more(uidOr(f.UID), or(f.Cgroup, "-")))
		return err
	}
}
