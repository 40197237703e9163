package config

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"go.yaml.in/yaml/v4"

	"github.com/pentad/pentad/service"
)

// warn finds what is valid and most likely not meant.
func (d *decoder) warn(c *Config) {
	vips := make(map[service.Listener]*service.Service)
	for _, s := range c.Services {
		for _, l := range s.Listeners {
			vips[l.At()] = s
		}
	}
	for _, s := range c.Services {
		at := d.at[s]
		if d.disabled[s] {
			continue
		}
		d.warnChains(s, at, vips)
		if len(s.Backends) > 0 && !usable(s) {
			d.warnAt(at, at.name, "service %s: every backend has weight 0 or is drained: connections are refused", s.Name)
		}
		if s.Health.Probe == service.ProbeNone && s.Breaker.Failures == 0 && !onlyUDP(s) && len(s.Backends) > 1 {
			d.warnAt(at, at.name, "service %s: without a probe and without a breaker a dead backend gets connections for ever", s.Name)
		}
	}
}

func (d *decoder) warnAt(at *origin, n *yaml.Node, format string, args ...any) {
	here := &decoder{file: at.file}
	d.warnings = append(d.warnings, here.problem(n, format, args...))
}

func usable(s *service.Service) bool {
	for _, b := range s.Backends {
		if b.Usable() {
			return true
		}
	}
	return false
}

// warnChains finds backends that are virtual addresses themselves: what is translated
// once is not translated again.
func (d *decoder) warnChains(s *service.Service, at *origin, vips map[service.Listener]*service.Service) {
	for i, b := range s.Backends {
		for _, l := range s.Listeners {
			owner := vips[service.Listener{Address: b.Address, Protocol: l.Protocol}]
			if owner == nil || i >= len(at.backendNodes) {
				continue
			}
			whose := fmt.Sprintf("of the service %s", owner.Name)
			if owner == s {
				whose = "of this service"
			}
			d.warnAt(at, at.backendNodes[i], "service %s: backend %s is itself a listener %s; what is translated once is not translated again, "+
				"so that connections go to that address itself", s.Name, b.Address, whose)
			break
		}
	}
}

// need is something outside of the file that it names.
type need struct {
	problem Error // if it is missing
	is      func(cgroups string) bool
}

// needs lists what the file names and the host should have.
func (d *decoder) needs(c *Config, scope *yaml.Node) (all []need) {
	if scope != nil {
		all = append(all,
			need{d.problem(scope, "scope.cgroup: %s is written with the place where cgroups are mounted; write the path below it", c.Scope.Cgroup),
				func(cgroups string) bool { return !strings.HasPrefix(c.Scope.Cgroup+"/", cgroups+"/") }},
			need{d.problem(scope, "scope.cgroup: there is no cgroup %s on this host now; nothing is translated until there is", c.Scope.Cgroup),
				func(cgroups string) bool {
					return strings.HasPrefix(c.Scope.Cgroup+"/", cgroups+"/") || isThere(filepath.Join(cgroups, c.Scope.Cgroup))
				}})
	}
	for _, s := range c.Services {
		at := d.at[s].health
		if at == nil {
			continue
		}
		here := &decoder{file: d.at[s].file}
		if f := s.Health.PasswordFile; f != "" {
			all = append(all, need{here.problem(at, "service %s: there is no password file %s on this host", s.Name, f), func(string) bool { return isThere(f) }})
		}
		if s.Health.Probe == service.ProbeExec {
			program := s.Health.Command.Args()[0]
			all = append(all, need{here.problem(at, "service %s: there is no program %s on this host", s.Name, program), func(string) bool { return isProgram(program) }})
		}
	}
	return all
}

// CheckHost finds what a configuration names and this host has not. It is apart from
// Parse because a file may be checked on another machine. cgroups is where they are
// mounted.
func (c *Config) CheckHost(cgroups string) Errors {
	var missing Errors
	for _, n := range c.needs {
		if !n.is(cgroups) {
			missing = append(missing, n.problem)
		}
	}
	return missing
}

func isThere(path string) bool {
	_, err := os.Stat(path)
	return err == nil || !os.IsNotExist(err)
}

func isProgram(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0
}
