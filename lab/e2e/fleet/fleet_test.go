// Package fleet_test tests hosts that share an etcd of three members, with certificates.
package fleet_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/e2e"
	"github.com/pentad/pentad/lab/pki"
)

func TestMain(m *testing.M) { e2e.Main(m, nil) }

// fleet is hosts on one segment, three of which run etcd.
type fleet struct {
	t         *testing.T
	segment   *lab.Switch
	ca        *pki.Authority
	dir       string
	members   [3]*lab.Host
	processes [3]*lab.Process
	hosts     []*e2e.World
	client    pki.Pair
}

func memberAddress(i int) string { return fmt.Sprintf("198.51.100.%d", 2+i) }

func newFleet(t *testing.T, hosts int) *fleet {
	t.Helper()
	lab.Need(t, "etcd", "etcdctl")
	f := &fleet{t: t, dir: t.TempDir()}
	var err error
	if f.segment, err = lab.NewSwitch(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.segment.Close(); err != nil {
			t.Error(err)
		}
	})
	if f.ca, err = pki.New(f.dir); err != nil {
		t.Fatal(err)
	}
	if f.client, err = f.ca.Issue("client", "pentad", nil, nil, nil); err != nil {
		t.Fatal(err)
	}
	for i := range f.members {
		f.members[i] = e2e.New(t).Host
		if _, err := f.segment.Plug(f.members[i], memberAddress(i)+"/24"); err != nil {
			t.Fatal(err)
		}
		f.startMember(i)
	}
	for i := range hosts {
		w := e2e.New(t)
		if _, err := f.segment.Plug(w.Host, fmt.Sprintf("198.51.100.%d/24", 11+i)); err != nil {
			t.Fatal(err)
		}
		f.hosts = append(f.hosts, w)
	}
	f.hosts[0].Eventually("etcd has a leader", func() error {
		_, err := f.try("endpoint", "health")
		return err
	})
	return f
}

func (f *fleet) startMember(i int) {
	f.t.Helper()
	at := net.ParseIP(memberAddress(i))
	cert, err := f.ca.Issue(fmt.Sprint("member", i), "etcd", nil, []net.IP{at}, nil)
	if err != nil {
		f.t.Fatal(err)
	}
	var all []string
	for j := range f.members {
		all = append(all, fmt.Sprintf("m%d=https://%s:2380", j, memberAddress(j)))
	}
	ca := filepath.Join(f.dir, "ca.crt")
	f.processes[i], err = f.members[i].Start(exec.Command("etcd", "--name", fmt.Sprint("m", i), "--data-dir", filepath.Join(f.members[i].Dir, "etcd"), "--unsafe-no-fsync",
		"--listen-client-urls", "https://"+at.String()+":2379", "--advertise-client-urls", "https://"+at.String()+":2379",
		"--listen-peer-urls", "https://"+at.String()+":2380", "--initial-advertise-peer-urls", "https://"+at.String()+":2380",
		"--initial-cluster", strings.Join(all, ","), "--cert-file", cert.Cert, "--key-file", cert.Key, "--peer-cert-file", cert.Cert, "--peer-key-file", cert.Key,
		"--trusted-ca-file", ca, "--peer-trusted-ca-file", ca, "--client-cert-auth", "--peer-client-cert-auth"), lab.Outside)
	if err != nil {
		f.t.Fatal(err)
	}
}

// try runs etcdctl at the first member that runs.
func (f *fleet) try(args ...string) (string, error) {
	for i, p := range f.processes {
		select {
		case <-p.Done():
			continue
		default:
		}
		cmd := exec.Command("etcdctl", append([]string{"--endpoints", "https://" + memberAddress(i) + ":2379", "--cacert", filepath.Join(f.dir, "ca.crt"), "--cert", f.client.Cert, "--key", f.client.Key}, args...)...)
		cmd.Env = append(os.Environ(), "ETCDCTL_API=3")
		p, err := f.members[i].Start(cmd, lab.Outside)
		if err != nil {
			return "", err
		}
		err = p.Wait()
		return p.Log.String(), err
	}
	return "", errors.New("no member runs")
}

