package config

import (
	"strings"
	"testing"
)

func TestAPI(t *testing.T) {
	for section, want := range map[string]string{
		"{}":                                              "",
		"{listen: '127.0.0.1:1'}":                         "",
		"{listen: '[::1]:1'}":                             "",
		"{listen: '127.8.9.10:1'}":                        "",
		"{listen: '[::ffff:127.0.0.1]:1'}":                "",
		"{listen: '0.0.0.0:1'}":                           "other hosts",
		"{listen: '[::]:1'}":                              "other hosts",
		"{listen: '192.0.2.1:1'}":                         "other hosts",
		"{listen: '[::ffff:192.0.2.1]:1'}":                "other hosts",
		"{listen: '0.0.0.0:1', tokenFile: /t}":            "other hosts",
		"{listen: '0.0.0.0:1', tls: {cert: /c, key: /k}}": "other hosts",
		"{listen: '0.0.0.0:1', tls: {cert: /c, key: /k}, tokenFile: /t}": "",
		"{listen: '0.0.0.0:1', insecure: true}":                          "",
		"{insecure: false, listen: '0.0.0.0:1'}":                         "other hosts",
		"{tls: {cert: /c}}":                                              "both",
		"{actions: true}":                                                "tokenFile",
		"{tls: {}}":                                                      "empty",
		"{listen: '0.0.0.0:1', insecure: true, actions: true, tokenFile: /t}": "who hears the token",
		"{actions: true, insecure: true}":                                     "tokenFile",
		"{actions: true, tokenFile: /t}":                                      "",
	} {
		_, err := Parse("f.yaml", []byte("services: []\napi: "+section+"\n"))
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", section, err, want)
		}
	}
}
