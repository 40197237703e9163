package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestInclude(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	service := func(name, vip string) string {
		return "services:\n- {name: " + name + ", listen: ['" + vip + ":80'], backends: ['10.0.0.1:80']}\n"
	}
	main := filepath.Join(dir, "pentad.yaml")
	names := func() string {
		t.Helper()
		c, err := Load(main)
		if err != nil {
			return err.Error()
		}
		var all []string
		for _, s := range c.Services {
			all = append(all, s.Name+" "+s.Balance.String())
		}
		return strings.Join(all, ", ")
	}
	expect := func(want string) {
		t.Helper()
		if have := strings.ReplaceAll(names(), dir+"/", ""); have != want {
			t.Errorf("have %s\nwant %s", have, want)
		}
	}
	write("pentad.yaml", "include: [conf.d/*.yaml]\ndefaults: {balance: random}\n"+service("own", "192.0.2.1"))
	expect("own random")
	write("conf.d/b.yaml", service("b", "192.0.2.2"))
	write("conf.d/a.yaml", "defaults: {balance: source-hash}\n"+service("a", "192.0.2.3"))
	write("conf.d/note.txt", "no YAML\n")
	expect("own random, a source-hash, b random")

	// Errors name the file; names and listeners are unique in all.
	write("conf.d/b.yaml", service("a", "192.0.2.9"))
	if have := names(); !strings.HasPrefix(have, filepath.Join(dir, "conf.d/b.yaml")+":2:") || !strings.HasSuffix(have, "service a is already defined at "+filepath.Join(dir, "conf.d/a.yaml")+":3; names are unique") {
		t.Errorf("have %s", have)
	}
	write("conf.d/b.yaml", service("b", "192.0.2.1"))
	if have := names(); !strings.Contains(have, "b.yaml:2:") || !strings.Contains(have, "listener 192.0.2.1:80 already belongs to service own") {
		t.Errorf("have %s", have)
	}
	write("conf.d/b.yaml", "scope: {}\n")
	if have := names(); !strings.Contains(have, `unknown key "scope" in an included file`) {
		t.Errorf("have %s", have)
	}
	write("pentad.yaml", "defaults: {balance: random}\n"+service("own", "192.0.2.1"))
	values, err := Values(WithIncluded(main, []byte("defaults: {balance: random}\n"+service("own", "192.0.2.1"))), "own")
	if err != nil {
		t.Fatal(err)
	}
	said := make(map[string]string)
	for _, v := range values {
		said[strings.TrimPrefix(v.Path, "services.own.")] = v.Value + " from " + strings.TrimPrefix(v.From, dir+"/")
	}
	for key, want := range map[string]string{
		"balance": "random from pentad.yaml:1", "onDown": "reset from default", "health.interval": "2s from default", "backends": "[10.0.0.1:80] from pentad.yaml:3",
	} {
		if said[key] != want {
			t.Errorf("%s is %q, want %q", key, said[key], want)
		}
	}
	if _, err := Values(WithIncluded(main, []byte(service("own", "192.0.2.1"))), "other"); err == nil {
		t.Error("a service that there is not has values")
	}

	write("pentad.yaml", "include: [conf.d/*.yaml, nowhere.yaml]\n")
	write("conf.d/b.yaml", service("b", "192.0.2.2"))
	if c, err := Load(main); err != nil || len(c.Warnings) != 1 || !strings.Contains(c.Warnings[0].Message, "nowhere.yaml to include") {
		t.Errorf("a file that is not there: %v, %+v", err, c)
	}
	// What another file has it does not get, and takes nothing with it.
	write("pentad.yaml", "include: {files: [conf.d/*.yaml], onError: skip}\n")
	write("conf.d/b.yaml", service("a", "192.0.2.2"))
	expect("a source-hash")
	write("conf.d/b.yaml", "scope: {}\n")

	// One that is not valid need not take the others with it.
	write("pentad.yaml", "include: {files: [conf.d/*.yaml, /nowhere/*.yaml], onError: skip}\n")
	expect("a source-hash")
	c, err := Load(main)
	if err != nil || len(c.Skipped) != 1 || len(c.Warnings) == 0 || c.Warnings[0].File != filepath.Join(dir, "conf.d/b.yaml") {
		t.Errorf("%v: skipped %v, warnings %v", err, c.Skipped, c.Warnings)
	}
	write("pentad.yaml", "include: ['[']\n")
	if have := names(); !strings.Contains(have, "want a pattern") {
		t.Errorf("have %s", have)
	}
}
