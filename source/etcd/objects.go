package etcd

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/pentad/pentad/config"
)

// Objects are the services of a fleet, for those who write them.
type Objects struct {
	Client *clientv3.Client
	Prefix string // of all keys, without a slash at its end
}

// Stored is an object as it lies there.
type Stored struct {
	config.ObjectText
	Modified int64 // revision of etcd; 0: there is none
}

// Edit is what becomes of one object.
type Edit struct {
	Name   string  `json:"name"`
	Before *string `json:"before"` // nil: there was none
	After  *string `json:"after"`  // nil: it was deleted
}

// Record says who changed what, and when.
type Record struct {
	ID    string    `json:"id"` // it grows with time
	By    string    `json:"by"`
	At    time.Time `json:"at"`
	Why   string    `json:"why,omitempty"`
	Edits []Edit    `json:"edits"`
}

// historyPrefix is where records lie, below the prefix of all.
const historyPrefix = "/history/"

// Bounds of what is written.
const (
	// editsAtOnce is how many objects are written in one transaction: etcd takes 128
	// operations (--max-txn-ops), of which one is the record.
	editsAtOnce = 120
	// maxRecords is how many records are kept.
	maxRecords = 1000
)

// ErrConflict says that somebody else has written an object meanwhile.
var ErrConflict = errors.New("somebody else has changed it meanwhile; nothing of this transaction was written")

// All returns all objects, by name, as they were at one moment.
func (o Objects) All(ctx context.Context) ([]Stored, error) {
	f := Follower{Client: o.Client, Prefix: o.Prefix + ServicesPrefix}
	keys, err := f.read(ctx)
	if err != nil {
		return nil, err
	}
	all := make([]Stored, 0, len(keys))
	for _, k := range keys {
		all = append(all, Stored{config.ObjectText{Name: k.Name, Text: k.Value}, k.Modified})
	}
	slices.SortFunc(all, func(a, b Stored) int { return strings.Compare(a.Name, b.Name) })
	return all, nil
}

// Write writes edits, of which each is made only if the object is as it was read, and a
// record of them. Up to 120 edits are one transaction; of more each 120 are, and the error
// says how many were written. before are the objects as they were read.
func (o Objects) Write(ctx context.Context, edits []Edit, before []Stored, by, why string) (written int, err error) {
	modified := make(map[string]int64, len(before))
	for _, s := range before {
		modified[s.Name] = s.Modified
	}
	for some := range slices.Chunk(edits, editsAtOnce) {
		if err := o.writeOnce(ctx, some, modified, by, why); err != nil {
			return written, err
		}
		written += len(some)
	}
	return written, o.trim(ctx)
}

func (o Objects) writeOnce(ctx context.Context, edits []Edit, modified map[string]int64, by, why string) error {
	record := Record{ID: newID(), By: by, At: time.Now().UTC(), Why: why, Edits: edits}
	text, err := json.Marshal(record)
	if err != nil {
		return err
	}
	var when []clientv3.Cmp
	then := []clientv3.Op{clientv3.OpPut(o.Prefix+historyPrefix+record.ID, string(text))}
	for _, e := range edits {
		key := o.Prefix + ServicesPrefix + e.Name
		when = append(when, clientv3.Compare(clientv3.ModRevision(key), "=", modified[e.Name]))
		if e.After == nil {
			then = append(then, clientv3.OpDelete(key))
		} else {
			then = append(then, clientv3.OpPut(key, *e.After))
		}
	}
	r, err := o.Client.Txn(ctx).If(when...).Then(then...).Commit()
	if err != nil {
		return err
	}
	if !r.Succeeded {
		return ErrConflict
	}
	return nil
}

// newID is one that comes after those of before, as text.
func newID() string {
	var b [4]byte
	_, _ = rand.Read(b[:]) // it does not fail
	return time.Now().UTC().Format("20060102T150405.000000000Z") + "-" + hex.EncodeToString(b[:])
}

// History returns the records of an object, or of all with "", the newest first.
func (o Objects) History(ctx context.Context, name string) ([]Record, error) {
	r, err := o.Client.Get(ctx, o.Prefix+historyPrefix, clientv3.WithPrefix(), clientv3.WithSort(clientv3.SortByKey, clientv3.SortDescend))
	if err != nil {
		return nil, err
	}
	all := []Record{}
	for _, kv := range r.Kvs {
		var record Record
		if json.Unmarshal(kv.Value, &record) != nil {
			continue // it is not of ours
		}
		if name != "" {
			record.Edits = slices.DeleteFunc(record.Edits, func(e Edit) bool { return e.Name != name })
		}
		if len(record.Edits) > 0 {
			all = append(all, record)
		}
	}
	return all, nil
}

// trim forgets the oldest records.
func (o Objects) trim(ctx context.Context) error {
	prefix := o.Prefix + historyPrefix
	r, err := o.Client.Get(ctx, prefix, clientv3.WithPrefix(), clientv3.WithKeysOnly(), clientv3.WithSort(clientv3.SortByKey, clientv3.SortDescend), clientv3.WithLimit(maxRecords+1))
	if err != nil || len(r.Kvs) <= maxRecords {
		return err
	}
	oldest := string(r.Kvs[maxRecords-1].Key)
	if _, err := o.Client.Delete(ctx, prefix, clientv3.WithRange(oldest)); err != nil {
		return fmt.Errorf("old records cannot be deleted: %w", err)
	}
	return nil
}

// Plan returns the edits that make objects what wanted says, and leave all others, or
// delete them too.
func Plan(there []Stored, wanted []config.ObjectText, prune bool) (edits []Edit) {
	has := make(map[string]Stored, len(there))
	for _, s := range there {
		has[s.Name] = s
	}
	keep := make(map[string]bool, len(wanted))
	for _, w := range wanted {
		keep[w.Name] = true
		after := string(w.Text)
		was, ok := has[w.Name]
		if ok && string(was.Text) == after {
			continue
		}
		e := Edit{Name: w.Name, After: &after}
		if ok {
			before := string(was.Text)
			e.Before = &before
		}
		edits = append(edits, e)
	}
	for _, s := range there {
		if prune && !keep[s.Name] {
			before := string(s.Text)
			edits = append(edits, Edit{Name: s.Name, Before: &before})
		}
	}
	return edits
}

// After returns the objects as they are once edits are made.
func After(there []Stored, edits []Edit) (all []config.ObjectText) {
	edited := make(map[string]bool, len(edits))
	for _, e := range edits {
		edited[e.Name] = true
	}
	for _, s := range there {
		if !edited[s.Name] {
			all = append(all, s.ObjectText)
		}
	}
	for _, e := range edits {
		if e.After != nil {
			all = append(all, config.ObjectText{Name: e.Name, Text: []byte(*e.After)})
		}
	}
	return all
}
