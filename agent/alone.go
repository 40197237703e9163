package agent

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/health"
	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/plane/nat"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
)

// DrainAlone does what a DrainRequest asks for where no agent runs: the kernel is told
// by this process, and the next agent finds it so. What only an agent can do it refuses.
func DrainAlone(opts Options, r api.DrainRequest) (api.DrainAnswer, error) {
	if r.Timeout != 0 {
		return api.DrainAnswer{}, fmt.Errorf("%w: no agent runs, which would close what is left after the time-out; without --timeout the kernel is told all the same", api.ErrRefused)
	}
	if there, _, err := nat.Installed(); err != nil || there {
		return api.DrainAnswer{}, fmt.Errorf("%w: no agent runs, which would tell the table for packets from elsewhere, too", cmp.Or(err, api.ErrRefused))
	}
	lock, err := host.Lock(opts.Pins)
	if err != nil {
		return api.DrainAnswer{}, err
	}
	defer lock.Close()
	v, err := socket.Read(opts.Pins)
	if errors.Is(err, socket.ErrNothingInstalled) {
		err = fmt.Errorf("%w: no agent runs, and nothing of pentad is in this kernel", api.ErrRefused)
	}
	if err != nil {
		return api.DrainAnswer{}, err
	}
	a := &Agent{opts: opts, log: slog.New(slog.DiscardHandler), states: make(states), known: &known{services: (&service.Snapshot{}).Next(v.Services)}}
	a.recallStates(v.Services)
	if err := a.loadDrains(); err != nil {
		return api.DrainAnswer{}, err
	}
	// What is drained and no operator has drained the file drains.
	a.inbox.file.Config, a.inbox.file.Services = &config.Config{}, a.configured(v.Services)
	p, err := a.prepareDrain(drain{DrainRequest: r}, time.Now())
	if err != nil {
		return api.DrainAnswer{}, err
	}
	for k, st := range p.set {
		a.states.set(k, st)
	}
	// The next agent believes the file: it comes first.
	if err := a.writeDrains(); err != nil {
		return api.DrainAnswer{}, err
	}
	next := a.known.services.Next(a.states.over(a.inbox.file.Services, time.Now()))
	if err := socket.Revise(socket.Options{Pins: opts.Pins, Version: opts.Version}, next); err != nil {
		return api.DrainAnswer{}, err
	}
	return p.answer, nil
}

// configured returns services as they were before anything was known of their backends.
func (a *Agent) configured(services []*service.Service) []*service.Service {
	out := make([]*service.Service, len(services))
	for i, s := range services {
		c := *s
		c.Backends = make([]service.Backend, len(s.Backends))
		for j, b := range s.Backends {
			byOperator := a.states[health.Key{Service: s.Name, Address: b.Address}].drained
			b.Down, b.Drained, b.DrainOver, b.DrainUntil = false, b.Drained && !byOperator, false, 0
			c.Backends[j] = b
		}
		out[i] = &c
	}
	return out
}
