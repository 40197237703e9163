package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/plane/socket"
	updates "github.com/pentad/pentad/source"
	"github.com/pentad/pentad/source/etcd"
)

const (
	etcdURL = "http://127.0.0.1:2379"
	// What follows an etcd at the same time, and over how many connections.
	followers   = 10_000
	connections = 500
)

// fleets measures hosts that share an etcd: one agent with many services, and many that
// follow.
func fleets(ctx context.Context, b *board) error {
	s, err := newSite(b)
	if err != nil {
		return err
	}
	defer s.Close()
	store, err := s.Start(exec.Command("etcd", "--data-dir", filepath.Join(s.Dir, "etcd"), "--unsafe-no-fsync", "--listen-client-urls", etcdURL, "--advertise-client-urls", etcdURL), lab.Outside)
	if err != nil {
		return err
	}
	if err := s.listening("127.0.0.1:2379"); err != nil {
		return err
	}
	if err := s.fleetOfMany(ctx); err != nil {
		return fmt.Errorf("many services: %w", err)
	}
	return s.manyFollow(ctx, store)
}

// fleetOfMany measures 10,000 services: until they are in etcd, and in a kernel.
func (s *site) fleetOfMany(ctx context.Context) error {
	services := largeServices(manyServices, manyBackends)
	if _, err := s.WriteFile("services.yaml", largeFile(services)); err != nil {
		return err
	}
	if err := s.configure("source: {etcd: {endpoints: ['" + etcdURL + "']}}\nhost: {name: bench}\n"); err != nil {
		return err
	}
	program, err := filepath.Abs(s.b.program)
	if err != nil {
		return err
	}
	began := time.Now()
	if out, err := s.Run(ctx, lab.Outside, program, "apply", "-c", "pentad.yaml", "-f", "services.yaml"); err != nil {
		return fmt.Errorf("apply: %w: %s", err, out[:min(len(out), 1000)])
	}
	s.b.add(row{What: "pentad apply of 10,000 services x 10", Value: time.Since(began).Seconds(), Unit: " s", Detail: "checked, and written in 84 transactions"})
	var starts []float64
	for range 3 {
		began := time.Now()
		if err := s.launch(); err != nil {
			return err
		}
		if err := lab.Eventually(time.Minute, func() error {
			v, err := socket.Read(s.Pins)
			if err == nil && len(v.Services) < manyServices {
				err = fmt.Errorf("%d services", len(v.Services))
			}
			return err
		}); err != nil {
			return fmt.Errorf("%w: %s", err, s.agent.Log)
		}
		starts = append(starts, time.Since(began).Seconds())
		s.agent.Kill()
		if err := socket.Remove(s.Pins); err != nil {
			return err
		}
	}
	s.b.add(row{What: "etcd with 10,000 services x 10: agent start to live", Value: median(starts), Unit: " s", Limit: 3, Below: true, Detail: "nothing in the kernel before"})
	return nil
}

// dialEtcd returns a client of the site's etcd.
func (s *site) dialEtcd() (*clientv3.Client, error) {
	dial := func(ctx context.Context, address string) (c net.Conn, err error) {
		doErr := s.Do(func() error {
			c, err = (&net.Dialer{}).DialContext(ctx, "tcp", address)
			return nil
		})
		return c, errors.Join(doErr, err)
	}
	return clientv3.New(clientv3.Config{Endpoints: []string{etcdURL}, DialTimeout: 10 * time.Second, Logger: zap.NewNop(), DialOptions: []grpc.DialOption{grpc.WithContextDialer(dial)}})
}

// manyFollow measures when the last of many that follow has a change.
func (s *site) manyFollow(ctx context.Context, store *lab.Process) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	c := &config.Etcd{Prefix: "/many"}
	var clients []*clientv3.Client
	for range connections {
		client, err := s.dialEtcd()
		if err != nil {
			return err
		}
		defer client.Close()
		clients = append(clients, client)
	}
	put := func(i int) error {
		_, err := clients[0].Put(ctx, c.Prefix+etcd.ServicesPrefix+"web", fmt.Sprintf("listen: [192.0.2.1:80]\nbackends: [10.0.0.1:%d]\n", 1000+i))
		return err
	}
	if err := put(0); err != nil {
		return err
	}
	var have atomic.Int64
	var all sync.WaitGroup
	for i := range followers {
		all.Go(func() {
			etcd.New(clients[i%connections], c, nil, slog.New(slog.DiscardHandler)).Run(ctx, func(updates.Update) { have.Add(1) })
		})
	}
	await := func(n int64) error {
		return lab.Eventually(time.Minute, func() error {
			if now := have.Load(); now < n {
				return fmt.Errorf("%d of %d", now, n)
			}
			return nil
		})
	}
	if err := await(followers); err != nil {
		return err
	}
	var took []float64
	for i := 1; i <= 5; i++ {
		began := time.Now()
		if err := put(i); err != nil {
			return err
		}
		if err := await(int64(followers * (i + 1))); err != nil {
			return err
		}
		took = append(took, time.Since(began).Seconds())
	}
	rss, err := residentBytes(store.Process.Pid)
	if err != nil {
		return err
	}
	s.b.add(row{What: "10,000 followers of etcd: the last one has a change", Value: median(took), Unit: " s", Limit: 1, Below: true,
		Detail: fmt.Sprintf("%d connections, followers and etcd on the same processors; etcd has %.0f MB resident", connections, float64(rss)/1e6)})
	stop()
	all.Wait()
	return nil
}
