package config

import (
	"fmt"
	"slices"
	"strings"

	"go.yaml.in/yaml/v4"

	"github.com/pentad/pentad/service"
)

// AnnotationPrefix stands before a key of a service in the annotations of a
// Kubernetes Service.
const AnnotationPrefix = "pentad.io/"

// annotated are the keys of a service that annotations may have: what Kubernetes
// has no field for.
var annotated = []string{"balance", "breaker", "connect", "flows", "health", "keepalive", "onDown", "slowStart"}

// harmless are the probes that a node makes for whoever may write a Service: what
// they read of a server is little, and they bring nothing that it could keep.
var harmless = []service.Probe{service.ProbeNone, service.ProbeTCP, service.ProbeTLS, service.ProbeHTTP, service.ProbeGRPC}

// Annotate reads the annotations of a Kubernetes Service into what it wants of
// its connections; the values are YAML as in the file, such as "{failures: 3}".
// The service says whether all its listeners are UDP. Annotations of others are
// passed over. What is wrong with one annotation is said of it, and the rest
// holds; a service without annotations has no probe, because Kubernetes tells
// which endpoints are ready.
//
// Whoever may write a Service is not trusted with the node: a probe that runs a
// program there or reads a file is refused.
func Annotate(annotations map[string]string, s *service.Service) []error {
	s.Balance = service.LeastLatency
	s.Health = service.Health{}
	s.Breaker = defaultBreaker(s)
	var errs []error
	for _, name := range sortedKeys(annotations) {
		key, ours := strings.CutPrefix(name, AnnotationPrefix)
		if !ours || !slices.Contains(annotated, key) {
			continue
		}
		d := &decoder{file: name}
		next := *s
		d.annotation(key, annotations[name], &next)
		if err := d.failed(); err != nil {
			messages := make([]string, len(d.errors))
			for i, e := range d.errors {
				messages[i] = e.Message
			}
			errs = append(errs, fmt.Errorf("annotation %s: %s", name, strings.Join(messages, "; ")))
			continue
		}
		*s = next
	}
	return errs
}

func (d *decoder) annotation(key, text string, s *service.Service) {
	value := d.document([]byte(text))
	if value == nil {
		return
	}
	d.at = map[*service.Service]*origin{s: {name: value}}
	f := serviceSchema.find(key)
	f.set(d, resolve(value), s)
	d.checkTogether(map[string]*yaml.Node{key: value}, s)
	if key != "health" {
		return
	}
	switch {
	case s.Health.Probe == service.ProbeExec:
		d.errorf(value, "the exec probe runs a program on every node: it can stand in a file of the node only")
	case s.Health.PasswordFile != "":
		d.errorf(value, "\"passwordFile\" reads a file of every node: it can stand in a file of the node only")
	case !slices.Contains(harmless, s.Health.Probe):
		d.errorf(value, "the %s probe has every node log in to a server: it can stand in a file of the node only", s.Health.Probe)
	}
}

func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
