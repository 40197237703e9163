package config

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/pentad/pentad/service"
)

func annotatedService() *service.Service {
	return &service.Service{Listeners: []service.Listener{{Address: netip.MustParseAddrPort("10.96.0.10:80"), Protocol: service.TCP}}}
}

func TestAnnotate(t *testing.T) {
	s := annotatedService()
	errs := Annotate(map[string]string{
		"pentad.io/balance":    "random",
		"pentad.io/breaker":    "{failures: 3, ejection: 5s}",
		"pentad.io/health":     "{probe: http, path: /ready}",
		"pentad.io/onDown":     "keep",
		"pentad.io/flows":      "false",
		"pentad.io/share":      "another reader's",
		"example.com/balance":  "source-hash",
		"pentad.io/keepalive":  "{idle: 20s}",
		"pentad.io/connect":    "{timeout: 200ms}",
		"pentad.io/slowStart":  "10s",
		"pentad.io/loadBalanc": "",
	}, s)
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	if s.Balance != service.Random || s.Breaker.Failures != 3 || s.Breaker.Ejection != 5*time.Second || s.Breaker.MaxEjected != 50 ||
		s.Health.Probe != service.ProbeHTTP || s.Health.Path != "/ready" || s.OnDown != service.Keep || !s.Silent ||
		s.Keepalive.Idle != 20*time.Second || s.ConnectTimeout != 200*time.Millisecond || s.SlowStart != 10*time.Second {
		t.Errorf("read %+v", s)
	}
}

func TestAnnotateWrong(t *testing.T) {
	for text, want := range map[string]string{
		"health={probe: exec, command: [/bin/true]}":                   "file of the node",
		"health={probe: postgres, user: a, passwordFile: /etc/shadow}": "file of the node",
		"balance=randum":       "did you mean",
		"breaker={failurs: 3}": "did you mean",
		"connect=5":            "must be a mapping",
		"keepalive=":           "empty",
		"slowStart=[":          "YAML",
	} {
		key, value, _ := strings.Cut(text, "=")
		s := annotatedService()
		errs := Annotate(map[string]string{AnnotationPrefix + key: value, AnnotationPrefix + "onDown": "keep"}, s)
		if len(errs) != 1 || !strings.Contains(errs[0].Error(), want) || !strings.Contains(errs[0].Error(), AnnotationPrefix+key) {
			t.Errorf("%s: %v, want one that says %q", text, errs, want)
		}
		if s.OnDown != service.Keep {
			t.Errorf("%s: the annotation beside it does not hold", text)
		}
		if s.Health.Probe != service.ProbeNone || s.Balance != service.LeastLatency {
			t.Errorf("%s: half of it holds: %+v", text, s)
		}
	}
}
