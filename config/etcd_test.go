package config

import (
	"slices"
	"strings"
	"testing"
)

func TestEtcd(t *testing.T) {
	c, err := Parse("f", []byte(`source:
  etcd:
    endpoints: ["https://192.0.2.1:2379", "https://etcd.example:2379/"]
    prefix: /fleet/
    tls: {ca: /etc/ca.pem, cert: /etc/host.pem, key: /etc/host.key}
    user: pentad
    passwordFile: /etc/password
host: {name: db-7}
`))
	if err != nil {
		t.Fatal(err)
	}
	e := c.Source.Etcd
	if !slices.Equal(e.Endpoints, []string{"https://192.0.2.1:2379", "https://etcd.example:2379"}) || e.Prefix != "/fleet" ||
		e.CA != "/etc/ca.pem" || e.Cert == "" || e.Key == "" || e.User != "pentad" || e.Password == "" || c.Host.Name != "db-7" {
		t.Errorf("have %+v", e)
	}
	other := *e
	if !e.Equal(&other) || e.Equal(nil) {
		t.Error("it is not the same as itself, or the same as none")
	}
	if other.Prefix = "/other"; e.Equal(&other) {
		t.Error("another prefix is the same")
	}
	for text, want := range map[string]string{
		"{}":                                    "names none",
		"{etcd: {}}":                            "endpoints",
		"{etcd: {endpoints: []}}":               "no member of etcd could be asked",
		"{etcd: {endpoints: [192.0.2.1:2379]}}": "not the URL of a member",
		"{etcd: {endpoints: [\"http://192.0.2.1:2379\"], prefix: pentad}}":            "a path such as",
		"{etcd: {endpoints: [\"https://192.0.2.1:2379\"], tls: {cert: /c}}}":          "\"cert\" and \"key\"",
		"{etcd: {endpoints: [\"http://192.0.2.1:2379\"], tls: {ca: /c}}}":             "no use to endpoints of http",
		"{etcd: {endpoints: [\"https://192.0.2.1:2379\"], user: u}}":                  "\"user\" and \"passwordFile\"",
		"{etcd: {endpoints: [\"http://192.0.2.1:2379\"], user: u, passwordFile: /p}}": "for all to read",
		"{etcd: {endpoints: [\"http://u:p@192.0.2.1:2379\"]}}":                        "not the URL of a member",
	} {
		if _, err := Parse("f", []byte("source: "+text+"\n")); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: have %v, want %s", text, err, want)
		}
	}
}
