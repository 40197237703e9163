// Package web is the page: what pentad is and does on this host, for people in a hurry.
// It reads the kernel and asks the agent as commands do, by package view, and shows
// nothing that they would not.
//
// Whoever may ask costs little: one look at the kernel and one follower do for all
// browsers, while there are any, and what a stranger can have computed is one thing at a
// time. Nothing is changed but by who has the token (actions.go).
package web

import (
	"bytes"
	"compress/gzip"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"mime"
	"net/http"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/view"
)

//go:generate npm --prefix app ci --silent --no-audit --no-fund
//go:generate npm --prefix app run --silent build

//go:embed dist
var dist embed.FS

// Options say what a page is about.
type Options struct {
	At  view.Places
	Log *slog.Logger
	// Loads reads what backends do now, of so many at most: the history is made of it. The
	// error is socket.ErrMany when there are more.
	Loads func(most int) ([]socket.BackendLoad, error)
}

// Page is the page of one host. Its Run has to run for it to show anything.
type Page struct {
	opts    Options
	name    string // of this host
	looks   *looks
	flows   *flows
	made    details
	details atomic.Int32  // streams of one service
	asking  chan struct{} // has one place: for what costs much

	mu      sync.Mutex
	history *view.History
	streams []*opened // the oldest first
}

// opened is a stream that is open.
type opened struct{ end context.CancelFunc }

// Bounds on what all strangers together hold and cost.
const (
	maxStreams  = 32
	maxBackends = 10_000 // with a history: half a KiB and some each
)

// New returns a page.
func New(o Options) *Page {
	name, err := os.Hostname()
	if err != nil {
		name = "this host"
	}
	p := &Page{opts: o, name: name, asking: make(chan struct{}, 1), history: view.NewHistory()}
	p.looks = newLooks(func(ctx context.Context, before *look) *look { return p.look(ctx, before) })
	p.flows = newFlows(o.At)
	return p
}

// Run keeps the history, and looks at the kernel while there is anybody to show it to,
// until the context ends.
func (p *Page) Run(ctx context.Context) {
	var tasks sync.WaitGroup
	defer tasks.Wait()
	tasks.Go(func() { p.looks.run(ctx) })
	tasks.Go(func() { p.flows.run(ctx) })
	ticker := time.NewTicker(view.HistoryEvery)
	defer ticker.Stop()
	for {
		p.remember()
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// remember adds a point to the history.
func (p *Page) remember() {
	loads, err := p.opts.Loads(maxBackends)
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case errors.Is(err, socket.ErrMany), errors.Is(err, socket.ErrNothingInstalled):
		p.history.Clear()
	case err == nil:
		p.history.Add(loads)
	}
}

// Settings are what the configuration says.
type Settings struct {
	// Token returns the secret that has to be sent; empty: none. It is asked each time.
	Token   func() (string, error)
	Actions bool
}

// Handler serves the page and what it asks for. The handler of others is asked for what
// is not of the page; who may read it has to say the token, too.
func (p *Page) Handler(s Settings, others http.Handler) http.Handler {
	mux := http.NewServeMux()
	guarded := func(pattern string, h http.HandlerFunc) { mux.Handle(pattern, s.guard(h)) }
	guarded("GET /v1/page/stream", p.serveLooks(s))
	guarded("GET /v1/page/flows", p.serveFlows(s))
	guarded("GET /v1/page/open", p.serveOpen)
	guarded("GET /v1/page/explain", p.serveExplain)
	guarded("GET /v1/page/parts", p.serveParts)
	guarded("POST /v1/page/drain", p.serveDrain(s))
	serveAssets(mux)
	mux.Handle("GET /healthz", others) // says in one word how it is to those without a token
	mux.Handle("/", s.guard(others.ServeHTTP))
	return secure(mux)
}

// policy is what browsers let the page do: nothing but itself, and no page may frame it.
const policy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// secure adds the headers that keep a browser from being used against its user.
func secure(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		head := w.Header()
		head.Set("Content-Security-Policy", policy)
		head.Set("X-Content-Type-Options", "nosniff")
		head.Set("Referrer-Policy", "no-referrer")
		head.Set("Cross-Origin-Resource-Policy", "same-origin")
		head.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.ServeHTTP(w, r)
	})
}

