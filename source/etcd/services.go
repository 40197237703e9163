package etcd

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/service"
	"github.com/pentad/pentad/source"
)

// ServicesPrefix is where the services of a fleet lie, below the prefix of all: one key
// each, its value the mapping that stands below `services` in a file.
const ServicesPrefix = "/services/"

// Source is the services of a fleet that one host takes.
type Source struct {
	follower Follower
	labels   map[string]string // of this host
	log      *slog.Logger

	objects map[string]entry // by name; owned by Run

	mu    sync.Mutex
	since time.Time // etcd has not answered since; zero: it does
	why   error
}

// entry is what became of a key.
type entry struct {
	object  *config.Object // the last one that was valid; nil: none was
	created int64          // revision of etcd
	written int64          // the same, of its last write
	problem string         // what is wrong with the newest
}

// New returns the source of a host with these labels; the client is one of Connect.
func New(client *clientv3.Client, c *config.Etcd, labels map[string]string, log *slog.Logger) *Source {
	return &Source{follower: Follower{Client: client, Prefix: c.Prefix + ServicesPrefix, Config: c}, labels: labels, log: log, objects: make(map[string]entry)}
}

// Away tells since when etcd has not answered, and why; zero and nil: it does.
func (s *Source) Away() (time.Time, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.since, s.why
}

func (s *Source) note(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case err == nil && !s.since.IsZero():
		s.log.Info("etcd answers again", "source", "etcd", "away", time.Since(s.since).Round(time.Second))
		s.since, s.why = time.Time{}, nil
	case err == nil:
	case s.since.IsZero():
		s.since, s.why = time.Now(), err
		s.log.Warn("etcd does not answer; what it said last stays in force", "source", "etcd", "error", err)
	default:
		s.why = err
	}
}

// How long is waited before etcd is asked again.
const (
	retryFirst = 100 * time.Millisecond
	retryMost  = 5 * time.Second
)

// Run emits what the fleet has for this host each time that it changes, until the context
// ends. An etcd that is away is no reason to emit anything.
func (s *Source) Run(ctx context.Context, emit func(source.Update)) {
	for backoff := retryFirst; ctx.Err() == nil; backoff = min(2*backoff, retryMost) {
		began := time.Now()
		err := s.follower.Do(ctx, func(c Change) {
			s.note(nil)
			s.take(c)
			emit(s.update())
		})
		if ctx.Err() != nil {
			return
		}
		s.note(err)
		if time.Since(began) > retryMost {
			backoff = retryFirst
		}
		select {
		case <-ctx.Done():
		case <-time.After(backoff):
		}
	}
}

// take reads the objects that changed.
func (s *Source) take(c Change) {
	which := c.Which
	if c.Fresh {
		which = which[:0]
		for name := range c.All {
			which = append(which, name)
		}
		for name := range s.objects {
			if _, ok := c.All[name]; !ok {
				delete(s.objects, name)
			}
		}
	}
	for _, name := range which {
		k, ok := c.All[name]
		if !ok {
			delete(s.objects, name)
			continue
		}
		s.objects[name] = read(k, s.objects[name])
	}
}

// maxObject bounds a value: what is larger was not written for this.
const maxObject = 1 << 20

// read reads one object. Of one that is not valid what it was before stays, for as long as
// it is the same one.
func read(k Key, was entry) entry {
	e := entry{created: k.Created, written: k.Modified}
	if was.created == k.Created {
		e.object = was.object
	}
	if len(k.Value) > maxObject {
		e.problem = fmt.Sprintf("it has %d bytes; at most %d are read", len(k.Value), maxObject)
		return e
	}
	o, err := config.ParseObject(k.Name, k.Value)
	if err != nil {
		e.problem = err.Error()
		return e
	}
	if e.object != nil {
		keep(e.object.Services, o.Services)
	}
	e.object = o
	return e
}

// keep has services that did not change be the same pointers.
func keep(last, next []*service.Service) {
	for i, s := range next {
		if j := slices.IndexFunc(last, func(o *service.Service) bool { return o.Name == s.Name && o.Equal(s) }); j >= 0 {
			next[i] = last[j]
		}
	}
}

// update is all that this host takes. Of two objects that want the same listener the older
// one has it, on all hosts.
func (s *Source) update() source.Update {
	u := source.Update{From: service.SourceEtcd}
	var names []string
	written := make(map[string]int64, len(s.objects))
	for name, e := range s.objects {
		written[name] = e.written
		if e.problem != "" {
			text := e.problem
			if e.object != nil {
				text += "; what it said before stays in force"
			}
			u.Problems = append(u.Problems, source.Problem{Object: "service " + name, Message: text})
		}
		if e.object != nil && e.object.Takes(s.labels) {
			names = append(names, name)
		}
	}
	slices.SortFunc(names, func(a, b string) int {
		return cmp.Or(cmp.Compare(s.objects[a].created, s.objects[b].created), cmp.Compare(a, b))
	})
	bySource := make([][]*service.Service, len(names))
	for i, name := range names {
		bySource[i] = s.objects[name].object.Services
		for _, w := range s.objects[name].object.Warnings {
			u.Problems = append(u.Problems, source.Problem{Object: "service " + name, Message: w.Error()})
		}
	}
	u.Digest = digestOf(written)
	merged, lost := service.Merge(bySource...)
	u.Services = slices.Clone(merged)
	slices.SortFunc(u.Services, func(a, b *service.Service) int { return cmp.Compare(a.Name, b.Name) })
	for _, text := range lost {
		u.Problems = append(u.Problems, source.Problem{Object: "services", Message: text})
	}
	slices.SortFunc(u.Problems, func(a, b source.Problem) int {
		return cmp.Or(cmp.Compare(a.Object, b.Object), cmp.Compare(a.Message, b.Message))
	})
	return u
}
