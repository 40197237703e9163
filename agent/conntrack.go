package agent

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/plane/nat"
)

// conntrackSettings are what a node needs of connection tracking that the kernel's own
// values do not give it; they are those of kube-proxy. A client that has said all that
// it has to say may wait for its answer longer than the kernel's minute, and a node has
// more connections than a host.
var conntrackSettings = []host.Setting{
	{Name: "nf_conntrack_tcp_timeout_close_wait", Value: 3600},
	{Name: "nf_conntrack_tcp_timeout_established", Value: 86400},
	{Name: "nf_conntrack_max", Value: max(131072, 32768*runtime.NumCPU()), Least: true},
}

// netfilterSettings is where they are: in a pod, whose own /proc/sys cannot be
// written, where its manifest mounts that of the node.
func netfilterSettings() string {
	const own, mounted = "/proc/sys/net/netfilter", "/host/proc/sys/net/netfilter"
	if _, err := os.Stat(mounted); err == nil {
		return mounted
	}
	return own
}

// conntrackFile is where it stands in the run directory what the settings were.
const conntrackFile = "conntrack.json"

// conntrackOf returns the settings of connection tracking.
func conntrackOf(runDir string) host.Settings {
	return host.Settings{Root: netfilterSettings(), File: filepath.Join(runDir, conntrackFile)}
}

// tunedNAT is the nat plane with the settings that it needs.
type tunedNAT struct {
	*nat.Plane
	agent *Agent
	tuned bool
}

// Apply tunes connection tracking once there is something to track.
func (t *tunedNAT) Apply(ctx context.Context, w nat.Want) error {
	err := t.Plane.Apply(ctx, w)
	if err == nil && !t.tuned {
		t.tuned = true
		tuneConntrack(t.agent.opts.RunDir, t.agent.log)
	}
	return err
}

// tuneConntrack makes the settings what a node needs, and notes what they were. What
// somebody has changed since is his.
func tuneConntrack(runDir string, log *slog.Logger) {
	for _, x := range conntrackSettings {
		was, changed, err := conntrackOf(runDir).Set(x)
		switch {
		case errors.Is(err, fs.ErrPermission):
			// Of the whole machine, and this is a namespace on it.
		case err != nil:
			log.Warn("a setting of connection tracking is left as it is", "setting", x.Name, "error", err)
		case changed:
			log.Info("a setting of connection tracking is made what a node needs; pentad down puts it back",
				"setting", "net.netfilter."+x.Name, "was", was, "is", x.Value)
		}
	}
}

// restoreConntrack puts back what tuneConntrack has changed, unless somebody else has
// changed it since.
func restoreConntrack(runDir string) error { return conntrackOf(runDir).Restore() }
