package agent

import (
	"fmt"
	"strings"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/config"
)

// Captures implements api.Agent.
func (a *Agent) Captures() []api.Capture {
	all := []api.Capture{}
	a.mu.Lock()
	c := a.known.config
	a.mu.Unlock()
	if c == nil {
		return all
	}
	for _, x := range c.Captures {
		out := api.Capture{Name: x.Name, Mode: x.Mode.String(), Whose: whose(&x), Where: where(&x), Proxy: x.Proxy, Down: "refuse"}
		if x.Direct {
			out.Down = "direct"
		}
		for _, p := range []struct {
			name string
			is   bool
		}{{"tcp", x.TCP}, {"udp", x.UDP}} {
			if p.is {
				out.Protocol = append(out.Protocol, p.name)
			}
		}
		for _, at := range x.To {
			out.To = append(out.To, at.String())
		}
		all = append(all, out)
	}
	return all
}

// whose says in words whose connections a capture takes.
func whose(c *config.Capture) string {
	if c.Interface != "" {
		return "what arrives at " + c.Interface
	}
	text := "processes"
	for _, part := range []struct{ what, value string }{{"below the cgroup", c.Cgroup}, {"of the user", c.User}, {"of the group", c.Group}} {
		if part.value != "" {
			text += " " + part.what + " " + part.value
		}
	}
	return text
}

// where says in words to which destinations they go.
func where(c *config.Capture) string {
	text := "everywhere"
	if len(c.Destinations) > 0 {
		text = joined(c.Destinations)
	}
	if len(c.Ports) > 0 {
		text += ", ports " + portsText(c.Ports)
	}
	if len(c.Except) > 0 {
		text += ", but not " + joined(c.Except)
	}
	return text
}

func joined[T any](all []T) string {
	texts := make([]string, len(all))
	for i, x := range all {
		texts[i] = fmt.Sprint(x)
	}
	return strings.Join(texts, ", ")
}

// portsText writes ranges of ports as the configuration does.
func portsText(all []config.PortRange) string {
	texts := make([]string, len(all))
	for i, r := range all {
		texts[i] = fmt.Sprint(r.First)
		if r.Last != r.First {
			texts[i] += fmt.Sprint("-", r.Last)
		}
	}
	return strings.Join(texts, ", ")
}
