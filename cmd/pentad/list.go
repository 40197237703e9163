package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/pentad/pentad/service"
	"github.com/pentad/pentad/view"
)

// serviceFilter leaves one service of all.
type serviceFilter struct{ name string }

// addService gives a command the flag --service.
func addService(cmd *cobra.Command, at *places) *serviceFilter {
	f := &serviceFilter{}
	cmd.Flags().StringVar(&f.name, "service", "", "only this service")
	// The flag was just defined: this cannot fail.
	_ = cmd.RegisterFlagCompletionFunc("service", completeServices(at))
	return f
}

// filtered is the check of arguments of a list: which lines are wanted is said by flags.
func filtered(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return misused(cmd, "%q is one argument too many; did you mean --service %s?", args[0], args[0])
	}
	return nil
}

// of returns the services that are wanted.
func (f *serviceFilter) of(h *view.Host) ([]view.Service, error) {
	all, name := h.Services(), f.name
	if name == "" {
		return all, nil
	}
	some := slices.DeleteFunc(all, func(s view.Service) bool { return s.Name != name })
	if len(some) == 0 {
		return nil, noService(h, name)
	}
	return some, nil
}

// stateFilter leaves backends in some states.
type stateFilter struct{ words string }

// addState gives a command the flag --state.
func addState(cmd *cobra.Command) *stateFilter {
	f := &stateFilter{}
	cmd.Flags().StringVar(&f.words, "state", "", "only backends in these states, separated by commas: "+strings.Join(stateWords(), ", "))
	return f
}

func stateWords() []string {
	var words []string
	for _, s := range service.EachState {
		words = append(words, s.String())
	}
	return words
}

func (f *stateFilter) of(cmd *cobra.Command, all []view.Backend) ([]view.Backend, error) {
	if f.words == "" {
		return all, nil
	}
	wanted := strings.Split(f.words, ",")
	for _, w := range wanted {
		if !slices.Contains(stateWords(), w) {
			return nil, misused(cmd, "--state: %q is no state of a backend%s", w, service.Nearest(w, stateWords()))
		}
	}
	return slices.DeleteFunc(all, func(b view.Backend) bool { return !slices.Contains(wanted, b.State) }), nil
}

// watcher shows something again and again.
type watcher struct {
	on    bool
	every durationValue
}

// addWatch gives a command the flag --watch.
func addWatch(cmd *cobra.Command) *watcher {
	w := &watcher{every: durationValue(2 * time.Second)}
	cmd.Flags().BoolVarP(&w.on, "watch", "w", false, "show it again every two seconds until interrupted")
	return w
}

// run shows once, or until the context ends. On a terminal it stays in its place.
func (w *watcher) run(cmd *cobra.Command, show func(io.Writer) error) error {
	out := cmd.OutOrStdout()
	if !w.on {
		return show(out)
	}
	_, isTerminal := terminal(out)
	for {
		var screen bytes.Buffer
		target := io.Writer(&screen)
		if isTerminal {
			// Clear it and begin at its top (ECMA-48).
			fmt.Fprint(out, "\x1b[2J\x1b[H")
			target = out
		}
		if err := show(target); err != nil {
			return err
		}
		if _, err := out.Write(screen.Bytes()); err != nil {
			return err
		}
		if !pause(cmd.Context(), time.Duration(w.every)) {
			return nil
		}
	}
}

func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}
