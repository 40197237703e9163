package agent

import (
	"net/netip"
	"path/filepath"
	"slices"
	"testing"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/service"
	"github.com/pentad/pentad/source"
)

// Each want is made of what concerns it, and of nothing else.
func TestWants(t *testing.T) {
	k := &known{config: &config.Config{}, services: &service.Snapshot{Revision: 7}}
	k.config.Scope.Cgroup = "/some"
	k.config.API.Listen = netip.MustParseAddrPort("127.0.0.1:9464")
	k.config.Source.Kubernetes = &config.Kubernetes{
		Untracked: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, Health: netip.MustParseAddrPort("0.0.0.0:10256"),
	}
	k.node = source.Node{
		Pods: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/24")}, Reserved: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")},
		Checks: []source.Check{{Port: 31000, Namespace: "shop", Name: "web", Endpoints4: 2}},
	}
	if w, ok := wantSocket(k); !ok || w.Cgroup != "/some" || w.Services != k.services || w.Silent != 0 {
		t.Errorf("socket: %t, %+v", ok, w)
	}
	if w, ok := wantNAT(k); !ok || w.Services != k.services || !slices.Equal(w.Pods, k.node.Pods) ||
		!slices.Equal(w.Reserved, k.node.Reserved) || !slices.Equal(w.Untracked, k.config.Source.Kubernetes.Untracked) {
		t.Errorf("nat: %t, %+v", ok, w)
	}
	if w, ok := wantNodeHealth(k); !ok || w.Listen.Port() != 10256 || len(w.Checks) != 1 || w.Checks[0].Port != 31000 || w.Checks[0].Endpoints4 != 2 {
		t.Errorf("nodehealth: %t, %+v", ok, w)
	}
	if w, ok := wantPage(k); !ok || w != k.config.API {
		t.Errorf("metrics: %t, %+v", ok, w)
	}
	silent := *k
	silent.silent = service.Sources(0).With(service.SourceKubernetes)
	if w, ok := wantSocket(&silent); !ok || !w.Silent.Has(service.SourceKubernetes) || w.Silent.Has(service.SourceFile) {
		t.Errorf("socket, before the cluster has spoken: %t, %+v", ok, w)
	}
	if _, ok := wantNAT(&silent); ok {
		t.Error("nat would remove what the cluster has, before it has spoken")
	}
	// Names of roles are those of directories.
	seen := make(map[string]bool)
	for _, r := range roles {
		if seen[r.id()] || r.id() != filepath.Base(r.id()) {
			t.Errorf("role %q", r.id())
		}
		seen[r.id()] = true
	}
}
