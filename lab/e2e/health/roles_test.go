package health_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/e2e"
	"github.com/pentad/pentad/service"
)

// Two services with the same backends and different roles are "the primary" and
// "any replica": a database VIP that follows a promotion.

const rolesConfig = `services:
- name: primary
  listen: [192.0.2.1:%[1]d]
  backends: &both [10.0.0.1:%[1]d, 10.0.0.2:%[1]d]
  health: {probe: %[2]s, %[3]s role: primary, interval: 1s, timeout: 1s}
- name: replica
  listen: [192.0.2.2:%[1]d]
  backends: *both
  health: {probe: %[2]s, %[3]s role: replica, interval: 1s, timeout: 1s}
- name: all
  listen: [192.0.2.3:%[1]d]
  backends: *both
  health: {probe: %[2]s, %[3]s interval: 1s, timeout: 1s}
`

const up, down = service.Serving, service.Down

func TestRedisRoles(t *testing.T) {
	t.Parallel()
	lab.Need(t, "redis-server", "redis-cli")
	w := newWorld(t, "10.0.0.1", "10.0.0.2")
	start := func(address string, args ...string) *lab.Process {
		t.Helper()
		p, err := w.Start(exec.Command("redis-server", append([]string{"--bind", address, "--port", "6379", "--save", "",
			"--dir", w.Dir, "--dbfilename", address, "--requirepass", "hunter2", "--masterauth", "hunter2"}, args...)...), lab.Outside)
		if err != nil {
			t.Fatal(err)
		}
		w.Listening(address + ":6379")
		return p
	}
	cli := func(vip string, args ...string) string {
		return w.Must("redis-cli", append([]string{"-h", vip, "-a", "hunter2", "--no-auth-warning"}, args...)...)
	}
	password := w.Password()
	first := start("10.0.0.1")
	start("10.0.0.2", "--replicaof", "10.0.0.1 6379")
	w.Eventually("the replica follows", func() error {
		out, err := w.Run(e2e.Within(t, e2e.Patience), lab.Outside, "redis-cli", "-h", "10.0.0.2", "-a", "hunter2", "--no-auth-warning", "ROLE")
		if err != nil || !strings.Contains(out, "connected") {
			return fmt.Errorf("it does not: %v: %s", err, out)
		}
		return nil
	})
	w.RunAgent(fmt.Sprintf(rolesConfig, 6379, "redis", "passwordFile: "+password+","))
	w.AwaitStates("primary", up, down)
	w.AwaitStates("replica", down, up)
	w.AwaitStates("all", up, up)
	if out := cli("192.0.2.1", "SET", "key", "value"); !strings.Contains(out, "OK") {
		t.Errorf("SET on the primary: %s", out)
	}
	if out := cli("192.0.2.2", "SET", "key", "value"); !strings.Contains(out, "READONLY") {
		t.Errorf("SET on the replica: %s", out)
	}
	w.Eventually("the replica has the key", func() error {
		if out, err := w.Inside("redis-cli", "-h", "192.0.2.2", "-a", "hunter2", "--no-auth-warning", "GET", "key"); err != nil || !strings.Contains(out, "value") {
			return fmt.Errorf("it has not: %v: %s", err, out)
		}
		return nil
	})
	first.Kill()
	w.AwaitStates("primary", down, down)
	if out, err := w.Run(e2e.Within(t, e2e.Patience), lab.Outside, "redis-cli", "-h", "10.0.0.2", "-a", "hunter2", "REPLICAOF", "NO", "ONE"); err != nil {
		t.Fatal(out)
	}
	w.AwaitStates("primary", down, up)
	w.AwaitStates("replica", down, down)
	if out := cli("192.0.2.1", "GET", "key"); !strings.Contains(out, "value") {
		t.Errorf("GET on the new primary: %s", out)
	}
	if strings.Contains(w.Agent.Log.String(), "hunter2") {
		t.Error("the log shows the password")
	}
}

