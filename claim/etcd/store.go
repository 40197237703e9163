// Package etcd keeps blocks in etcd: one key each, PREFIX/blocks/NAME.
package etcd

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/pentad/pentad/claim"
)

// Store is the blocks under a prefix of etcd.
type Store struct {
	client *clientv3.Client
	prefix string
}

// New returns the store of blocks under a prefix without a slash at its end.
func New(client *clientv3.Client, prefix string) *Store {
	return &Store{client, prefix + "/blocks/"}
}

func (s *Store) key(b claim.Block) string { return s.prefix + claim.Key(b.Name()) }

// Create implements claim.Store: etcd makes the key if there is none, in one step.
func (s *Store) Create(ctx context.Context, b claim.Block) error {
	value, err := json.Marshal(claim.RecordOf(b))
	if err != nil {
		return err
	}
	return s.when(ctx, clientv3.Compare(clientv3.CreateRevision(s.key(b)), "=", 0), clientv3.OpPut(s.key(b), string(value)), claim.ErrTaken)
}

// Update implements claim.Store.
func (s *Store) Update(ctx context.Context, b claim.Block) error {
	value, err := json.Marshal(claim.RecordOf(b))
	if err != nil {
		return err
	}
	return s.unchanged(ctx, b, clientv3.OpPut(s.key(b), string(value)))
}

// Delete implements claim.Store.
func (s *Store) Delete(ctx context.Context, b claim.Block) error {
	return s.unchanged(ctx, b, clientv3.OpDelete(s.key(b)))
}

func (s *Store) unchanged(ctx context.Context, b claim.Block, do clientv3.Op) error {
	revision, err := strconv.ParseInt(b.Revision, 10, 64)
	if err != nil {
		return fmt.Errorf("%w: its revision is %q", claim.ErrChanged, b.Revision)
	}
	return s.when(ctx, clientv3.Compare(clientv3.ModRevision(s.key(b)), "=", revision), do, claim.ErrChanged)
}

func (s *Store) when(ctx context.Context, is clientv3.Cmp, do clientv3.Op, otherwise error) error {
	r, err := s.client.Txn(ctx).If(is).Then(do).Commit()
	if err != nil {
		return err
	}
	if !r.Succeeded {
		return otherwise
	}
	return nil
}

// Times of following.
const (
	readPatience = 10 * time.Second
	// A member that is cut off from the others, or is gone without a word, is noticed
	// by asking.
	askEvery    = 5 * time.Second
	askPatience = 5 * time.Second
)

// Follow implements claim.Store. Reads of etcd are linearizable unless one asks for less.
func (s *Store) Follow(ctx context.Context, emit func(claim.Table)) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	read, done := context.WithTimeout(ctx, readPatience)
	defer done()
	r, err := s.client.Get(read, s.prefix, clientv3.WithPrefix())
	if err != nil {
		return err
	}
	objects := make(map[string]object, len(r.Kvs))
	for _, kv := range r.Kvs {
		objects[string(kv.Key)] = s.object(string(kv.Key), kv.Value, kv.CreateRevision, kv.ModRevision)
	}
	emit(tableOf(objects, true))
	ask := time.NewTicker(askEvery)
	defer ask.Stop()
	changes := s.client.Watch(clientv3.WithRequireLeader(ctx), s.prefix, clientv3.WithPrefix(), clientv3.WithRev(r.Header.Revision+1))
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ask.C:
			if err := s.ask(ctx); err != nil {
				return err
			}
		case c, ok := <-changes:
			if !ok {
				return fmt.Errorf("the watch of %s has ended", s.prefix)
			}
			if err := c.Err(); err != nil {
				return err // among them that its revision was compacted: it is read anew
			}
			if len(c.Events) == 0 {
				continue
			}
			for _, e := range c.Events {
				key := string(e.Kv.Key)
				if e.Type == clientv3.EventTypeDelete {
					delete(objects, key)
					continue
				}
				objects[key] = s.object(key, e.Kv.Value, e.Kv.CreateRevision, e.Kv.ModRevision)
			}
			emit(tableOf(objects, false))
		}
	}
}

// ask asks for something that only a majority can answer.
func (s *Store) ask(ctx context.Context) error {
	ctx, stop := context.WithTimeout(ctx, askPatience)
	defer stop()
	_, err := s.client.Get(ctx, s.prefix, clientv3.WithCountOnly())
	return err
}

// object is a key as it was read.
type object struct {
	name  string
	block claim.Block
	err   error
}

func (s *Store) object(key string, value []byte, created, modified int64) object {
	name := strings.TrimPrefix(key, s.prefix)
	b, err := claim.Decode(name, value)
	b.ID, b.Revision = strconv.FormatInt(created, 10), strconv.FormatInt(modified, 10)
	return object{name, b, err}
}

func tableOf(objects map[string]object, fresh bool) claim.Table {
	t := claim.NewTable(fresh)
	for _, key := range slices.Sorted(maps.Keys(objects)) {
		t.Add(objects[key].name, objects[key].block, objects[key].err)
	}
	return t
}
