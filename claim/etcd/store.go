// Package etcd keeps blocks in etcd: one key each, PREFIX/blocks/NAME.
package etcd

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/pentad/pentad/claim"
	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/source/etcd"
)

// Store is the blocks under a prefix of etcd.
type Store struct {
	client   *clientv3.Client
	prefix   string
	follower etcd.Follower
}

// New returns the store of blocks of a fleet; the client is one of etcd.Connect.
func New(client *clientv3.Client, c *config.Etcd) *Store {
	prefix := c.Prefix + "/blocks/"
	return &Store{client, prefix, etcd.Follower{Client: client, Prefix: prefix, Config: c}}
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

// Follow implements claim.Store.
func (s *Store) Follow(ctx context.Context, emit func(claim.Table)) error {
	return s.follower.Do(ctx, func(c etcd.Change) {
		t := claim.NewTable(c.Fresh)
		for _, name := range slices.Sorted(maps.Keys(c.All)) {
			k := c.All[name]
			b, err := claim.Decode(name, k.Value)
			b.ID, b.Revision = strconv.FormatInt(k.Created, 10), strconv.FormatInt(k.Modified, 10)
			t.Add(name, b, err)
		}
		emit(t)
	})
}
