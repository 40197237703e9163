package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/pentad/pentad/lab"
)

// The plugins that are compared, in a lab host. The peer is what most clusters have: a
// bridge, whose addresses host-local keeps in files.
const (
	peerPlugins = "/usr/lib/cni"
	peerConf    = `{"cniVersion": "0.4.0", "name": "peer", "type": "bridge", "bridge": "peer0", "isGateway": true, "ipam": {"type": "host-local", "subnet": "10.88.0.0/16", "dataDir": %q}}`
	ourConf     = `{"cniVersion": "0.4.0", "name": "ours", "type": "pentad-cni", "network": %q}`
)

// plugin is a CNI plugin with its configuration.
type plugin struct {
	path, conf string
}

// sandbox is a network namespace for a container.
type sandbox struct {
	*lab.Host
	netns string
}

func newSandbox() (sandbox, error) {
	h, err := lab.NewHost()
	if err != nil {
		return sandbox{}, err
	}
	p, err := h.Start(exec.Command("sleep", "1000"), lab.Outside)
	if err != nil {
		return sandbox{}, errors.Join(err, h.Close())
	}
	return sandbox{h, fmt.Sprintf("/proc/%d/ns/net", p.Process.Pid)}, nil
}

// call runs a plugin and returns how long that took, as who started it sees it.
func (s *site) call(p plugin, verb, container, netns string) (time.Duration, error) {
	cmd := exec.Command(p.path)
	cmd.Stdin = strings.NewReader(p.conf)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.Env = append(os.Environ(), "CNI_COMMAND="+verb, "CNI_CONTAINERID="+container, "CNI_NETNS="+netns, "CNI_IFNAME=eth0", "CNI_PATH="+peerPlugins)
	began := time.Now()
	proc, err := s.Start(cmd, lab.Outside)
	if err != nil {
		return 0, err
	}
	err = proc.Wait()
	took := time.Since(began)
	if err != nil {
		return 0, fmt.Errorf("%s %s: %w: %s", filepath.Base(p.path), verb, err, out.String())
	}
	return took, nil
}

// podTimes measures how long a container waits for its network, with the agent dead.
func podTimes(ctx context.Context, b *board) error {
	s, err := newSite(b)
	if err != nil {
		return err
	}
	defer s.Close()
	if err := s.run(ctx, "services: []\npods: {blocks: [10.244.0.0/22]}\n"); err != nil {
		return err
	}
	s.agent.Kill()
	ours := plugin{filepath.Join(filepath.Dir(b.program), "pentad-cni"), fmt.Sprintf(ourConf, filepath.Join(s.Dir, "run", "pods.json"))}
	if ours.path, err = filepath.Abs(ours.path); err != nil {
		return err
	}
	peer := plugin{filepath.Join(peerPlugins, "bridge"), fmt.Sprintf(peerConf, s.Dir)}
	if err := s.addOneByOne(b, ours, peer); err != nil {
		return err
	}
	return s.addAtOnce(b, ours)
}

// addOneByOne compares ADD of both plugins.
func (s *site) addOneByOne(b *board, ours, peer plugin) error {
	box, err := newSandbox()
	if err != nil {
		return err
	}
	defer box.Close()
	const rounds = 60
	took := make(map[string][]float64)
	for i := range rounds {
		for _, p := range []plugin{ours, peer} {
			id := fmt.Sprintf("c%d", i)
			t, err := s.call(p, "ADD", id, box.netns)
			if err != nil {
				return err
			}
			took[p.path] = append(took[p.path], float64(t))
			if _, err := s.call(p, "DEL", id, box.netns); err != nil {
				return err
			}
		}
	}
	a, p := median(took[ours.path]), median(took[peer.path])
	b.add(row{What: "CNI ADD, whole process, agent dead / bridge + host-local", Value: a / p, Limit: 0.4, Below: true,
		Detail: fmt.Sprintf("%v against %v", time.Duration(a).Round(10*time.Microsecond), time.Duration(p).Round(10*time.Microsecond))})
	return nil
}

// addAtOnce gives many containers their network at once.
func (s *site) addAtOnce(b *board, ours plugin) error {
	const containers = 100
	var boxes []sandbox
	defer func() {
		for _, x := range boxes {
			x.Close()
		}
	}()
	for range containers {
		x, err := newSandbox()
		if err != nil {
			return err
		}
		boxes = append(boxes, x)
	}
	took, errs := make([]float64, containers), make([]error, containers)
	var all sync.WaitGroup
	for i, x := range boxes {
		all.Go(func() {
			t, err := s.call(ours, "ADD", fmt.Sprintf("many%d", i), x.netns)
			took[i], errs[i] = float64(t), err
		})
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	slices.Sort(took)
	p99 := time.Duration(took[containers*99/100-1])
	b.add(row{What: "CNI ADD, 100 pods at once, p99", Value: p99.Seconds() * 1000, Unit: "ms", Limit: 50, Below: true,
		Detail: fmt.Sprintf("median %v", time.Duration(median(took)).Round(time.Millisecond))})
	return nil
}
