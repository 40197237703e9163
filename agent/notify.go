package agent

import (
	"context"
	"os"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// tellManager tells the service manager, if one asks for it (sd_notify(3)). Nothing
// depends on it.
func tellManager(state string) { _, _ = daemon.SdNotify(false, state) }

// isManaged reports whether a service manager started this process and waits for it.
func isManaged() bool { return os.Getenv("NOTIFY_SOCKET") != "" }

// watchdog tells the service manager that the loop answers, until the context ends. One
// that hangs is ended and started anew; what is in the kernel goes on meanwhile.
func (a *Agent) watchdog(ctx context.Context) {
	every, err := daemon.SdWatchdogEnabled(false)
	if err != nil || every == 0 {
		return
	}
	tick := time.NewTicker(every / 3)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if _, err := ask(ctx, a.pings, struct{}{}, a.pongs); err != nil {
			return
		}
		tellManager(daemon.SdNotifyWatchdog)
	}
}
