package agent

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/service"
	"github.com/pentad/pentad/source"
	"github.com/pentad/pentad/source/etcd"
)

// fleet follows the etcd that the file names, and another one when it names another. Its
// methods may be called from several goroutines, but follow from one.
type fleet struct {
	log  *slog.Logger
	emit func(context.Context, source.Update)
	say  func() etcd.Report // what this host says of itself

	config *config.Config // that is followed; nil: none
	errand

	mu     sync.Mutex
	source *etcd.Source // nil: not connected
	err    error        // why not
}

// follow follows what is configured from now on, until the context ends.
func (f *fleet) follow(ctx context.Context, next *config.Config) {
	if next.Source.Etcd == nil {
		next = nil
	}
	if next != nil && f.config != nil && next.Source.Etcd.Equal(f.config.Source.Etcd) && next.Host.Equal(f.config.Host) {
		return
	}
	f.close()
	f.config = next
	if next == nil {
		return
	}
	f.begin(ctx, func(ctx context.Context) { f.do(ctx, next) })
}

// close follows nothing any more.
func (f *fleet) close() {
	if f.end() {
		f.config = nil
		f.note(nil, nil)
	}
}

func (f *fleet) note(s *etcd.Source, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.source, f.err = s, err
}

// do emits what the fleet has for this host until the context ends.
func (f *fleet) do(ctx context.Context, c *config.Config) {
	untilConnected(ctx, func() (func(context.Context), error) {
		client, err := etcd.Connect(ctx, c.Source.Etcd)
		if err != nil {
			f.note(nil, err)
			return nil, err
		}
		s := etcd.New(client, c.Source.Etcd, c.Host.Labels, f.log)
		f.note(s, nil)
		return func(ctx context.Context) {
			var reporting sync.WaitGroup
			reporting.Go(func() { f.report(ctx, client, c) })
			s.Run(ctx, func(u source.Update) { f.emit(ctx, u) })
			reporting.Wait()
			_ = client.Close() // it is gone either way
		}, nil
	}, func(err error) {
		f.log.Error("etcd cannot be followed; it is tried again until it can", "source", "etcd", "error", err)
	})
}

// report tells the fleet how this host is.
func (f *fleet) report(ctx context.Context, client *clientv3.Client, c *config.Config) {
	name, err := fleetName(c.Host)
	if err != nil {
		f.log.Error("this host does not report to its fleet", "error", err)
		return
	}
	etcd.KeepReporting(ctx, client, c.Source.Etcd.Prefix, name, func() etcd.Report {
		r := f.say()
		r.Labels = c.Host.Labels
		return r
	})
}

// mostReported bounds what a host says of its problems.
const mostReported = 5

// report is what this host says of itself.
func (a *Agent) report() etcd.Report {
	s := a.Status()
	a.mu.Lock()
	defer a.mu.Unlock()
	r := etcd.Report{Version: s.Version, Started: s.Started.UTC(), Services: len(a.known.services.Services), Digest: a.inForce, Warnings: len(s.Warnings)}
	for i, p := range s.Problems {
		if i == mostReported {
			r.Problems = append(r.Problems, fmt.Sprintf("and %d more", len(s.Problems)-i))
			break
		}
		r.Problems = append(r.Problems, p)
	}
	return r
}

// away tells since when etcd has not answered, and why; zero and nil: it does.
func (f *fleet) away() (since time.Time, why error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.source == nil {
		return time.Time{}, f.err
	}
	return f.source.Away()
}

// addFleet puts the state of the fleet into a status; the caller holds mu.
func (a *Agent) addFleet(s *api.Status) {
	c := a.known.config
	if c == nil || c.Source.Etcd == nil {
		return
	}
	in := &a.inbox
	since, why := a.fleet.away()
	s.Fleet = &api.Fleet{Services: len(in.etcd.Services), Away: since, Changed: in.etcd.changed, Updates: in.etcd.count}
	if why != nil {
		s.Fleet.Why = why.Error()
	}
	if in.silent.Has(service.SourceEtcd) {
		s.Problems = append(s.Problems, "etcd has not answered yet: services of the fleet stay as the agent before left them")
	}
	for _, p := range in.etcd.Problems {
		s.Warnings = append(s.Warnings, "etcd: "+p.Object+": "+p.Message)
	}
}
