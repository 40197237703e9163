package flow

import (
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
	Code  string `json:"code"` // "process", "hook", "listener", "group", "not-usable", ...
	What  string `json:"what"`
	Found string `json:"found"`
}

// Verdict says in one word what becomes of a connection.
type Verdict string

// The verdicts.
const (
	Reaches     Verdict = "reaches"      // a backend of a service
	Refused     Verdict = "refused"      // at once: no backend is usable
	NoService   Verdict = "no-service"   // the connection goes to the destination itself
	OutOfScope  Verdict = "out-of-scope" // pentad does nothing for the process
	NotAttached Verdict = "not-attached" // a hook is missing
	Dropped     Verdict = "dropped"      // its packets are
	Passes      Verdict = "passes"       // its packets go on as they are
	NoRoute     Verdict = "no-route"     // the process has no way to a backend
	Captured    Verdict = "captured"     // led to a proxy that the process does not know of
	Chained     Verdict = "chained"      // the backend is another virtual address, which is not translated again
)

// Explanation is the walk through a decision.
type Explanation struct {
	Destination string    `json:"destination"`
	Service     string    `json:"service,omitempty"` // to which the listener belongs
	Verdict     Verdict   `json:"verdict"`
	Works       bool      `json:"works"`      // the connection reaches a backend of a service
	Conclusion  string    `json:"conclusion"` // one sentence: what happens, and if need be why and what to do
	Steps       []Step    `json:"steps"`
	Backends    []Backend `json:"backends,omitempty"`
}

// Backend is a backend that an explanation looked at.
type Backend struct {
	Address string `json:"address"`
	Group   uint32 `json:"group"`
	Weight  uint32 `json:"weight"`
	State   string `json:"state"` // as lists show it
	Takes   bool   `json:"takes"` // the next connection may go there
}

// ErrNoProcess says that the process of a question does not exist.
var ErrNoProcess = errors.New("no such process")

func (e *Explanation) step(what, format string, args ...any) {
	code := strings.ReplaceAll(strings.TrimRight(what, " 0123456789"), " ", "-")
	e.Steps = append(e.Steps, Step{code, what, fmt.Sprintf(format, args...)})
}

func (e *Explanation) conclude(v Verdict, format string, args ...any) *Explanation {
	e.Conclusion, e.Verdict, e.Works = fmt.Sprintf(format, args...), v, v == Reaches || v == Captured
	return e
}

// Explain walks through the decision with what the kernel has now.
func Explain(v *socket.View, q Question) (*Explanation, error) {
	dest := service.Listener{Address: q.Destination, Protocol: q.Protocol}
	e := &Explanation{Destination: dest.String()}
	if outside, err := e.process(v, q); err != nil || outside {
		return e, err
	}
	if detached := e.hooks(v, q); detached != "" {
		return e.conclude(NotAttached, "Nothing is translated for %s, because the hook %s is not attached; start the agent, which puts it back: pentad run.",
			dest, detached), nil
	}
	s := find(v, dest)
	if s == nil {
		e.step("listener", "none is %s", dest)
		return e.notAService(v, dest), nil
	}
	e.Service = s.Name
	e.step("listener", "%s belongs to the service %s", dest, s.Name)
	e.service(v, s, dest)
	if e.Works {
		e.way(v, q)
	}
	return e, nil
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
	e.conclude(OutOfScope, "pentad does nothing for process %d, because it is not below the cgroup %s: start it there, or change scope.cgroup.", q.PID, scope.path)
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
	path, err := host.CgroupOf(pid)
	if errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("process %d: %w", pid, ErrNoProcess)
	}
	return path, err
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
				return e.conclude(NoService, "The connection goes to %s itself, which is a backend of the service %s: it is neither balanced nor "+
					"kept from a dead server; connect to %s instead.", dest.Address, s.Name, s.Listeners[0])
			}
		}
	}
	if len(near) > 0 {
		return e.conclude(NoService, "The connection goes to %s as it is, because no service listens there; the same address has %s.",
			dest, strings.Join(near, ", "))
	}
	return e.conclude(NoService, "The connection goes to %s as it is: it is no address of a service; `pentad service list` shows those that are.", dest)
}

