package view

import (
	"context"
	"net/netip"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/flow"
	"github.com/pentad/pentad/plane/capture"
	"github.com/pentad/pentad/plane/director"
	"github.com/pentad/pentad/plane/nat"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
)

// Explainer answers questions with one look at the kernel.
type Explainer struct {
	kernel    *socket.View // nil: packets are asked for
	packets   *nat.View
	captures  *capture.View
	directed  *director.View
	client    netip.Addr
	warnings  []string
	announced api.Announcements
	owners    map[service.Listener][]string
	// Services that listen for sockets of this host, where packets are asked for.
	unforwarded map[service.Listener][]string
}

// NewExplainer looks at the kernel. With a valid client it explains packets from that
// address, else connections of sockets.
func NewExplainer(ctx context.Context, at Places, client netip.Addr) (*Explainer, error) {
	e := &Explainer{client: client, owners: make(map[service.Listener][]string)}
	var err error
	if e.packets, err = readPackets(); err != nil {
		return nil, err
	}
	if e.captures, err = capture.Read(at.Pins); err != nil {
		return nil, err
	}
	if e.directed, err = director.Read(at.Pins); err != nil {
		return nil, err
	}
	for _, x := range e.directed.VIPs {
		if !client.IsValid() {
			break // to sockets of this host it is a service as others are
		}
		e.owners[x.Listener] = append(e.owners[x.Listener], x.Service)
	}
	for _, m := range e.packets.Mappings {
		e.owners[m.Listener.At()] = append(e.owners[m.Listener.At()], m.Service)
	}
	if client.IsValid() {
		e.readUnforwarded(at.Pins)
	} else {
		if e.kernel, err = socket.Read(at.Pins); err != nil {
			return nil, err
		}
		for _, s := range e.kernel.Services {
			for _, l := range s.Listeners {
				e.owners[l.At()] = append(e.owners[l.At()], s.Name)
			}
		}
	}
	// With the agent dead what the kernel does can be explained all the same.
	agent := api.NewClient(at.RunDir)
	if running, err := agent.Status(ctx); err == nil {
		e.warnings = running.Warnings
	}
	if client.IsValid() {
		e.announced, _ = agent.Announcements(ctx)
	}
	return e, nil
}

// readUnforwarded reads which services answer sockets of this host. There may be none.
func (e *Explainer) readUnforwarded(pins string) {
	e.unforwarded = make(map[service.Listener][]string)
	v, err := socket.Read(pins)
	if err != nil {
		return
	}
	for _, s := range v.Services {
		for _, l := range s.Listeners {
			e.unforwarded[l.At()] = append(e.unforwarded[l.At()], s.Name)
		}
	}
}

// Explain answers one question.
func (e *Explainer) Explain(q flow.Question) (*flow.Explanation, error) {
	x, err := e.walk(q)
	if err != nil {
		return nil, err
	}
	x.AddWarnings(q, e.owners[service.Listener{Address: q.Destination, Protocol: q.Protocol}], e.warnings)
	return x, nil
}

func (e *Explainer) walk(q flow.Question) (*flow.Explanation, error) {
	if e.client.IsValid() {
		if v, ok := e.directed.Find(service.Listener{Address: q.Destination, Protocol: q.Protocol}); ok {
			x := flow.ExplainDirected(e.directed, v, e.client, q)
			x.AddAnnouncement(e.announced, q)
			return x, nil
		}
		x := flow.ExplainPackets(e.packets, e.client, q)
		x.AddOwnServices(e.unforwarded[service.Listener{Address: q.Destination, Protocol: q.Protocol}])
		x.AddCapturedPackets(e.captures, e.client, q)
		x.AddAnnouncement(e.announced, q)
		return x, nil
	}
	x, err := flow.Explain(e.kernel, q)
	if err != nil {
		return x, err
	}
	x.AddPackets(e.packets, q)
	return x, x.AddCapture(e.captures, q)
}
