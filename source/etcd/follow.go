package etcd

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/pentad/pentad/config"
)

// Key is a key as it was read.
type Key struct {
	Name              string // below the prefix
	Value             []byte
	Created, Modified int64 // revisions of etcd
}

// Change is what is known after something has changed.
type Change struct {
	All   map[string]Key // by name; it belongs to the follower, and changes with the next call
	Which []string       // names that changed; of no meaning when it is fresh
	Fresh bool           // everything was read anew
}

// Follower follows the keys below a prefix. Its zero value with the first two fields set
// is ready.
type Follower struct {
	Client *clientv3.Client
	Prefix string // ends with a slash
	// Config is how the client reaches etcd: to say why it does not. nil: it is not said.
	Config *config.Etcd

	cluster  uint64 // that was read last
	revision int64
}

// Times of following.
const (
	readPatience = 10 * time.Second
	// A member that is cut off from the others, or is gone without a word, is noticed
	// by asking.
	askEvery    = 5 * time.Second
	askPatience = 5 * time.Second
	// Changes that come together are told together.
	gather = 5 * time.Millisecond
)

// ErrPast says that an etcd knows less than it once did, or is another one: it was made
// anew, or from a backup. What was known stays.
var ErrPast = errors.New("this etcd is not the one that was followed, or was set back; what was known stays in force. If that is meant, restart the agent: pentad then takes what is there now")

// Do emits what there is, and again after changes, until the context ends or etcd does not
// answer: then it returns why. Reads are linearizable, so that the first that is emitted
// each time is not older than the call.
func (f *Follower) Do(ctx context.Context, emit func(Change)) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	all, err := f.read(ctx)
	if err != nil {
		return f.explain(ctx, err)
	}
	emit(Change{All: all, Fresh: true})
	ask := time.NewTicker(askEvery)
	defer ask.Stop()
	changes := f.Client.Watch(clientv3.WithRequireLeader(ctx), f.Prefix, clientv3.WithPrefix(), clientv3.WithRev(f.revision+1))
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ask.C:
			if err := f.ask(ctx); err != nil {
				return f.explain(ctx, err)
			}
		case c, ok := <-changes:
			which, err := f.take(all, c, ok)
			if err != nil {
				return err
			}
			more, err := f.drain(ctx, all, changes)
			if which = append(which, more...); len(which) > 0 {
				emit(Change{All: all, Which: which})
			}
			if err != nil {
				return err
			}
		}
	}
}

func (f *Follower) explain(ctx context.Context, err error) error {
	if f.Config == nil {
		return err
	}
	return Explain(ctx, f.Config, err)
}

// drain takes what comes within a moment.
func (f *Follower) drain(ctx context.Context, all map[string]Key, changes clientv3.WatchChan) (which []string, err error) {
	over := time.After(gather)
	for {
		select {
		case <-ctx.Done():
			return which, ctx.Err()
		case <-over:
			return which, nil
		case c, ok := <-changes:
			some, err := f.take(all, c, ok)
			if which = append(which, some...); err != nil {
				return which, err
			}
		}
	}
}

// take puts changes into what is known, and returns the names of the keys.
func (f *Follower) take(all map[string]Key, c clientv3.WatchResponse, ok bool) (which []string, err error) {
	if !ok {
		return nil, fmt.Errorf("the watch of %s has ended", f.Prefix)
	}
	if err := c.Err(); err != nil {
		return nil, err // among them that its revision was compacted: all is read anew
	}
	f.revision = max(f.revision, c.Header.Revision)
	for _, e := range c.Events {
		name := strings.TrimPrefix(string(e.Kv.Key), f.Prefix)
		which = append(which, name)
		if e.Type == clientv3.EventTypeDelete {
			delete(all, name)
			continue
		}
		all[name] = Key{name, e.Kv.Value, e.Kv.CreateRevision, e.Kv.ModRevision}
	}
	return which, nil
}

// pageSize is how many keys are read at once: an answer has a bound of its own.
const pageSize = 5000

// read reads everything, of one moment.
func (f *Follower) read(ctx context.Context) (map[string]Key, error) {
	ctx, done := context.WithTimeout(ctx, readPatience)
	defer done()
	all := make(map[string]Key)
	from, end, at := f.Prefix, clientv3.GetPrefixRangeEnd(f.Prefix), int64(0)
	for {
		r, err := f.Client.Get(ctx, from, clientv3.WithRange(end), clientv3.WithLimit(pageSize), clientv3.WithRev(at))
		if err != nil {
			return nil, err
		}
		if at == 0 {
			if f.cluster != 0 && (r.Header.ClusterId != f.cluster || r.Header.Revision < f.revision) {
				return nil, ErrPast
			}
			f.cluster, at = r.Header.ClusterId, r.Header.Revision
		}
		for _, kv := range r.Kvs {
			name := strings.TrimPrefix(string(kv.Key), f.Prefix)
			all[name] = Key{name, kv.Value, kv.CreateRevision, kv.ModRevision}
		}
		if !r.More || len(r.Kvs) == 0 {
			f.revision = at
			return all, nil
		}
		from = string(r.Kvs[len(r.Kvs)-1].Key) + "\x00"
	}
}

// ask asks for something that only a majority can answer.
func (f *Follower) ask(ctx context.Context) error {
	ctx, stop := context.WithTimeout(ctx, askPatience)
	defer stop()
	_, err := f.Client.Get(ctx, f.Prefix, clientv3.WithCountOnly())
	return err
}
