package proxy_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/actor"
)

// site is a host with an agent, a bastion, an inner host, and a database that only the
// inner one reaches:
//
//	w 192.0.2.1 --- 192.0.2.2 bastion 198.51.100.1 --- 198.51.100.2 inner
type site struct {
	*world
	bastion, inner *lab.Host
	sshd           *lab.Process // of the bastion
	dir            string
}

func newSite(t *testing.T) *site {
	t.Helper()
	lab.Need(t, "ssh", "ssh-keygen", "/usr/sbin/sshd")
	s := &site{world: newWorld(t)}
	s.bastion, s.inner = s.another(), s.another()
	for _, err := range []error{
		wire(s.Host, "192.0.2.1/24", s.bastion, "192.0.2.2/24"), wire(s.bastion, "198.51.100.1/24", s.inner, "198.51.100.2/24"),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	s.dir = t.TempDir()
	s.key("id")
	s.sshd = s.startSSHD(s.bastion, "bastion", "192.0.2.2")
	s.startSSHD(s.inner, "inner", "198.51.100.2")
	p, err := s.inner.Start(actor.Command("late reply", "127.0.0.1:3306"), lab.Outside)
	if err != nil {
		t.Fatal(err)
	}
	s.Eventually("the database is ready", func() error {
		if !strings.Contains(p.Log.String(), "ready") {
			return errors.New(p.Log.String())
		}
		return nil
	})
	return s
}

func wire(a *lab.Host, addressA string, b *lab.Host, addressB string) error {
	_, _, err := lab.Wire(a, []string{addressA}, b, []string{addressB})
	return err
}

// key makes a pair of keys.
func (s *site) key(name string) {
	s.T.Helper()
	path := filepath.Join(s.dir, name)
	_ = os.Remove(path)
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path).CombinedOutput(); err != nil {
		s.T.Fatalf("%v: %s", err, out)
	}
}

// known is the line of a server for known_hosts.
func (s *site) known(address, name string) string {
	s.T.Helper()
	public, err := os.ReadFile(filepath.Join(s.dir, name+".pub"))
	if err != nil {
		s.T.Fatal(err)
	}
	return address + " " + string(public)
}

// startSSHD starts a server whose key has the name given, which root may use with the key
// id.
func (s *site) startSSHD(at *lab.Host, name, address string) *lab.Process {
	s.T.Helper()
	if _, err := os.Stat(filepath.Join(s.dir, name)); err != nil {
		s.key(name)
	}
	public, err := os.ReadFile(filepath.Join(s.dir, "id.pub"))
	if err != nil {
		s.T.Fatal(err)
	}
	// Without StrictModes it may lie in a directory that everybody may write.
	for file, text := range map[string]string{
		name + ".authorized": string(public),
		name + ".conf": fmt.Sprintf("ListenAddress %s\nHostKey %[2]s/%[3]s\nAuthorizedKeysFile %[2]s/%[3]s.authorized\nStrictModes no\nUsePAM no\nPidFile none\n"+
			"PermitRootLogin yes\nPasswordAuthentication no\nAllowTcpForwarding yes\n", address, s.dir, name),
	} {
		if err := os.WriteFile(filepath.Join(s.dir, file), []byte(text), 0o600); err != nil {
			s.T.Fatal(err)
		}
	}
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
		s.T.Fatal(err)
	}
	p, err := at.Start(exec.Command("/usr/sbin/sshd", "-D", "-e", "-f", filepath.Join(s.dir, name+".conf")), lab.Outside)
	if err != nil {
		s.T.Fatal(err)
	}
	s.Eventually(name+" listens", func() error {
		if !strings.Contains(p.Log.String(), "Server listening") {
			return errors.New(p.Log.String())
		}
		return nil
	})
	return p
}

// configText is a forward through both, and one back to this host.
func (s *site) configText(more string) string {
	ssh := fmt.Sprintf("user: root, identity: %[1]s/id, knownHosts: %[1]s/known_hosts, keepalive: 500ms", s.dir)
	return fmt.Sprintf(`services: []
upstreams:
- {name: bastion, ssh: {host: 192.0.2.2, %[1]s}}
- {name: inner, ssh: {host: 198.51.100.2, %[1]s}}
- {name: alias, ssh: {host: by-alias, knownHosts: %[2]s/known_hosts, config: %[2]s/config}}
forwards:
- {name: db, listen: '127.0.0.1:13306', to: '127.0.0.1:3306', via: [bastion, inner]}
- {name: hook, remote: '127.0.0.1:8080', to: '127.0.0.1:18080', via: [bastion, inner]}
- {name: by-alias, listen: '127.0.0.1:13307', to: '127.0.0.1:3306', via: alias}
proxies:
- {name: socks, protocol: socks5, listen: '127.0.0.1:1080', rules: [{via: [bastion, inner]}]}
%[3]s`, ssh, s.dir, more)
}

func (s *site) write(name, text string) {
	s.T.Helper()
	if err := os.WriteFile(filepath.Join(s.dir, name), []byte(text), 0o600); err != nil {
		s.T.Fatal(err)
	}
}

// state waits until a forward is in a state, up or down, for a reason.
func (s *site) state(name string, up bool, why string) {
	s.T.Helper()
	s.Eventually(fmt.Sprintf("forward %s is up: %v", name, up), func() error {
		var all []struct {
			Name, Why string
			Up        bool
		}
		out, err := s.Pentad("forward", "list", "-o", "json")
		if err != nil {
			return err
		}
		if err := json.Unmarshal([]byte(out), &all); err != nil {
			return err
		}
		for _, f := range all {
			if f.Name == name && f.Up == up && strings.Contains(f.Why, why) {
				return nil
			}
		}
		return errors.New(out)
	})
}