// asset is a file of the page, as it is and compressed.
type asset struct {
	kind         string
	plain, small []byte
}

// assets are all files of the page by their names.
var assets = sync.OnceValue(func() map[string]asset {
	all := make(map[string]asset)
	// The files are part of the program: reading them cannot fail.
	_ = fs.WalkDir(dist, "dist", func(name string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		plain, err := dist.ReadFile(name)
		var small bytes.Buffer
		z, _ := gzip.NewWriterLevel(&small, gzip.BestCompression) // a level that there is
		_, _ = z.Write(plain)
		_ = z.Close()
		all[path.Base(name)] = asset{mime.TypeByExtension(path.Ext(name)), plain, small.Bytes()}
		return err
	})
	return all
})

// serveAssets serves the files of the page, which are no secret.
func serveAssets(mux *http.ServeMux) {
	serve := func(w http.ResponseWriter, r *http.Request, name string) {
		a, known := assets()[name]
		if !known {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Type", a.kind)
		w.Header().Set("Cache-Control", "no-cache") // another version of pentad has another page
		w.Header().Add("Vary", "Accept-Encoding")
		body := a.plain
		if strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") {
			w.Header().Set("Content-Encoding", "gzip")
			body = a.small
		}
		_, _ = w.Write(body) // the browser is gone if this fails
	}
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) { serve(w, r, "index.html") })
	mux.HandleFunc("GET /assets/{name}", func(w http.ResponseWriter, r *http.Request) { serve(w, r, r.PathValue("name")) })
}

// answer writes a value, or why there is none.
func answer(w http.ResponseWriter, v any, err error) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	if err != nil {
		w.WriteHeader(http.StatusUnprocessableEntity)
		v = struct {
			Error string `json:"error"`
		}{err.Error()}
	}
	_ = json.NewEncoder(w).Encode(v)
}

// rest is how long nobody has anything computed after something that took a while, in
// multiples of that: strangers together have a quarter of a processor.
const rest = 3

// alone waits until nothing else is computed that costs much. The caller calls done.
func (p *Page) alone(ctx context.Context) (done func(), err error) {
	select {
	case p.asking <- struct{}{}:
		began := time.Now()
		return func() { time.AfterFunc(rest*time.Since(began), func() { <-p.asking }) }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// stream sends events (HTML, "server-sent events") for as long as the browser takes them.
type stream struct {
	w http.ResponseWriter
	c *http.ResponseController
}

// patience is how long a browser may take to receive one event.
const patience = 10 * time.Second

// open begins a stream. Over the bound the oldest one ends: whoever keeps many open keeps
// nobody out. The stream is to end with the context; the caller calls done.
func (p *Page) open(w http.ResponseWriter, r *http.Request) (s stream, ctx context.Context, done func()) {
	ctx, end := context.WithCancel(r.Context())
	o := &opened{end}
	p.mu.Lock()
	p.streams = append(p.streams, o)
	if len(p.streams) > maxStreams {
		p.streams[0].end()
		p.streams = p.streams[1:]
	}
	p.mu.Unlock()
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	return stream{w, http.NewResponseController(w)}, ctx, func() {
		end()
		p.mu.Lock()
		defer p.mu.Unlock()
		p.streams = slices.DeleteFunc(p.streams, func(x *opened) bool { return x == o })
	}
}

// send sends one event. What it is made of has no line ends: it is JSON.
func (s stream) send(event string, data []byte) error {
	if err := s.c.SetWriteDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(s.w, "event: %s\ndata: %s\n\n", event, data); err != nil {
		return err
	}
	return s.c.Flush()
}

// sendJSON sends one value.
func (s stream) sendJSON(event string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return s.send(event, data)
}
