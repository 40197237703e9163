package agent

import (
	"errors"
	"slices"
	"time"

	"github.com/pentad/pentad/announce"
	"github.com/pentad/pentad/announce/bgp"
	"github.com/pentad/pentad/announce/l2"
	"github.com/pentad/pentad/claim"
	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/nodehealth"
	"github.com/pentad/pentad/plane/capture"
	"github.com/pentad/pentad/plane/director"
	"github.com/pentad/pentad/plane/nat"
	"github.com/pentad/pentad/plane/pod"
	"github.com/pentad/pentad/plane/realserver"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/proxy"
	"github.com/pentad/pentad/service"
)

// roles are all that an agent can be. A section of the file becomes a part of the agent
// here and nowhere else. `down` goes through them from the last to the first.
var roles = []role{
	part[*socket.Plane, socket.Want]{name: "socket", wanted: always, want: wantSocket,
		open: openSocket, remove: removeSocket, look: time.Second, measure: measureSocket},
	// A firewall that is reloaded takes the table away: that is looked for often.
	part[*tunedNAT, nat.Want]{name: "nat", wanted: forwards, want: wantNAT,
		open: openNAT, remove: removeNAT, look: 250 * time.Millisecond, left: tableIsWhole},
	part[*director.Plane, director.Want]{name: "director", wanted: directs, want: wantDirector,
		open: openDirector, remove: removeDirector, look: time.Second, measure: measureDirector},
	part[*realserver.Plane, realserver.Want]{name: "realserver", wanted: isRealServer, want: wantRealServer,
		open: openRealServer, remove: removeRealServer, look: time.Second},
	part[*bgp.Plane, bgp.Want]{name: "bgp", wanted: speaksBGP, want: wantBGP,
		open: openBGP, measure: measureBGP, minor: true, loud: true},
	part[*l2.Plane, l2.Want]{name: "l2", wanted: speaksARP, want: wantL2,
		open: openL2, remove: removeL2, look: 250 * time.Millisecond, measure: measureL2, minor: true, loud: true},
	part[*pod.Plane, pod.Want]{name: "pods", wanted: hasPods, want: wantPods,
		open: openPods, remove: removePods, look: 500 * time.Millisecond, measure: measurePods, minor: true, loud: true},
	part[*nodehealth.Server, nodehealth.Want]{name: "nodehealth", wanted: inCluster, want: wantNodeHealth,
		open: openNodeHealth, minor: true},
	part[*capture.Plane, capture.Want]{name: "capture", wanted: hasCaptures, want: wantCaptures,
		open: openCaptures, remove: removeCaptures, look: 250 * time.Millisecond, minor: true, loud: true, left: captureIsThere},
	part[*proxy.Plane, proxy.Want]{name: "proxy", wanted: hasProxies, want: wantProxies,
		open: openProxies, look: time.Second, measure: measureProxies, minor: true, loud: true},
	part[*pageServer, config.API]{name: "page", wanted: always, want: wantPage,
		open: openPage, look: time.Second, minor: true, loud: true},
}

func always(*config.Config) bool { return true }

func inCluster(c *config.Config) bool { return c.Source.Kubernetes != nil }

// forwards reports whether packets are translated that pass this host.
func forwards(c *config.Config) bool {
	return inCluster(c) || slices.ContainsFunc(c.Services, func(s *service.Service) bool { return s.Forward == service.ForwardNAT })
}

// known is what the agent knows at one moment: what every role's want is made of. It is
// immutable.
type known struct {
	number   uint64 // of this moment; it grows
	config   *config.Config
	services *service.Snapshot // of all sources, with the state of their backends
	silent   service.Sources   // those that have not told yet what they have
	node     nodeFacts
	standing announce.Standing // what of them is in the kernel for packets from elsewhere
	unheard  map[string]bool   // services of whose backends no probe has told anything yet
	blocks   *claim.View       // of addresses of pods; nil: not known, or not claimed
}

// The wants: pure functions of what is known. The second result is false where the
// sources have not told enough to say; then what is in the kernel stays.

func wantSocket(k *known) (socket.Want, bool) {
	return socket.Want{Cgroup: k.config.Scope.Cgroup, Services: k.services, Silent: k.silent}, true
}

func wantNAT(k *known) (nat.Want, bool) {
	w := nat.Want{Services: k.services, Ranges: nat.Ranges{Pods: k.node.Pods, Reserved: k.node.Reserved}}
	if k := k.config.Source.Kubernetes; k != nil {
		w.Untracked = k.Untracked
	}
	return w, k.silent == 0
}

func wantNodeHealth(k *known) (nodehealth.Want, bool) {
	w := nodehealth.Want{Listen: k.config.Source.Kubernetes.Health}
	for _, c := range k.node.Checks {
		w.Checks = append(w.Checks, nodehealth.Check(c))
	}
	return w, true
}

func wantPage(k *known) (config.API, bool) { return k.config.API, true }

func openSocket(a *Agent, lost func()) *socket.Plane {
	return socket.New(socket.Options{
		Pins: a.opts.Pins, Version: a.opts.Version, Log: a.log, MaxBackends: a.opts.MaxBackends, Lost: lost,
	})
}

func removeSocket(opts Options) error { return socket.Remove(opts.Pins) }

func openNAT(a *Agent, _ func()) *tunedNAT { return &tunedNAT{Plane: nat.New(a.log), agent: a} }

func removeNAT(opts Options) error { return errors.Join(nat.Remove(), restoreConntrack(opts.RunDir)) }

// tableIsWhole reports whether an earlier agent has left what packets from elsewhere
// need: then the node serves, though the API server has not answered this agent yet.
func tableIsWhole(Options) bool {
	_, whole, err := nat.Installed()
	return err == nil && whole
}

func hasCaptures(c *config.Config) bool { return len(c.Captures) > 0 }

func wantCaptures(k *known) (capture.Want, bool) {
	return capture.Want{Captures: k.config.Captures, Services: k.services, Scope: k.config.Scope.Cgroup}, k.silent == 0
}

func openCaptures(a *Agent, _ func()) *capture.Plane {
	return capture.New(a.opts.Pins)
}

// captureIsThere reports whether an earlier agent has left a table, which will do until
// all sources have told which services there are.
func captureIsThere(opts Options) bool {
	v, err := capture.Read(opts.Pins)
	return err == nil && v.Installed()
}

func removeCaptures(opts Options) error { return capture.Remove(opts.Pins) }

func openNodeHealth(a *Agent, _ func()) *nodehealth.Server { return nodehealth.New(a.nodeState, a.log) }