// service walks through the choice of a backend.
func (e *Explanation) service(v *socket.View, s *service.Service, dest service.Listener) *Explanation {
	e.step("balance", "%s", balances[s.Balance])
	if s.Affinity > 0 {
		e.step("affinity", "a client (network namespace) that was here within %s goes where it went, if that backend is usable", s.Affinity)
	}
	family := service.FamilyOf(dest.Address.Addr())
	choice := v.Choose(s, family)
	e.candidates(v, s, choice)
	takers := choice.Takers()
	if len(takers) == 0 {
		return e.conclude(Refused, "connect() to %s is refused at once (ECONNREFUSED), because %s.", dest, whyNone(choice, s))
	}
	verb := "goes to"
	if len(takers) > 1 {
		verb = "goes to one of"
	}
	note := ""
	if choice.Group != firstGroup(choice) {
		note = fmt.Sprintf(", in group %d because none before it is usable", choice.Group)
	}
	if choice.Panic {
		note += fmt.Sprintf("; more than %d%% of the group is ejected, so that ejection does not count", s.Breaker.MaxEjected)
	}
	names := make([]string, len(takers))
	for i, b := range takers {
		names[i] = b.Address.String()
	}
	return e.conclude(Reaches, "connect() to %s %s %s%s; the process goes on seeing %s.", dest, verb, strings.Join(names, ", "), note, dest.Address)
}

// candidates says of every backend what it is to the connection.
func (e *Explanation) candidates(v *socket.View, s *service.Service, choice service.Choice) {
	for _, b := range choice.Candidates {
		e.Backends = append(e.Backends, Backend{b.Address.String(), b.Group, b.Weight, b.State.String(), b.Takes})
		l := v.Loads[s.Name][b.Address]
		switch b.State {
		case service.Down, service.Drained, service.WeightZero:
			e.step("not usable", "%s is %s", b.Address, stateWords[b.State])
		case service.Ejected:
			e.step(fmt.Sprintf("group %d", b.Group), "%s, ejected %s%s", describe(b.Backend, l), whom(l), left(l))
		case service.Full:
			e.step(fmt.Sprintf("group %d", b.Group), "%s, full", describe(b.Backend, l))
		default:
			e.step(fmt.Sprintf("group %d", b.Group), "%s", describe(b.Backend, l))
		}
	}
}

// stateWords say what a backend is that cannot be used.
var stateWords = map[service.State]string{service.Down: "down", service.Drained: "drained", service.WeightZero: "of weight 0"}

// whyNone says why no backend takes a connection.
func whyNone(choice service.Choice, s *service.Service) string {
	if len(choice.Candidates) == 0 {
		return fmt.Sprintf("no backend of the service %s is usable: it has none of that family", s.Name)
	}
	var unusable []string
	for _, b := range choice.Candidates {
		if b.Usable() {
			return fmt.Sprintf("every backend of the service %s is ejected or has its maxConnections", s.Name)
		}
		unusable = append(unusable, fmt.Sprintf("%s is %s", b.Address, stateWords[b.State]))
	}
	return fmt.Sprintf("no backend of the service %s is usable: %s", s.Name, strings.Join(unusable, "; "))
}

// firstGroup returns the lowest group that health and weights leave.
func firstGroup(choice service.Choice) uint32 {
	lowest, found := choice.Group, false
	for _, b := range choice.Candidates {
		if b.Usable() && (!found || b.Group < lowest) {
			lowest, found = b.Group, true
		}
	}
	return lowest
}

var balances = map[service.Balance]string{
	service.Random:           "random: one backend by weight",
	service.SourceHash:       "source-hash: the place of the client in a table",
	service.LeastConnections: "least-connections: two backends by weight, and of these the one with fewer connections for its weight",
	service.LeastLatency:     "least-latency: two backends by weight, and of these the one with fewer connections times latency",
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
	return ", and one of the next connections tries it"
}
