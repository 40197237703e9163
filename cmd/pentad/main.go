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
	"github.com/pentad/pentad/view"
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
	pins, runDir, stateDir string
}

// defaultStateDir is where it stands what outlives a restart of the host.
const defaultStateDir = "/var/lib/pentad"

// state returns the directory for what outlives a restart of the host. A second agent,
// which has a directory of its own for its socket, keeps it there.
func (p *places) state() string {
	switch {
	case p.stateDir != "":
		return p.stateDir
	case p.runDir != api.DefaultRunDir:
		return p.runDir
	}
	return defaultStateDir
}

func (p *places) view() view.Places { return view.Places{Pins: p.pins, RunDir: p.runDir} }

func main() {
	ctx, stop := notified(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := execute(ctx, os.Args[1:])
	stop()
	os.Exit(err)
}

// notified returns a context that ends with a signal, which is its cause.
func notified(ctx context.Context, signals ...os.Signal) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	c := make(chan os.Signal, 1)
	signal.Notify(c, signals...)
	go func() {
		select {
		case s := <-c:
			cancel(fmt.Errorf("signal: %v", s))
		case <-ctx.Done():
		}
	}()
	return ctx, func() {
		signal.Stop(c)
		cancel(context.Canceled)
	}
}

// execute runs a command line and returns its exit code.
func execute(ctx context.Context, args []string) int {
	root, started := newRoot()
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(ctx)
	var usage *usageError
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errNo):
		return exitFailed
	case errors.As(err, &usage):
		fmt.Fprintf(os.Stderr, "pentad: %v\n%s\n", err, hint(usage.cmd))
		return exitUsage
	case !*started:
		fmt.Fprintf(os.Stderr, "pentad: %v\n%s\n", err, hint(cmd))
		return exitUsage
	}
	fmt.Fprintf(os.Stderr, "pentad: %v\n", explained(err))
	return exitFailed
}

// explained says what to do about what happens to those who are not root.
func explained(err error) error {
	if os.Geteuid() != 0 && (errors.Is(err, os.ErrPermission) || errors.Is(err, syscall.EPERM)) && !errors.Is(err, api.ErrDenied) {
		return fmt.Errorf("%w; run as root", err)
	}
	return err
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
		Version:       version,
		PersistentPreRun: func(*cobra.Command, []string) {
			*started = true
		},
	}
	root.PersistentFlags().StringVar(&at.pins, "pins", host.DefaultPins, "directory of the bpf filesystem that holds everything of pentad")
	root.PersistentFlags().StringVar(&at.runDir, "run-dir", api.DefaultRunDir, "directory of the agent's socket")
	root.PersistentFlags().StringVar(&at.stateDir, "state-dir", "",
		"directory of what outlives a restart of the host: which backends are drained; without it "+defaultStateDir+", or --run-dir where that is given")
	root.AddCommand(newRun(at), newController(), newCheck(), newSchema(), newConfig(), newDiff(at), newReload(at), newStatus(at), newService(at), newBackend(at), newTop(at), newFlow(at), newProxy(at), newForward(at), newAnnouncement(at), newPod(at),
		newGet(), newApply(), newEdit(), newDelete(), newHistory(), newRollback(), newFleet(), newImport(),
		newExplain(at), newDrops(at), newDoctor(at), newDown(at), newDemo(), newVersion())
	setHelp(root)
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	finish(root)
	return root, started
}
