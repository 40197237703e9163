package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/pentad/pentad/plane/nat"
)

// conntrackSettings are what a node needs of connection tracking that the kernel's own
// values do not give it; they are those of kube-proxy. A client that has said all that
// it has to say may wait for its answer longer than the kernel's minute, and a node has
// more connections than a host.
var conntrackSettings = []struct {
	name  string // below /proc/sys/net/netfilter
	value int
	least bool // a higher one is right as well
}{
	{"nf_conntrack_tcp_timeout_close_wait", 3600, false},
	{"nf_conntrack_tcp_timeout_established", 86400, false},
	{"nf_conntrack_max", max(131072, 32768*runtime.NumCPU()), true},
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

// setting is what one of them was, and what it was made.
type setting struct{ Was, Is int }

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
	path := filepath.Join(runDir, conntrackFile)
	noted, err := readSettings(path)
	if err != nil {
		log.Warn("the settings of connection tracking are left as they are", "error", err)
		return
	}
	for _, s := range conntrackSettings {
		have, err := readSetting(s.name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if _, done := noted[s.name]; done || err == nil && (have == s.value || s.least && have > s.value) {
			continue
		}
		if err == nil {
			// Noted first: what is noted and was not done does no harm.
			noted[s.name] = setting{have, s.value}
			err = errors.Join(writeSettings(path, noted), writeSetting(s.name, s.value))
		}
		if err != nil {
			delete(noted, s.name)
			err = errors.Join(err, writeSettings(path, noted))
		}
		switch {
		case errors.Is(err, fs.ErrPermission):
			// Of the whole machine, and this is a namespace on it.
		case err != nil:
			log.Warn("a setting of connection tracking is left as it is", "setting", s.name, "error", err)
		default:
			log.Info("a setting of connection tracking is made what a node needs; pentad down puts it back",
				"setting", "net.netfilter."+s.name, "was", have, "is", s.value)
		}
	}
}

// restoreConntrack puts back what tuneConntrack has changed, unless somebody else has
// changed it since.
func restoreConntrack(runDir string) error {
	path := filepath.Join(runDir, conntrackFile)
	noted, err := readSettings(path)
	if err != nil {
		return err
	}
	var errs []error
	for name, s := range noted {
		if have, err := readSetting(name); err == nil && have == s.Is {
			errs = append(errs, writeSetting(name, s.Was))
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func readSettings(path string) (map[string]setting, error) {
	noted := make(map[string]setting)
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return noted, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(raw, &noted); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return noted, nil
}

func writeSettings(path string, noted map[string]setting) error {
	raw, err := json.Marshal(noted)
	if err != nil {
		return err
	}
	return os.WriteFile(path, raw, 0o600)
}

func readSetting(name string) (int, error) {
	raw, err := os.ReadFile(filepath.Join(netfilterSettings(), name))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(raw)))
}

func writeSetting(name string, value int) error {
	// Only a file that is there: to make one is refused as if there were no permission.
	f, err := os.OpenFile(filepath.Join(netfilterSettings(), name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(strconv.Itoa(value))
	return errors.Join(err, f.Close())
}
