package nat

import (
	"fmt"
	"os"
	"strings"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/service"
)

// forwarding is the setting by which a host passes packets on, as sysctl(8) names it.
func forwarding(f service.Family) string {
	if f == service.V4 {
		return "net.ipv4.ip_forward"
	}
	return "net.ipv6.conf.all.forwarding"
}

// warnOfForwarding says that this host passes no packets on, which a service needs.
func warnOfForwarding(f service.Family, name string) []string {
	setting := forwarding(f)
	b, err := os.ReadFile("/proc/sys/" + strings.ReplaceAll(setting, ".", "/"))
	if err != nil || strings.TrimSpace(string(b)) != "0" {
		return nil
	}
	return []string{fmt.Sprintf("%s is 0: what other hosts send to services such as %s does not get to backends on others; sysctl -w %s=1", setting, name, setting)}
}

// notePassed notes of each family a service of which this host has to pass packets on.
func (p *Plane) notePassed(services *service.Snapshot) {
	own, _ := host.Addresses() // on an error there is none
	passed := make(map[service.Family]string)
	for _, s := range services.Services {
		if len(places(s)) == 0 {
			continue
		}
		for _, b := range s.Backends {
			if f := service.FamilyOf(b.Address.Addr()); passed[f] == "" && !own[b.Address.Addr()] {
				passed[f] = s.Name
			}
		}
	}
	p.saidMu.Lock()
	p.passed = passed
	p.saidMu.Unlock()
}