func TestPostgresRoles(t *testing.T) {
	t.Parallel()
	lab.Need(t, "psql", "runuser")
	bins, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	if len(bins) == 0 {
		lab.Need(t, "initdb")
	}
	bin := bins[len(bins)-1]
	w := newWorld(t, "10.0.0.1", "10.0.0.2")
	data := filepath.Join(w.Dir, "data")
	if err := os.Mkdir(data, 0o700); err != nil {
		t.Fatal(err)
	}
	postgres := func(program string, args ...string) {
		t.Helper()
		if out, err := w.Run(e2e.Within(t, 2*e2e.Patience), lab.Outside, "runuser", append([]string{"-u", "postgres", "--", bin + "/" + program}, args...)...); err != nil {
			t.Fatalf("%s: %v: %s", program, err, out)
		}
	}
	start := func(dir, address string) *lab.Process {
		t.Helper()
		p := w.StartServer(exec.Command("setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", bin+"/postgres", "-D", dir, "-h", address, "-k", "", "-F",
			"-c", "hot_standby=on", "-c", "password_encryption=scram-sha-256"), "ready to accept")
		w.Listening(address + ":5432")
		return p
	}
	if out, err := w.Run(e2e.Within(t, e2e.Patience), lab.Outside, "chown", "postgres", data); err != nil {
		t.Fatal(out)
	}
	one, two := filepath.Join(data, "one"), filepath.Join(data, "two")
	postgres("initdb", "-D", one, "-A", "trust", "--no-sync")
	// The probe's user needs a password; all others are trusted here.
	if err := os.WriteFile(filepath.Join(one, "pg_hba.conf"), []byte("host all probe all scram-sha-256\nhost all,replication all all trust\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	first := start(one, "10.0.0.1")
	if out, err := w.Run(e2e.Within(t, e2e.Patience), lab.Outside, "psql", "-h", "10.0.0.1", "-U", "postgres", "-c", "create user probe password 'hunter2'", "-c", "create table t (x int)"); err != nil {
		t.Fatal(out)
	}
	postgres("pg_basebackup", "-h", "10.0.0.1", "-U", "postgres", "-D", two, "-R", "--no-sync", "-c", "fast")
	start(two, "10.0.0.2")
	w.RunAgent(fmt.Sprintf(rolesConfig, 5432, "postgres", "user: probe, passwordFile: "+w.Password()+","))
	w.AwaitStates("primary", up, down)
	w.AwaitStates("replica", down, up)
	w.AwaitStates("all", up, up)
	write := []string{"-h", "192.0.2.1", "-U", "postgres", "-Atc", "insert into t values (1) returning inet_server_addr()"}
	if out := w.Must("psql", write...); !strings.Contains(out, "10.0.0.1") {
		t.Errorf("insert: %s", out)
	}
	if out, err := w.Inside("psql", "-h", "192.0.2.2", "-U", "postgres", "-c", "insert into t values (1)"); err == nil || !strings.Contains(out, "read-only") {
		t.Errorf("insert on the replica: %s", out)
	}
	first.Kill()
	w.AwaitStates("primary", down, down)
	postgres("pg_ctl", "promote", "-D", two)
	w.AwaitStates("primary", down, up)
	if out := w.Must("psql", write...); !strings.Contains(out, "10.0.0.2") {
		t.Errorf("insert after the promotion: %s", out)
	}
	if strings.Contains(w.Agent.Log.String(), "hunter2") {
		t.Error("the log shows the password")
	}
}

func TestMariaDBRoles(t *testing.T) {
	t.Parallel()
	lab.Need(t, "mariadbd", "mariadb-install-db", "mariadb")
	w := newWorld(t, "10.0.0.1", "10.0.0.2")
	start := func(name, address string, args ...string) *lab.Process {
		t.Helper()
		dir := filepath.Join(w.Dir, name)
		if out, err := w.Run(e2e.Within(t, 2*e2e.Patience), lab.Outside, "mariadb-install-db", "--no-defaults", "--datadir="+dir, "--user=root", "--auth-root-authentication-method=normal", "--skip-test-db"); err != nil {
			t.Fatalf("mariadb-install-db: %v: %s", err, out)
		}
		init := filepath.Join(w.Dir, name+".sql")
		if err := os.WriteFile(init, []byte("create user if not exists probe@'%' identified by 'hunter2';\ngrant all on *.* to app@'%' identified by 'app';\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		p, err := w.Start(exec.Command("mariadbd", append([]string{"--no-defaults", "--user=root", "--datadir=" + dir, "--bind-address=" + address, "--port=3306",
			"--socket=" + dir + "/s", "--skip-name-resolve", "--innodb-flush-log-at-trx-commit=0", "--innodb-buffer-pool-size=16M", "--init-file=" + init}, args...)...), lab.Outside)
		if err != nil {
			t.Fatal(err)
		}
		w.Eventually(name+" listens", func() error {
			if !strings.Contains(p.Log.String(), "ready for connections") {
				return fmt.Errorf("it printed: %s", p.Log)
			}
			return nil
		})
		return p
	}
	first := start("one", "10.0.0.1")
	start("two", "10.0.0.2", "--read-only=1")
	w.RunAgent(fmt.Sprintf(rolesConfig, 3306, "mysql", "user: probe, passwordFile: "+w.Password()+","))
	w.AwaitStates("primary", up, down)
	w.AwaitStates("replica", down, up)
	w.AwaitStates("all", up, up)
	first.Kill()
	w.AwaitStates("primary", down, down)
	sql := func(vip, text string) string {
		return w.Must("mariadb", "--no-defaults", "--skip-ssl", "-h", vip, "-uapp", "-papp", "-Ne", text)
	}
	sql("192.0.2.2", "set global read_only = 0")
	w.AwaitStates("primary", down, up)
	if out := sql("192.0.2.1", "select @@hostname is not null, @@bind_address"); !strings.Contains(out, "10.0.0.2") {
		t.Errorf("the new primary: %s", out)
	}
	if strings.Contains(w.Agent.Log.String(), "hunter2") {
		t.Error("the log shows the password")
	}
}
