// Package page_test looks at the page as people do, by a browser, and as strangers do.
package page_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pentad/pentad/lab"
	"github.com/pentad/pentad/lab/e2e"
	"github.com/pentad/pentad/service"
)

func TestMain(m *testing.M) { e2e.Main(m, nil) }

const secret = "0123456789abcdef-token"

const services = `services:
- name: orders-db
  listen: [192.0.2.10:3306]
  breaker: off
  health: {probe: tcp, interval: 200ms, timeout: 200ms, fall: 2, rise: 1}
  backends: [10.0.0.1:8080, 10.0.0.2:8080, 10.0.0.3:8080]
- name: web
  listen: [192.0.2.11:80, '192.0.2.11:443']
  health: {probe: none}
  backends: [10.0.0.1:8080]
- name: nobody
  listen: [192.0.2.12:80]
  backends: []
`

// writeToken writes the token and says where it is.
func (w world) writeToken(text string) string {
	w.T.Helper()
	path := filepath.Join(w.Dir, "token")
	next := path + ".next"
	if err := errors.Join(os.WriteFile(next, []byte(text+"\n"), 0o600), os.Rename(next, path)); err != nil {
		w.T.Fatal(err)
	}
	return path
}

// What a person does who is woken up: sees what is wrong, why, who is concerned, what
// becomes of a connection, and takes a backend out.
func TestPage(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := e2e.New(t, "10.0.0.1", "10.0.0.2", "10.0.0.3")
	w.Serve("one", "10.0.0.1:8080")
	two := w.Serve("two", "10.0.0.2:8080")
	w.Serve("three", "10.0.0.3:8080")
	w.RunAgent(services + "api: {actions: true, tokenFile: " + world{w}.writeToken(secret) + "}\n")
	b := newBrowser(t, w.Host)
	b.do(order{"do": "go", "url": "http://127.0.0.1:9464/"})
	b.see("asks for the token")
	b.fill("Token", "a…token")
	b.click("button", "Look")
	b.see("signs of ASCII only")
	b.fill("Token", "not-the-token-at-all")
	b.click("button", "Look")
	b.see("not the token")
	b.fill("Token", secret)
	b.click("button", "Look")

	b.see("orders-db", ".services a.row")
	b.see("1 of 4 listeners refuse", ".pill")
	if first, _ := b.do(order{"do": "eval", "js": "document.querySelector('.services a.row').textContent"}).(string); !strings.Contains(first, "nobody") {
		t.Errorf("first in the list is %q, not what is wrong", first)
	}
	b.shot("services")
	b.fill("Services with this name or address", "192.0.2.10")
	b.see("1 service of 3")
	b.do(order{"do": "eval", "js": "document.activeElement.blur()"})
	b.do(order{"do": "press", "key": "/"})
	if focus := b.do(order{"do": "eval", "js": "document.activeElement.type"}); focus != "search" {
		t.Errorf("/ leads to %v", focus)
	}

	// A server dies: which, and why, is seen without doing anything.
	b.click("row", "orders-db")
	b.see("3 of 3 backends take the next connection")
	two.Kill()
	b.see("down.*10.0.0.2:8080.*its probe fails.*refused", ".outs li")
	b.see("2 of 3 backends take the next connection")
	b.shot("down")
	b.do(order{"do": "size", "width": 390, "height": 800})
	b.see("10.0.0.2:8080", ".outs li")
	if wide, _ := b.do(order{"do": "eval", "js": "document.documentElement.scrollWidth"}).(float64); wide > 390 {
		t.Errorf("the page is %v pixels wide on a phone of 390", wide)
	}
	b.shot("phone")
	b.do(order{"do": "size", "width": 1280, "height": 800})

	// Who connects, and what becomes of it.
	b.click("link", "Live flows")
	b.see("Flows")
	stop := world{w}.keepAsking("192.0.2.10:3306")
	b.see("established.*orders-db.*192.0.2.10:3306", ".flows .row")
	b.shot("flows")
	stop()
	b.do(order{"do": "eval", "js": "location.hash = '#/explain'"})
	b.fill("to", "192.0.2.12:80")
	b.click("button", "Explain")
	b.see("refused", "article h2")
	b.see("nobody", ".way")
	b.shot("explain-refused")
	b.fill("to", "orders-db")
	b.click("button", "Explain")
	b.see("reaches", "article h2")
	b.see("10.0.0.2:8080", ".fork li")
	b.shot("explain")

	// A backend is taken out, and the last one only by who insists.
	b.do(order{"do": "eval", "js": "location.hash = '#/service/orders-db'"})
	b.see("Drain 10.0.0.1:8080", ".backends")
	b.click("button", "Drain 10.0.0.1:8080")
	b.see("drained.*10.0.0.1:8080", ".outs li")
	b.shot("drained")
	b.click("button", "Drain 10.0.0.3:8080")
	b.see("Drain all the same", "[role=alert]")
	b.click("button", "Enable 10.0.0.1:8080")
	b.do(order{"do": "gone", "text": "10.0.0.1:8080", "in": ".outs li"})
	if log := w.Agent.Log.String(); !strings.Contains(log, "asked by the page") || !strings.Contains(log, "action=drain") || strings.Contains(log, secret) {
		t.Errorf("the log does not say what the page has done, or says more:\n%s", log)
	}

	// The agent dies: the page says how old it is.
	w.Agent.Kill()
	b.see("no answer: what you see is", ".pill")
	b.shot("agent-dead")
	w.Agent = w.Launch()
	b.do(order{"do": "gone", "text": "no answer", "in": ".pill"})
	b.do(order{"do": "faults"}) // connections that broke with the agent

	b.do(order{"do": "go", "url": "http://127.0.0.1:9464/"})
	b.see("orders-db", ".services a.row")
	paint, _ := b.do(order{"do": "eval", "js": "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0"}).(float64)
	t.Logf("first paint after %.0f ms", paint)
	if paint <= 0 || paint > 2000 {
		t.Errorf("first paint after %.0f ms", paint)
	}
	b.sound()
}

