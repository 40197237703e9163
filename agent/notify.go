package agent

import (
	"context"
	"net"
	"os"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// patience is how long a service manager may keep the agent from its work.
const patience = 50 * time.Millisecond

// tellManager tells the service manager, if one asks for it (sd_notify(3)). Nothing
// depends on it, and one that does not listen is not waited for.
func tellManager(state string) {
	at := os.Getenv("NOTIFY_SOCKET")
	if at == "" {
		return
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: at, Net: "unixgram"})
	if err != nil {
		return
	}
	defer conn.Close()
	_ = conn.SetWriteDeadline(time.Now().Add(patience))
	_, _ = conn.Write([]byte(state))
}

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
