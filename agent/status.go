package agent

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/health"
	"github.com/pentad/pentad/health/probe"
	"github.com/pentad/pentad/nodehealth"
	"github.com/pentad/pentad/service"
)

// Probes implements api.Agent.
func (a *Agent) Probes(service string) []api.ProbeRecord {
	all := []api.ProbeRecord{}
	for k, r := range a.monitor.Records(service) {
		p := api.ProbeRecord{
			Service: k.Service, Address: k.Address, Probe: r.Probe.String(), Up: r.Up, Last: r.At, TookSeconds: r.Took.Seconds(),
			InARow: r.InARow, Next: r.Next, Succeeded: r.Succeeded, Failed: r.Failed,
		}
		if r.Err != nil {
			p.Error = probe.Words(r.Err)
		}
		all = append(all, p)
	}
	return all
}

// nodeState is what load balancers are told.
func (a *Agent) nodeState() nodehealth.State {
	a.mu.Lock()
	s := nodehealth.State{Healthy: true, Leaving: a.known.node.Leaving}
	a.mu.Unlock()
	for _, r := range a.roles() {
		if r.minor {
			continue
		}
		s.Healthy = s.Healthy && r.isSound()
		if r.applied.After(s.Updated) {
			s.Updated = r.applied
		}
	}
	return s
}

// roles says how every role is.
func (a *Agent) roles() []roleState {
	all := make([]roleState, len(a.drivers))
	for i, d := range a.drivers {
		all[i] = d.state()
	}
	return all
}

// Status implements api.Agent.
func (a *Agent) Status() api.Status {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := api.Status{
		MemoryLimit: memoryLimit(),
		Version:     a.opts.Version, PID: os.Getpid(), Started: a.started, Revision: a.known.services.Revision,
		Config: api.Config{File: a.opts.ConfigFile, Loaded: a.loaded},
	}
	st := a.monitor.Stats()
	s.Probes = api.Probes{Targets: st.Targets, Done: st.Probes, Late: st.Late.Seconds()}
	s.Problems = append(s.Problems, probing(st)...)
	if a.invalid != nil {
		s.Config.Error = a.invalid.Error()
		problem := "the configuration file is not valid and not in force: "
		if errors.Is(a.invalid, errHeld) {
			problem = "the newest text of the configuration is not in force: "
		}
		s.Problems = append(s.Problems, problem+a.invalid.Error())
	}
	s.Problems = append(s.Problems, skipped(a.known.config)...)
	a.addCluster(&s)
	a.addFleet(&s)
	a.addBlocks(&s)
	for _, r := range a.roles() {
		switch {
		case r.err != nil && r.loud:
			s.Problems = append(s.Problems, strings.Split(r.err.Error(), "\n")...)
		case r.err != nil && r.minor:
			s.Warnings = append(s.Warnings, r.err.Error())
		case r.err != nil:
			s.Problems = append(s.Problems, "not everything is in the kernel: "+r.err.Error())
		}
		if r.warner != nil {
			s.Warnings = append(s.Warnings, r.warner.Warnings()...)
		}
	}
	s.Warnings = append(s.Warnings, a.inbox.lost...)
	return s
}

// probing says what is wrong with the probes.
func probing(st health.Stats) (problems []string) {
	if st.Late > time.Second {
		problems = append(problems, fmt.Sprintf(
			"probes of service %s start %s late: too many of its backends are silent, or this host cannot keep up; probe fewer backends, less often, or with a shorter timeout",
			st.Latest, st.Late.Round(time.Millisecond)))
	}
	if st.Unmade > 0 {
		problems = append(problems, fmt.Sprintf(
			"%d backends cannot be probed, by a fault of this host, and count as what they were: %v", st.Unmade, st.Fault))
	}
	return problems
}

// addCluster puts the state of the cluster into a status; the caller holds mu.
func (a *Agent) addCluster(s *api.Status) {
	c := a.known.config
	if c == nil || c.Source.Kubernetes == nil {
		return
	}
	in := &a.inbox
	node, away, why := a.cluster.away()
	s.Cluster = &api.Cluster{
		Node: node, Services: len(in.kubernetes.Services), Away: away, Changed: in.kubernetes.changed, Leaving: in.kubernetes.Leaving, Updates: in.kubernetes.count,
		Unserved: in.kubernetes.Unserved, Untracked: c.Source.Kubernetes.Untracked,
	}
	if why != nil {
		s.Cluster.Why = why.Error()
	}
	if in.silent.Has(service.SourceKubernetes) {
		s.Problems = append(s.Problems, "the API server has not answered yet: services of the cluster stay as the agent before left them")
	}
	for _, p := range in.kubernetes.Problems {
		s.Warnings = append(s.Warnings, p.Object+": "+p.Message)
	}
	forwards, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward")
	if err == nil && len(forwards) > 0 && forwards[0] == '0' {
		s.Problems = append(s.Problems, "this host does not forward packets, so that nobody outside reaches pods: sysctl -w net.ipv4.ip_forward=1")
	}
}
