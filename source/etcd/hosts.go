package etcd

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// Report is what a host says of itself.
type Report struct {
	Name     string            `json:"name"`
	Labels   map[string]string `json:"labels,omitempty"`
	Version  string            `json:"version"`
	Started  time.Time         `json:"started"`            // its agent
	Written  time.Time         `json:"written"`            // this report
	Digest   string            `json:"digest"`             // of the services of the fleet that it has in force
	Services int               `json:"services"`           // that it serves, from everywhere
	Problems []string          `json:"problems,omitempty"` // the first ones
	Warnings int               `json:"warnings"`
}

// Host is a host of a fleet, as its etcd knows it.
type Host struct {
	Report
	Alive bool `json:"alive"` // its agent is connected
	// Behind says that what it has in force is not what lies there now.
	Behind bool `json:"behind"`
}

// Where hosts report, below the prefix of all: what they said last, for ever, and whether
// they live, for as long as they do.
const (
	hostsPrefix = "/hosts/"
	alivePrefix = "/alive/"
)

const (
	// leaseSeconds is after how long a host that is silent is not alive any more.
	leaseSeconds = 15
	// reportEvery is how often it is looked whether a host has something else to say.
	reportEvery = 5 * time.Second
)

// digestOf is the same for hosts that have the same services of a fleet in force, however
// they have learned of them.
func digestOf(modified map[string]int64) string {
	h := sha256.New()
	for _, name := range slices.Sorted(maps.Keys(modified)) {
		fmt.Fprintf(h, "%s %d\n", name, modified[name])
	}
	return hex.EncodeToString(h.Sum(nil)[:6])
}

// KeepReporting writes what a host says of itself, each time that it says something else,
// until the context ends.
func KeepReporting(ctx context.Context, client *clientv3.Client, prefix, name string, say func() Report) {
	for backoff := retryFirst; ctx.Err() == nil; backoff = min(2*backoff, retryMost) {
		began := time.Now()
		// What fails is said by who follows the same etcd.
		_ = report(ctx, client, prefix, name, say)
		if time.Since(began) > retryMost {
			backoff = retryFirst
		}
		select {
		case <-ctx.Done():
		case <-time.After(backoff):
		}
	}
}

// report reports for as long as one lease lives.
func report(ctx context.Context, client *clientv3.Client, prefix, name string, say func() Report) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	lease, err := client.Grant(ctx, leaseSeconds)
	if err != nil {
		return err
	}
	lives, err := client.KeepAlive(ctx, lease.ID)
	if err != nil {
		return err
	}
	if _, err := client.Put(ctx, prefix+alivePrefix+name, "", clientv3.WithLease(lease.ID)); err != nil {
		return err
	}
	look := time.NewTicker(reportEvery)
	defer look.Stop()
	for last := ""; ; {
		r := say()
		r.Name = name
		if text, err := json.Marshal(r); err != nil {
			return err
		} else if string(text) != last {
			last = string(text)
			r.Written = time.Now().UTC()
			if text, err = json.Marshal(r); err != nil {
				return err
			}
			if _, err := client.Put(ctx, prefix+hostsPrefix+name, string(text)); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-look.C:
		case _, ok := <-lives:
			if !ok {
				return fmt.Errorf("the lease of %s has ended", name)
			}
		}
	}
}

// Hosts returns all hosts that have ever reported, by name.
func (o Objects) Hosts(ctx context.Context) ([]Host, error) {
	modified := make(map[string]int64)
	services, err := o.All(ctx)
	if err != nil {
		return nil, err
	}
	for _, s := range services {
		modified[s.Name] = s.Modified
	}
	now := digestOf(modified)
	alive, err := o.below(ctx, alivePrefix)
	if err != nil {
		return nil, err
	}
	reports, err := o.below(ctx, hostsPrefix)
	if err != nil {
		return nil, err
	}
	all := []Host{}
	for name, k := range reports {
		h := Host{}
		if err := json.Unmarshal(k.Value, &h.Report); err != nil {
			h.Problems = []string{fmt.Sprintf("what it has written makes no sense: %v", err)}
		}
		h.Name = name
		_, h.Alive = alive[name]
		h.Behind = h.Digest != now
		all = append(all, h)
	}
	slices.SortFunc(all, func(a, b Host) int { return cmp.Compare(a.Name, b.Name) })
	return all, nil
}

func (o Objects) below(ctx context.Context, prefix string) (map[string]Key, error) {
	f := Follower{Client: o.Client, Prefix: o.Prefix + prefix}
	return f.read(ctx)
}

// Forget forgets a host that is gone. One that lives reports anew.
func (o Objects) Forget(ctx context.Context, name string) (was bool, err error) {
	r, err := o.Client.Delete(ctx, o.Prefix+hostsPrefix+name)
	if err != nil {
		return false, err
	}
	return r.Deleted > 0, nil
}
