// Command pentad is the one program of the project. Every command has a small
// file here: flags in, one call, printing out.
package main

//go:generate go test -run TestDocs . -update

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/host"
)

// Exit codes.
const (
	exitFailed = 1 // the answer is "no", or an operation failed
	exitUsage  = 2 // the command line is wrong
)

// errNo ends a command whose answer is "no" and that has said all there is to say.
var errNo = errors.New("no")

// places are where a command finds pentad on this host.
type places struct {
	pins, runDir string
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	root, started := newRoot()
	err := root.ExecuteContext(ctx)
	stop()
	switch {
	case err == nil:
	case errors.Is(err, errNo):
		os.Exit(exitFailed)
	case !*started:
		fmt.Fprintf(os.Stderr, "pentad: %v; see `pentad --help`\n", err)
		os.Exit(exitUsage)
	default:
		fmt.Fprintf(os.Stderr, "pentad: %v\n", err)
		os.Exit(exitFailed)
	}
}

// newRoot builds the command tree. started becomes true once a command line was
// understood and its command runs.
func newRoot() (root *cobra.Command, started *bool) {
	started = new(bool)
	at := &places{}
	root = &cobra.Command{
		Use:   "pentad",
		Short: "Connections to virtual addresses reach healthy backends, decided inside connect()",
		Long: "pentad translates virtual service addresses to healthy backends inside the kernel's connect().\n" +
			"No packet is rewritten, nothing stands in the data path, and it keeps working when its agent is dead.",
		SilenceUsage:  true,
		SilenceErrors: true,
		PersistentPreRun: func(*cobra.Command, []string) {
			*started = true
		},
	}
	root.PersistentFlags().StringVar(&at.pins, "pins", host.DefaultPins, "directory of the bpf filesystem that holds everything of pentad")
	root.PersistentFlags().StringVar(&at.runDir, "run-dir", api.DefaultRunDir, "directory of the agent's socket")
	root.AddCommand(newRun(at), newController(), newCheck(), newStatus(at), newService(at), newBackend(at), newFlow(at), newExplain(at), newDown(at), newDemo(), newVersion())
	return root, started
}