// asks asks the database at a local port and returns how long the answer took.
func (s *site) asks(address string) (time.Duration, error) {
	began := time.Now()
	cmd := exec.Command("ncat", strings.Fields(address)...)
	cmd.Stdin = strings.NewReader("a question")
	p, err := s.Start(cmd, lab.Outside)
	if err != nil {
		return 0, err
	}
	if err := p.Wait(); err != nil {
		return 0, err
	}
	if text := p.Log.String(); text != "heard a question" {
		return 0, fmt.Errorf("it says %q", text)
	}
	return time.Since(began), nil
}

// A port of a database behind two hosts is there, and is back when its way is.
func TestForwards(t *testing.T) {
	t.Parallel()
	lab.Need(t, "ncat")
	s := newSite(t)
	s.write("known_hosts", s.known("192.0.2.2", "bastion")+s.known("198.51.100.2", "inner"))
	s.write("config", fmt.Sprintf("Host by-alias\n  HostName 198.51.100.2\n  User root\n  IdentityFile %[1]s/id\n  ProxyJump root@jump\nHost jump\n  HostName 192.0.2.2\n  IdentityFile %[1]s/id\n", s.dir))
	s.Configure(s.configText(""))
	s.Agent = s.Launch()
	for _, name := range []string{"db", "hook", "by-alias"} {
		s.state(name, true, "")
	}
	for _, at := range []string{"127.0.0.1 13306", "127.0.0.1 13307", "--proxy-type socks5 --proxy 127.0.0.1:1080 127.0.0.1 3306"} {
		if _, err := s.asks(at); err != nil {
			t.Errorf("%s: %v", at, err)
		}
	}
	s.StartServer(actor.Command("late reply", "127.0.0.1:18080"), "ready")
	if out := s.pipeFrom(t, s.inner, "from inside", "ncat", "127.0.0.1", "8080"); out != "heard from inside" {
		t.Errorf("through the remote forward it says %q", out)
	}

	// The cable is cut for longer than it takes to notice, and is mended.
	if err := s.CutOff(netip.MustParseAddr("192.0.2.2")); err != nil {
		t.Fatal(err)
	}
	s.state("db", false, "the server")
	if out := s.MustPentad("forward", "list"); !strings.Contains(out, "down") {
		t.Errorf("forward list says %s", out)
	}
	if err := s.Mend(); err != nil {
		t.Fatal(err)
	}
	mended := time.Now()
	s.state("db", true, "")
	s.state("hook", true, "")
	if took := time.Since(mended); took > 2*time.Second {
		t.Logf("both forwards were back only %s after their path was", took)
	}
	if _, err := s.asks("127.0.0.1 13306"); err != nil {
		t.Error(err)
	}

	// The server dies with its connections, and comes back.
	killTree(s.sshd.Process.Pid)
	s.state("db", false, "")
	s.sshd = s.startSSHD(s.bastion, "bastion", "192.0.2.2")
	s.state("db", true, "")
	if _, err := s.asks("127.0.0.1 13306"); err != nil {
		t.Error(err)
	}
	if n := strings.Count(s.Agent.Log.String(), "BEGIN OPENSSH"); n > 0 {
		t.Error("the log shows a key")
	}
}

// killTree kills a process and what it has started.
func killTree(pid int) {
	children, _ := os.ReadFile(fmt.Sprintf("/proc/%[1]d/task/%[1]d/children", pid))
	_ = syscall.Kill(pid, syscall.SIGKILL)
	for child := range strings.FieldsSeq(string(children)) {
		if n, err := strconv.Atoi(child); err == nil {
			killTree(n)
		}
	}
}

// Nothing connects where the key of a server is not the right one.
func TestHostKeys(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.write("known_hosts", "")
	s.Configure(s.configText(""))
	s.Agent = s.Launch()
	s.state("db", false, "add this line to "+s.dir+"/known_hosts: 192.0.2.2 ssh-ed25519")
	if out, err := s.Pentad("status"); err != nil || !strings.Contains(out, "forward db is not up") {
		t.Errorf("status says %v: %s", err, out)
	}
	// The line that it names is the right one.
	s.write("known_hosts", s.known("192.0.2.2", "bastion")+s.known("198.51.100.2", "inner"))
	s.state("db", true, "")
	// Another key is refused, also where new ones are taken.
	killTree(s.sshd.Process.Pid)
	s.key("bastion")
	s.sshd = s.startSSHD(s.bastion, "bastion", "192.0.2.2")
	for i, accept := range []string{"false", "true"} {
		s.Configure(strings.ReplaceAll(s.configText(""), "keepalive: 500ms", fmt.Sprintf("keepalive: 60%dms, acceptNew: %s", i, accept)))
		s.MustPentad("reload")
		s.state("db", false, "shows another key than")
	}
	// New ones are noted where that is wanted.
	s.write("known_hosts", "")
	s.state("db", true, "")
	text, err := os.ReadFile(filepath.Join(s.dir, "known_hosts"))
	if err != nil || !strings.Contains(string(text), strings.TrimSpace(s.known("192.0.2.2", "bastion"))[:40]) {
		t.Errorf("%v: known_hosts has %s", err, text)
	}
}