// keepAsking connects again and again until it is told to stop.
func (w world) keepAsking(vip string) (stop func()) {
	ctx, cancel := context.WithCancel(w.T.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			_, _ = w.Run(ctx, lab.Inside, "curl", "-sS", "-m", "1", "-o", "/dev/null", "http://"+vip+"/")
		}
	}()
	return func() { cancel(); <-done }
}

// get asks as a program does.
func (w world) get(method, url string, body string, headers ...string) (code int, text string, head http.Header) {
	w.T.Helper()
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, at string) (c net.Conn, err error) {
		doErr := w.Do(func() error {
			c, err = (&net.Dialer{}).DialContext(ctx, network, at)
			return nil
		})
		return c, errors.Join(doErr, err)
	}}}
	req, err := http.NewRequestWithContext(w.T.Context(), method, url, strings.NewReader(body))
	if err != nil {
		w.T.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	resp, err := client.Do(req)
	if err != nil {
		w.T.Fatal(err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		w.T.Fatal(err)
	}
	return resp.StatusCode, string(raw), resp.Header
}

// What strangers, other pages and who guesses get.
func TestStrangers(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	w := world{e2e.New(t, "10.0.0.1", "10.0.0.2", "10.0.0.3")}
	for _, a := range []string{"10.0.0.1:8080", "10.0.0.2:8080", "10.0.0.3:8080"} {
		w.Serve("x", a)
	}
	w.RunAgent(services + "api: {actions: true, tokenFile: " + w.writeToken(secret) + "}\n")
	const at = "http://127.0.0.1:9464"
	w.Eventually("the page is served", func() error {
		return w.Do(func() error {
			c, err := net.Dial("tcp", "127.0.0.1:9464")
			if err == nil {
				c.Close()
			}
			return err
		})
	})
	drain := `{"service":"orders-db","address":"10.0.0.1:8080","drained":true}`
	bearer := []string{"Authorization", "Bearer " + secret}
	asJSON := []string{"Content-Type", "application/json"}
	for name, c := range map[string]struct {
		method, path, body string
		headers            []string
		code               int
		text               string
	}{
		"the page is no secret":             {"GET", "/", "", nil, 200, "<title>pentad"},
		"a file that there is not":          {"GET", "/assets/../web.go", "", bearer, 404, ""},
		"metrics without a token":           {"GET", "/metrics", "", nil, 401, "api.tokenFile"},
		"metrics":                           {"GET", "/metrics", "", bearer, 200, "pentad_services 3"},
		"another token":                     {"GET", "/metrics", "", []string{"Authorization", "Bearer " + secret + "x"}, 401, ""},
		"the empty token":                   {"GET", "/metrics", "", []string{"Authorization", "Bearer "}, 401, ""},
		"flows without a token":             {"GET", "/v1/page/open", "", nil, 401, ""},
		"flows":                             {"GET", "/v1/page/open", "", bearer, 200, `"flows":[]`},
		"explain":                           {"GET", "/v1/page/explain?to=web", "", bearer, 200, `"works":true`},
		"explain nonsense":                  {"GET", "/v1/page/explain?to=nonsense", "", bearer, 422, "no destination"},
		"explain for a process that is not": {"GET", "/v1/page/explain?to=web&pid=4194303", "", bearer, 422, "no process"},
		"parts":                             {"GET", "/v1/page/parts", "", bearer, 200, `"captures":[]`},
		"drain without a token":             {"POST", "/v1/page/drain", drain, asJSON, 401, ""},
		"drain by a form of another page":   {"POST", "/v1/page/drain", drain, []string{"Authorization", "Bearer " + secret, "Content-Type", "text/plain"}, 415, ""},
		"drain by another page":             {"POST", "/v1/page/drain", drain, append([]string{"Sec-Fetch-Site", "cross-site"}, append(bearer, asJSON...)...), 403, ""},
		"another page of this host's":       {"GET", "/v1/page/open", "", append([]string{"Sec-Fetch-Site", "same-site"}, bearer...), 403, ""},
		"drain what there is not":           {"POST", "/v1/page/drain", strings.Replace(drain, "orders-db", "other", 1), append(bearer, asJSON...), 422, "other"},
		"the agent's own API":               {"GET", "/v1/status", "", bearer, 404, ""},
		"health in a word":                  {"GET", "/healthz", "", nil, 200, ""},
		"health":                            {"GET", "/healthz", "", bearer, 200, "ok"},
	} {
		code, text, head := w.get(c.method, at+c.path, c.body, c.headers...)
		if code != c.code || !strings.Contains(text, c.text) {
			t.Errorf("%s: %d %q, want %d %q", name, code, text, c.code, c.text)
		}
		if policy := head.Get("Content-Security-Policy"); !strings.Contains(policy, "default-src 'none'") || strings.Contains(policy, "unsafe") {
			t.Errorf("%s: the policy is %q", name, policy)
		}
	}
	// Nobody has been let through.
	w.AwaitStates("orders-db", service.Serving, service.Serving, service.Serving)

	// Many streams keep nobody out who asks for metrics.
	var open []net.Conn
	for range 80 {
		if err := w.Do(func() error {
			c, err := net.Dial("tcp", "127.0.0.1:9464")
			if err == nil {
				open = append(open, c)
				_, err = fmt.Fprintf(c, "GET /v1/page/stream HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer %s\r\n\r\n", secret)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	w.Eventually("metrics are read", func() error {
		if code, _, _ := w.get("GET", at+"/metrics", "", bearer...); code != 200 {
			return fmt.Errorf("answered %d", code)
		}
		return nil
	})
	for _, c := range open {
		c.Close()
	}

	// A newcomer is shown something though others keep as many streams as there may be.
	stream := func() *bufio.Reader {
		t.Helper()
		var c net.Conn
		if err := w.Do(func() (err error) {
			if c, err = net.Dial("tcp", "127.0.0.1:9464"); err == nil {
				_, err = fmt.Fprintf(c, "GET /v1/page/stream?service=web HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer %s\r\n\r\n", secret)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if err := c.SetReadDeadline(time.Now().Add(e2e.Patience)); err != nil {
			t.Fatal(err)
		}
		return bufio.NewReader(c)
	}
	await := func(r *bufio.Reader, what string) {
		t.Helper()
		for {
			line, err := r.ReadString('\n')
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			if strings.HasPrefix(line, what) {
				return
			}
		}
	}
	oldest := stream()
	await(oldest, "event: look")
	for range 40 {
		await(stream(), "event: hello")
	}
	newest := stream()
	await(newest, "event: service")
	if _, err := io.ReadAll(oldest); err != nil {
		t.Errorf("the oldest stream goes on: %v", err)
	}

	// Another token is in force at once, for streams that are open, too; and one that others may read is none.
	w.writeToken(strings.Repeat("n", 20))
	if _, err := io.ReadAll(newest); err != nil {
		t.Errorf("a stream goes on with the old token: %v", err)
	}
	if code, _, _ := w.get("GET", at+"/metrics", "", bearer...); code != 401 {
		t.Errorf("with the old token: %d", code)
	}
	if code, _, _ := w.get("GET", at+"/metrics", "", "Authorization", "Bearer "+strings.Repeat("n", 20)); code != 200 {
		t.Errorf("with the new token: %d", code)
	}
	w.writeToken("with a blank in the middle of it")
	if code, _, _ := w.get("GET", at+"/metrics", "", "Authorization", "Bearer with a blank in the middle of it"); code != 401 {
		t.Errorf("with a token that has blanks: %d", code)
	}
	w.writeToken("short")
	if code, _, _ := w.get("GET", at+"/metrics", "", "Authorization", "Bearer short"); code != 401 {
		t.Errorf("with a token that is too short: %d", code)
	}
}

// world is a host with the tools of this room.
type world struct{ *e2e.World }
