package flow

import (
	"bufio"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
)

// Question is what is to be explained: what becomes of a connection of a process
// to a destination.
type Question struct {
	PID         int // 0: any process in scope
	Destination netip.AddrPort
	Protocol    service.Protocol
}

// Step is one step of the decision, in the order in which the kernel takes them.
type Step struct {
	What  string `json:"what" yaml:"what"`
	Found string `json:"found" yaml:"found"`
}

// Explanation is the walk through a decision.
type Explanation struct {
	Steps      []Step `json:"steps" yaml:"steps"`
	Conclusion string `json:"conclusion" yaml:"conclusion"` // one sentence: what happens, and if need be why and what to do
	Works      bool   `json:"works" yaml:"works"`           // the connection reaches a backend of a service
}

// ErrNoProcess says that the process of a question does not exist.
var ErrNoProcess = errors.New("no such process")

func (e *Explanation) step(what, format string, args ...any) {
	e.Steps = append(e.Steps, Step{what, fmt.Sprintf(format, args...)})
}

func (e *Explanation) conclude(works bool, format string, args ...any) *Explanation {
	e.Conclusion, e.Works = fmt.Sprintf(format, args...), works
	return e
}

// Explain walks through the decision with what the kernel has now.
func Explain(v *socket.View, q Question) (*Explanation, error) {
	e := &Explanation{}
	dest := service.Listener{Address: q.Destination, Protocol: q.Protocol}
	if outside, err := e.process(v, q); err != nil || outside {
		return e, err
	}
	if detached := e.hooks(v, q); detached != "" {
		return e.conclude(false, "Nothing is translated for %s, because the hook %s is not attached; start the agent, which puts it back: pentad run.",
			dest, detached), nil
	}
	s := find(v, dest)
	if s == nil {
		e.step("listener", "none is %s", dest)
		return e.notAService(v, dest), nil
	}
	e.step("listener", "%s belongs to the service %s", dest, s.Name)
	return e.service(v, s, dest), nil
}

// process looks whether the process is one for which pentad translates.
func (e *Explanation) process(v *socket.View, q Question) (outside bool, err error) {
	scope := scopeOf(v)
	if q.PID == 0 {
		e.step("process", "any below the cgroup %s", scope.path)
		return false, nil
	}
	cgroup, err := cgroupOf(q.PID)
	if err != nil {
		return false, err
	}
	e.step("process", "%d (%s), in the cgroup %s", q.PID, commandOf(q.PID), cgroup)
	if scope.contains(cgroup) {
		e.step("scope", "the cgroup %s contains it; a socket belongs for life to the cgroup in which it was made", scope.path)
		return false, nil
	}
	e.step("scope", "the cgroup %s does not contain it", scope.path)
	e.conclude(false, "pentad does nothing for process %d, because it is not below the cgroup %s: start it there, or change scope.cgroup.", q.PID, scope.path)
	return true, nil
}

// scope is the cgroup to which the hooks are attached.
type scope struct{ root, path string }

func scopeOf(v *socket.View) scope {
	var id uint64
	for _, h := range v.Hooks {
		id = max(id, h.CgroupID)
	}
	root, err := host.CgroupRoot()
	if err != nil || id == 0 {
		return scope{path: "(none)"}
	}
	s := scope{root: root, path: "(one that is gone)"}
	// An error ends the walk early; then the path is not known.
	_ = filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil
		}
		var st unix.Stat_t
		if unix.Stat(path, &st) == nil && st.Ino == id {
			s.path = "/" + strings.TrimPrefix(strings.TrimPrefix(path, root), "/")
			return filepath.SkipAll
		}
		return nil
	})
	return s
}

func (s scope) contains(cgroup string) bool {
	return s.path == "/" || cgroup == s.path || strings.HasPrefix(cgroup, s.path+"/")
}