func (f *fleet) put(key, value string) {
	f.t.Helper()
	if out, err := f.try("put", key, value); err != nil {
		f.t.Fatalf("%v: %s", err, out)
	}
}

// source is the section of a host's file.
func (f *fleet) source(labels string) string {
	var urls []string
	for i := range f.members {
		urls = append(urls, `"https://`+memberAddress(i)+`:2379"`)
	}
	name := strings.NewReplacer(": ", "-").Replace(labels)
	return fmt.Sprintf("source: {etcd: {endpoints: [%s], tls: {ca: %s, cert: %s, key: %s}}}\nhost: {name: host-%s, labels: {%s}}\n",
		strings.Join(urls, ", "), filepath.Join(f.dir, "ca.crt"), f.client.Cert, f.client.Key, name, labels)
}

func has(w *e2e.World, name string, is bool) {
	w.T.Helper()
	w.Eventually(fmt.Sprintf("service %s: %v", name, is), func() error {
		out, err := w.Pentad("service", "list", "--no-headers")
		if err == nil && strings.Contains(out, name) != is {
			err = errors.New(out)
		}
		return err
	})
}

// Services that are put into etcd by one command are served on all hosts that they select,
// whatever becomes of etcd and the agents; who changed what is known, and taken back.
func TestFleet(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 2)
	a, b := f.hosts[0], f.hosts[1]
	for _, w := range f.hosts {
		w.Serve("one", "127.0.0.1:8001")
		w.Serve("two", "127.0.0.1:8002")
	}
	// The file of one host is what the fleet begins with.
	a.RunAgent(f.source("rack: a"))
	b.RunAgent(f.source("rack: b"))
	if _, err := a.WriteFile("services.yaml", `defaults: {balance: random}
api: {listen: 127.0.0.1:1}
services:
- name: web
  listen: [127.1.0.1:80]
  backends: [127.0.0.1:8001]
- name: only-a   # of one rack
  listen: [127.1.0.2:80]
  selector: {rack: a}
  backends: [127.0.0.1:8001]
- name: only-b
  listen: [127.1.0.2:80]
  selector: {rack: b}
  backends: [127.0.0.1:8002]
`); err != nil {
		t.Fatal(err)
	}
	out := a.MustPentad("apply", "-c", "pentad.yaml", "-f", "services.yaml", "--why", "a beginning")
	for _, want := range []string{"+ service web created", "+ service only-a created", "stays in its file: api"} {
		if !strings.Contains(out, want) {
			t.Errorf("apply does not say %q: %s", want, out)
		}
	}
	has(a, "only-a", true)
	has(b, "only-b", true)
	answers := func(w *e2e.World, vip, name string) {
		t.Helper()
		w.Eventually(vip+" is served by "+name, func() error {
			if got := w.Answers(vip, 4); got[name] != 4 {
				return fmt.Errorf("%v", got)
			}
			return nil
		})
	}
	answers(a, "127.1.0.1:80", "one")
	answers(a, "127.1.0.2:80", "one")
	answers(b, "127.1.0.2:80", "two")
	if out := a.MustPentad("service", "show", "web"); !strings.Contains(out, "random") || !strings.Contains(out, "etcd") {
		t.Errorf("the defaults of the file are lost, or the source: %s", out)
	}
	if out := a.MustPentad("apply", "-c", "pentad.yaml", "-f", "services.yaml"); !strings.Contains(out, "nothing would change") {
		t.Errorf("the same again: %s", out)
	}

	// What comes from the fleet is not the file's to take away.
	if out := a.MustPentad("diff", "-c", "pentad.yaml"); !strings.Contains(out, "nothing would change") {
		t.Errorf("the file of the host would change: %s", out)
	}

	// Two that want the same listener on the same host are refused, before anything is written.
	if _, err := a.WriteFile("twice.yaml", "services:\n- {name: thief, listen: ['127.1.0.1:80'], backends: ['127.0.0.1:8002']}\n- {name: fine, listen: ['127.1.0.9:80'], backends: []}\n"); err != nil {
		t.Fatal(err)
	}
	if out, err := a.Pentad("apply", "-c", "pentad.yaml", "-f", "twice.yaml"); err == nil || !strings.Contains(out, "already belongs to service web") {
		t.Errorf("a listener is stolen: %v: %s", err, out)
	}
	if out := a.MustPentad("get", "-c", "pentad.yaml"); strings.Contains(out, "fine") || !strings.Contains(out, "rack=b") {
		t.Errorf("the fleet has: %s", out)
	}
	// Past pentad anything can be written: it breaks itself alone, and the older one has the listener.
	f.put("/pentad/v1/services/thief", "listen: ['127.1.0.1:80']\nbackends: ['127.0.0.1:8002']")
	f.put("/pentad/v1/services/rubbish", "listen: [")
	f.put("/pentad/v1/services/web", "listen: ['127.1.0.1:80']\nbackends: wrong")
	f.put("/pentad/v1/services/later", "listen: ['127.1.0.7:80']\nbackends: ['127.0.0.1:8002']")
	answers(b, "127.1.0.7:80", "two")
	answers(a, "127.1.0.1:80", "one")
	a.Eventually("status names what is wrong", func() error {
		out, err := a.Pentad("status")
		flat := strings.Join(strings.Fields(out), " ")
		for _, want := range []string{"service rubbish", "service web", "stays in force", "belongs to the service web"} {
			if !strings.Contains(flat, want) {
				return fmt.Errorf("not %q: %s", want, out)
			}
		}
		return err
	})
	f.try("del", "/pentad/v1/services/rubbish")
	a.MustPentad("delete", "-c", "pentad.yaml", "thief", "later")
	has(b, "later", false)

	// All hosts say how they are.
	state := func(host, want string) {
		t.Helper()
		a.Eventually(host+" is "+want, func() error {
			out, _ := a.Pentad("fleet", "status", "-c", "pentad.yaml")
			for line := range strings.Lines(out) {
				if strings.HasPrefix(line, host) && strings.Contains(line, want) {
					return nil
				}
			}
			return errors.New(out)
		})
	}
	state("host-rack-a", "up to date")
	state("host-rack-b", "up to date")
	if err := b.Agent.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	f.put("/pentad/v1/services/new", "listen: ['127.1.0.8:80']\nbackends: []")
	state("host-rack-b", "behind")
	state("host-rack-a", "up to date")
	if out, err := a.Pentad("fleet", "status", "-c", "pentad.yaml"); err == nil {
		t.Errorf("all is said to be well: %s", out)
	}
	if err := b.Agent.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	state("host-rack-b", "up to date")
	if out := a.MustPentad("fleet", "status", "-c", "pentad.yaml"); !strings.Contains(out, "rack=b") {
		t.Errorf("the labels are missing: %s", out)
	}
	a.MustPentad("delete", "-c", "pentad.yaml", "new")

	// A leader dies, then a second member: nothing that was there changes, and agents that
	// start now serve it too.
	f.processes[0].Kill()
	if _, err := a.WriteFile("web.yaml", "services: [{name: web, listen: ['127.1.0.1:80'], backends: ['127.0.0.1:8002']}]\n"); err != nil {
		t.Fatal(err)
	}
	a.Eventually("two members of three take a change", func() error {
		out, err := a.Pentad("apply", "-c", "pentad.yaml", "-f", "web.yaml")
		if err == nil && !strings.Contains(out, "~ service web") {
			err = nil // it was written by the call before, which did not hear so
		}
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		return err
	})
	answers(b, "127.1.0.1:80", "two")
	f.processes[1].Kill()
	b.Eventually("status says that etcd is away", func() error {
		if out, _ := b.Pentad("status"); !strings.Contains(out, "etcd is away") {
			return errors.New(out)
		}
		return nil
	})
	b.Agent.Kill()
	b.Agent = b.Launch()
	b.Eventually("a new agent says that etcd has not answered", func() error {
		if out, _ := b.Pentad("status"); !strings.Contains(strings.Join(strings.Fields(out), " "), "etcd has not answered yet") {
			return errors.New(out)
		}
		return nil
	})
	answers(b, "127.1.0.1:80", "two")
	f.startMember(0)
	f.startMember(1)
	b.Eventually("etcd is back", func() error {
		out, err := b.Pentad("status")
		if err == nil && strings.Contains(out, "away") {
			err = errors.New(out)
		}
		return err
	})
	answers(b, "127.1.0.2:80", "two")

	// The file of a host has the last word.
	b.Configure(f.source("rack: b") + "services: [{name: web, listen: ['127.1.0.1:80'], backends: ['127.0.0.1:8001']}]\n")
	answers(b, "127.1.0.1:80", "one")
	b.Eventually("the conflict is said", func() error {
		if out, _ := b.Pentad("status"); !strings.Contains(strings.Join(strings.Fields(out), " "), "service web of the source etcd is not served on this host") {
			return errors.New(out)
		}
		return nil
	})
	answers(a, "127.1.0.1:80", "two")

	// What was changed is taken back; what was deleted comes back.
	if out := a.MustPentad("history", "-c", "pentad.yaml"); !strings.Contains(out, "a beginning") || !strings.Contains(out, "-thief -later") || !strings.Contains(out, "@") {
		t.Errorf("the history is: %s", out)
	}
	a.MustPentad("rollback", "-c", "pentad.yaml", "later")
	answers(a, "127.1.0.7:80", "two")
	// An editor.
	if _, err := a.WriteFile("editor", "#!/bin/sh\nsed -i s/8002/8001/ \"$1\"\n"); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(a.Dir, "editor"), 0o755); err != nil {
		t.Fatal(err)
	}
	edit := exec.Command(e2e.Program(), a.Args("edit", "-c", "pentad.yaml", "later")...)
	edit.Env = append(os.Environ(), "EDITOR="+filepath.Join(a.Dir, "editor"), "VISUAL=")
	p, err := a.Start(edit, lab.Outside)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Wait(); err != nil {
		t.Errorf("edit: %v: %s", err, p.Log)
	}
	answers(a, "127.1.0.7:80", "one")

	// Without etcd in its file a host has nothing of the fleet any more.
	a.Configure("services: []")
	a.MustPentad("reload", "--force")
	has(a, "only-a", false)
}

// Certificates of another authority, and none, are refused; new ones that lie in the same
// files are used.
func TestCertificates(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 1)
	w := f.hosts[0]
	f.put("/pentad/v1/services/web", "listen: ['127.1.0.1:80']\nbackends: []")
	other := t.TempDir()
	if _, err := pki.New(other); err != nil {
		t.Fatal(err)
	}
	good := filepath.Join(f.dir, "ca.crt")
	right, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	wrong, err := os.ReadFile(filepath.Join(other, "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	mine := filepath.Join(other, "mine.crt")
	if err := os.WriteFile(mine, wrong, 0o600); err != nil {
		t.Fatal(err)
	}
	w.Configure(strings.Replace(f.source(""), good, mine, 1))
	w.Agent = w.Launch()
	w.Eventually("members with certificates of somebody else are refused", func() error {
		if out, _ := w.Pentad("status"); !strings.Contains(strings.Join(strings.Fields(out), " "), "certificate signed by unknown authority") {
			return errors.New(out)
		}
		return nil
	})
	if err := os.WriteFile(mine, right, 0o600); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	has(w, "web", true)
	t.Logf("the new certificates were used after %s", time.Since(began))
}
