package host

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// capabilities that the agent needs, by number (linux/capability.h).
var capabilities = []struct {
	name string
	bit  uint
	why  string
}{
	{"CAP_BPF", unix.CAP_BPF, "load programs"},
	{"CAP_NET_ADMIN", unix.CAP_NET_ADMIN, "attach them to a cgroup"},
	{"CAP_PERFMON", unix.CAP_PERFMON, "pass the verifier with computed offsets into map values"},
}

// MissingCapabilities returns those that this process needs and has not, and what for.
func MissingCapabilities() []string {
	effective, err := effectiveCapabilities()
	if err != nil || effective&(1<<unix.CAP_SYS_ADMIN) != 0 {
		// CAP_SYS_ADMIN contains these two for compatibility (capabilities(7)).
		effective |= 1<<unix.CAP_BPF | 1<<unix.CAP_PERFMON
	}
	var missing []string
	for _, c := range capabilities {
		if err == nil && effective&(1<<c.bit) == 0 {
			missing = append(missing, fmt.Sprintf("%s (to %s)", c.name, c.why))
		}
	}
	return missing
}

func effectiveCapabilities() (uint64, error) {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(status)) {
		if hex, ok := strings.CutPrefix(line, "CapEff:"); ok {
			return strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
		}
	}
	return 0, errors.New("no CapEff in /proc/self/status")
}