// cgroupOf returns the cgroup (v2) of a process, below the root of the hierarchy.
func cgroupOf(pid int) (string, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/cgroup", pid))
	if errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("process %d: %w", pid, ErrNoProcess)
	}
	if err != nil {
		return "", err
	}
	defer f.Close()
	// The line of version 2 is "0::/path", see cgroups(7).
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if path, ok := strings.CutPrefix(lines.Text(), "0::"); ok {
			return path, nil
		}
	}
	return "", fmt.Errorf("process %d is in no cgroup of version 2", pid)
}

// hooks returns the hook that is missing, if one is.
func (e *Explanation) hooks(v *socket.View, q Question) string {
	family := "4"
	if !q.Destination.Addr().Is4() {
		family = "6"
	}
	names := []string{"connect" + family}
	if q.Protocol == service.UDP {
		names = append(names, "sendmsg"+family, "recvmsg"+family)
	}
	for _, name := range names {
		if i := slices.IndexFunc(v.Hooks, func(h socket.Hook) bool { return h.Name == name }); i < 0 || !v.Hooks[i].Attached {
			e.step("hook", "%s is not attached", name)
			return name
		}
	}
	e.step("hook", "%s attached", strings.Join(names, ", "))
	return ""
}

func find(v *socket.View, l service.Listener) *service.Service {
	for _, s := range v.Services {
		if slices.ContainsFunc(s.Listeners, func(x service.Listener) bool { return x.At() == l }) {
			return s
		}
	}
	return nil
}

// notAService says what most likely was meant.
func (e *Explanation) notAService(v *socket.View, dest service.Listener) *Explanation {
	var near []string
	for _, s := range v.Services {
		for _, l := range s.Listeners {
			if l.Address.Addr() == dest.Address.Addr() {
				near = append(near, fmt.Sprintf("%s (%s)", l, s.Name))
			}
		}
		for _, b := range s.Backends {
			if b.Address == dest.Address {
				return e.conclude(false, "The connection goes to %s itself, which is a backend of the service %s: it is neither balanced nor "+
					"kept from a dead server; connect to %s instead.", dest.Address, s.Name, s.Listeners[0])
			}
		}
	}
	if len(near) > 0 {
		return e.conclude(false, "The connection goes to %s as it is, because no service listens there; the same address has %s.",
			dest, strings.Join(near, ", "))
	}
	return e.conclude(false, "The connection goes to %s as it is: it is no address of a service; `pentad service list` shows those that are.", dest)
}

// service walks through the choice of a backend.
func (e *Explanation) service(v *socket.View, s *service.Service, dest service.Listener) *Explanation {
	e.step("balance", "%s", balances[s.Balance])
	if s.Affinity > 0 {
		e.step("affinity", "a client (network namespace) that was here within %s goes where it went, if that backend is usable", s.Affinity)
	}
	groups, unusable := candidates(v, s, dest)
	for _, g := range groups {
		e.step(fmt.Sprintf("group %d", g.number), "%s", g.text)
	}
	for _, u := range unusable {
		e.step("not usable", "%s", u)
	}
	if len(groups) == 0 {
		why := "it has none of that family"
		if len(unusable) > 0 {
			why = strings.Join(unusable, "; ")
		}
		return e.conclude(false, "connect() to %s is refused at once (ECONNREFUSED), because no backend of the service %s is usable: %s.",
			dest, s.Name, why)
	}
	chosen := pick(groups)
	if chosen == nil {
		return e.conclude(false, "connect() to %s is refused at once (ECONNREFUSED), because every backend of the service %s is ejected or has its "+
			"maxConnections; see `pentad backend list`.", dest, s.Name)
	}
	verb := "goes to"
	if len(chosen.usable) > 1 {
		verb = "goes to one of"
	}
	note := ""
	if chosen != &groups[0] {
		note = fmt.Sprintf(", in group %d because none before it is usable", chosen.number)
	}
	if chosen.panics && !slices.ContainsFunc(groups, func(g group) bool { return len(g.usable) > 0 && !g.panics }) {
		note += fmt.Sprintf("; more than %d%% of the group is ejected, so that ejection does not count", s.Breaker.MaxEjected)
	}
	return e.conclude(true, "connect() to %s %s %s%s; the process goes on seeing %s.", dest, verb, strings.Join(chosen.usable, ", "), note, dest.Address)
}

