// Package doctor says what is wrong with a host, or will be: what of its kernel, its
// settings and its other programs keeps pentad from doing what its configuration asks
// for. Read finds the facts, Examine judges them and is pure.
//
// It names only what somebody can do something about, with the command that does it.
package doctor

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/service"
)

// Severity says how bad a finding is.
type Severity string

// The severities.
const (
	Fault Severity = "fault" // something does not work now
	Risk  Severity = "risk"  // something will not, or not for everybody
	Note  Severity = "note"  // good to know when something is odd
)

// Finding is one thing that is not as it should be.
type Finding struct {
	Severity Severity `json:"severity"`
	Code     string   `json:"code"` // for programs: "ip-forward"
	What     string   `json:"what"`
	Why      string   `json:"why"`            // it matters
	Mend     string   `json:"mend,omitempty"` // the command, or what to do
	Fixed    bool     `json:"fixed,omitempty"`

	sysctl, value string // that mend it; empty: nothing that is safe does
}

// Fixable reports whether Fix mends it: by one setting that Mend names.
func (f Finding) Fixable() bool { return f.sysctl != "" }

// Fix mends it until the host restarts.
func (f Finding) Fix() error {
	if err := os.WriteFile(sysctlPath(f.sysctl), []byte(f.value), 0); err != nil {
		return fmt.Errorf("%s: %w", f.sysctl, err)
	}
	return nil
}

// bySysctl is the finding as one that a setting mends.
func (f Finding) bySysctl(name, value string) Finding {
	f.sysctl, f.value = name, value
	f.Mend = fmt.Sprintf("sysctl -w %s=%s; for ever: a line %s=%s in /etc/sysctl.d/90-pentad.conf", name, value, name, value)
	return f
}

// Program is a program of somebody else that is attached where pentad has its own.
type Program struct {
	At   string // where: "connect4 of the cgroup /"
	Name string
	ID   uint32
}

// Chain is a chain of somebody else's firewall.
type Chain struct {
	Table, Name string
	// VIPs are addresses of services that it translates.
	VIPs []netip.Addr
}

// Facts are what Read has found on a host.
type Facts struct {
	Config       *config.Config // nil: none that is valid
	ConfigErrors []string
	Problems     []string // of the agent's status

	CgroupErr       error    // why there is no cgroup v2
	CgroupV1        []string // controllers that are mounted as v1
	BPFFS           bool
	MissingFeatures []string // features of the kernel that cost something, with what
	MissingCaps     []string

	Sysctls    map[string]string // by name; those that there are not are missing
	Programs   []Program
	Processes  map[string]int // of some names: "kube-proxy"
	Dropping   []Chain        // that drop what is forwarded and nobody accepts
	Translated []Chain        // that translate VIPs
	Interfaces []string
	Conntrack  [2]int // used, and room; zero: not known
	FilesLimit uint64 // open files that the agent, or else who asks, may have
	Unsynced   bool   // the clock follows nobody
}

// sysctl reports whether a setting is there and has another value.
func (f *Facts) differs(name string, want ...string) bool {
	v, known := f.Sysctls[name]
	return known && !slices.Contains(want, v)
}

// forwards reports whether packets of others pass this host by its configuration.
func (f *Facts) forwards() bool {
	c := f.Config
	return c != nil && (c.Source.Kubernetes != nil || f.hasPods() ||
		slices.ContainsFunc(c.Services, func(s *service.Service) bool { return s.Forward == service.ForwardNAT }) ||
		slices.ContainsFunc(c.Captures, func(c config.Capture) bool { return c.Interface != "" }))
}

func (f *Facts) hasPods() bool { return f.Config != nil && f.Config.Pods.Wanted() }

// Examine returns what is wrong, the worst first.
func Examine(f *Facts) []Finding {
	var all []Finding
	for _, check := range checks {
		all = append(all, check(f)...)
	}
	rank := []Severity{Fault, Risk, Note}
	slices.SortStableFunc(all, func(a, b Finding) int { return slices.Index(rank, a.Severity) - slices.Index(rank, b.Severity) })
	return all
}

// list writes some of many.
func list[T any](all []T) string {
	const most = 5
	var texts []string
	for i, x := range all {
		if i == most {
			texts = append(texts, fmt.Sprintf("and %d more", len(all)-most))
			break
		}
		texts = append(texts, fmt.Sprint(x))
	}
	return strings.Join(texts, ", ")
}
