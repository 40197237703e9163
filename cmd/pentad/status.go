package main

import (
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/plane/nat"
	"github.com/pentad/pentad/service"
	"github.com/pentad/pentad/view"
)

func newStatus(at *places) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show on one screen whether all is well",
		Long: "Show on one screen whether all is well. Exit code 0: the agent runs, every hook is attached, the newest\n" +
			"configuration is in force; 1: something of this is not so, and the last lines say what. Backends that\n" +
			"are down are a fact, not a failure of pentad.",
		Example: "  pentad status\n  pentad status -o json",
		Args:    wants(),
	}
	o := addFormat(cmd, plainFormats)
	watch := addWatch(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		healthy := true
		err := watch.run(cmd, func(w io.Writer) error {
			s, err := view.ReadStatus(cmd.Context(), at.view())
			if err != nil {
				return err
			}
			healthy = s.Healthy
			if done, err := o.structured(w, s); done {
				return err
			}
			return printStatus(w, s)
		})
		if err == nil && !healthy {
			err = errNo
		}
		return err
	}
	return cmd
}

func printStatus(w io.Writer, s *view.Status) error {
	rows := [][]string{{"agent", "not running"}}
	if a := s.Agent; a != nil {
		file := a.Config.File
		if abs, err := filepath.Abs(file); err == nil && filepath.IsAbs(file) {
			file = abs
		}
		rows = [][]string{
			{"agent", fmt.Sprintf("running, version %s, process %d, for %s", a.Version, a.PID, view.Ago(a.Started))},
			{"configuration", fmt.Sprintf("%s, revision %d, read %s ago", file, a.Revision, view.Ago(a.Config.Loaded))},
			{"probes", fmt.Sprintf("%s, %d done", view.Count(a.Probes.Targets, "backend"), a.Probes.Done)},
		}
		if a.Config.Loaded.IsZero() {
			rows[1][1] = file + ", none in force yet"
		}
		if c := a.Cluster; c != nil {
			rows = append(rows, []string{"cluster", clusterText(c)})
		}
		if f := a.Fleet; f != nil {
			rows = append(rows, []string{"fleet", fleetText(f)})
		}
		if b := a.Blocks; b != nil {
			rows = append(rows, []string{"pod addresses", blocksText(b)})
		}
	}
	if s.Kernel == nil {
		rows = append(rows, []string{"kernel", "nothing installed"})
	} else {
		rows = append(rows, kernelRows(s)...)
	}
	for _, p := range s.Warnings {
		rows = append(rows, []string{"warning", strings.ReplaceAll(p, "\n", "\n\t")})
	}
	for _, p := range s.Problems {
		rows = append(rows, []string{"PROBLEM", strings.ReplaceAll(p, "\n", "\n\t")})
	}
	return wrapped(w, rows)
}

func clusterText(c *api.Cluster) string {
	text := fmt.Sprintf("node %s, %s, last change %s ago", c.Node, view.Count(c.Services, "service"), view.Ago(c.Changed))
	if c.Changed.IsZero() {
		text = "node " + c.Node
	}
	if !c.Away.IsZero() {
		text += fmt.Sprintf("; the API server has not answered for %s", view.Ago(c.Away))
	}
	if c.Why != "" {
		text += ": " + c.Why
	}
	if len(c.Untracked) > 0 {
		text += fmt.Sprintf("; connections between pods (%s) are not tracked", firstFew(c.Untracked))
	}
	if c.Leaving {
		text += "; the node is being deleted"
	}
	return text
}

func kernelRows(s *view.Status) [][]string {
	attached, memory := 0, uint64(0)
	for _, ok := range s.Kernel.Hooks {
		if ok {
			attached++
		}
	}
	for _, n := range s.Kernel.MemoryBytes {
		memory += n
	}
	var states []string
	for _, state := range service.EachState {
		if n := s.Backends[state.String()]; n > 0 {
			states = append(states, fmt.Sprintf("%d %s", n, state))
		}
	}
	if len(states) == 0 {
		states = []string{"none"}
	}
	c := s.Connections
	rows := [][]string{
		{"hooks", fmt.Sprintf("%d of %d attached", attached, len(s.Kernel.Hooks))},
		{"services", fmt.Sprintf("%d with %s", s.Services, view.Count(s.Listeners, "listener"))},
		{"backends", strings.Join(states, ", ")},
		{"connections", fmt.Sprintf("%d open, %d translated, %d refused, %d reset", c.InFlight, c.Translated, c.Refused, c.Reset)},
		{"kernel memory", view.Bytes(memory)},
	}
	if s.Agent != nil && s.Agent.MemoryLimit > 0 {
		rows = append(rows, []string{"memory limit", view.Bytes(s.Agent.MemoryLimit) + ": what the kernel keeps of UDP sockets of others counts in it"})
	}
	if s.Packets {
		rows = append(rows, []string{"packets", "from elsewhere are served by the table inet " + nat.TableName})
	}
	if n := len(s.Ejected); n > 0 {
		rows = append(rows, []string{"ejected", fmt.Sprintf("%s by failed connects: %s", view.Count(n, "backend"), firstFew(s.Ejected))})
	}
	if c.Leaving > 0 {
		rows = append(rows, []string{"leaving", fmt.Sprintf("%s to backends that were removed", view.Count(c.Leaving, "connection"))})
	}
	if n := len(s.Refusing); n > 0 {
		text := fmt.Sprintf("%s without a backend that takes connections: %s", view.Count(n, "listener"), firstFew(s.Refusing))
		if n > few {
			text += "; `pentad service list --refusing` shows all"
		}
		rows = append(rows, []string{"refusing", text})
	}
	return rows
}

// few is how many names a row of the status has.
const few = 5

func firstFew[T any](all []T) string {
	var names []string
	for i, one := range all {
		if i == few {
			names = append(names, "...")
			break
		}
		names = append(names, fmt.Sprint(one))
	}
	return strings.Join(names, ", ")
}

func blocksText(b *api.Blocks) string {
	text := fmt.Sprintf("%s of this host, %d of all hosts", view.Count(len(b.Own), "block"), b.All)
	if len(b.Own) > 0 {
		text += ": " + joined(b.Own)
	}
	if !b.Away.IsZero() {
		text += fmt.Sprintf("; where blocks are claimed is away for %s: %s", view.Ago(b.Away), b.Why)
	}
	return text
}

func fleetText(f *api.Fleet) string {
	text := view.Count(f.Services, "service")
	if !f.Changed.IsZero() {
		text += fmt.Sprintf(", last change %s ago", view.Ago(f.Changed))
	}
	if !f.Away.IsZero() {
		text += fmt.Sprintf("; etcd is away for %s: %s", view.Ago(f.Away), f.Why)
	} else if f.Why != "" {
		text += "; " + f.Why
	}
	return text
}