var balances = map[service.Balance]string{
	service.Random:           "random: one backend by weight",
	service.SourceHash:       "source-hash: the place of the client in a table",
	service.LeastConnections: "least-connections: two backends by weight, and of these the one with fewer connections for its weight",
	service.LeastLatency:     "least-latency: two backends by weight, and of these the one with fewer connections times latency",
}

// group is one failover group as a connect() would find it.
type group struct {
	number  uint32
	members int
	ejected int
	usable  []string
	panics  bool
	text    string
}

// candidates returns the groups that health leaves, in order, and why other
// backends are out.
func candidates(v *socket.View, s *service.Service, dest service.Listener) (groups []group, unusable []string) {
	byNumber := make(map[uint32]*group)
	var texts = make(map[uint32][]string)
	for i, state := range s.States() {
		b := s.Backends[i]
		if b.Address.Addr().Is4() != dest.Address.Addr().Is4() {
			continue
		}
		if state == service.Down || state == service.Drained {
			unusable = append(unusable, fmt.Sprintf("%s is %s", b.Address, state))
			continue
		}
		g := byNumber[b.Group]
		if g == nil {
			g = &group{number: b.Group}
			byNumber[b.Group] = g
		}
		l := v.Loads[s.Name][b.Address]
		text := describe(b, l)
		g.members++
		switch {
		case s.Breaker.MaxConnections > 0 && int(l.InFlight) >= s.Breaker.MaxConnections:
			text += ", full"
		case l.Ejected:
			g.ejected++
			text += ", ejected " + whom(l) + left(l)
		default:
			g.usable = append(g.usable, b.Address.String())
		}
		texts[b.Group] = append(texts[b.Group], text)
	}
	for _, g := range byNumber {
		g.text = strings.Join(texts[g.number], "; ")
		if g.panics = g.ejected*100 > s.Breaker.MaxEjected*g.members && s.Breaker.Failures > 0; g.panics {
			g.usable = nil
			for i, b := range s.Backends {
				if st := s.States()[i]; b.Group == g.number && (st == service.Serving || st == service.Standby) &&
					b.Address.Addr().Is4() == dest.Address.Addr().Is4() {
					g.usable = append(g.usable, b.Address.String())
				}
			}
		}
		groups = append(groups, *g)
	}
	slices.SortFunc(groups, func(a, b group) int { return int(a.number) - int(b.number) })
	return groups, unusable
}

func describe(b service.Backend, l socket.Load) string {
	text := fmt.Sprintf("%s: weight %d, %d in flight", b.Address, b.Weight, l.InFlight)
	if l.RTT > 0 {
		text += ", RTT " + l.RTT.String()
	}
	if l.Response > 0 {
		text += ", response " + l.Response.String()
	}
	return text
}

// whom says who does not use an ejected backend.
func whom(l socket.Load) string {
	switch {
	case l.Shunned:
		return "by several clients, and others avoid it"
	case l.Clients == 1:
		return "for 1 client"
	}
	return fmt.Sprintf("for %d clients", l.Clients)
}

func left(l socket.Load) string {
	switch {
	case l.Trial:
		return ", and on trial"
	case l.For > 0:
		return ", for another " + l.For.Round(100*time.Millisecond).String()
	}
	return ", and the next connection tries it"
}

// pick returns the group that a connect() takes: the first that is not in panic,
// else the first of all, or nil.
func pick(groups []group) *group {
	for i := range groups {
		if len(groups[i].usable) > 0 && !groups[i].panics {
			return &groups[i]
		}
	}
	for i := range groups {
		if len(groups[i].usable) > 0 {
			return &groups[i]
		}
	}
	return nil
}
