package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"sync"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/api/guard"
	"github.com/pentad/pentad/api/web"
	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/view"
)

// serveSocket serves the agent's own commands on its unix socket, until the context
// ends.
func (a *Agent) serveSocket(ctx context.Context) error {
	l, err := api.Listen(a.opts.RunDir)
	if err != nil {
		return err
	}
	s := &http.Server{Handler: api.Handler(a)}
	a.tasks.Go(func() {
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			a.log.Error("agent API ended", "error", err)
		}
	})
	a.tasks.Go(func() {
		<-ctx.Done()
		s.Close()
	})
	return nil
}

// maxStrangers is how many connections of those who ask at api.listen are open at once.
const maxStrangers = 64

// pageServer is the role that answers people and scrapers at api.listen.
type pageServer struct {
	page    *web.Page
	metrics http.Handler
	limit   *guard.Limit

	mu     sync.Mutex
	at     config.API
	server *http.Server // nil: nobody listens
	tasks  sync.WaitGroup
}

func openPage(a *Agent, _ func()) *pageServer {
	page := web.New(web.Options{At: view.Places{Pins: a.opts.Pins, RunDir: a.opts.RunDir}, Log: a.log, Loads: a.backendLoads})
	return &pageServer{page: page, metrics: a.metricsHandler(), limit: guard.NewLimit(maxStrangers)}
}

// backendLoads reads what backends do.
func (a *Agent) backendLoads(most int) ([]socket.BackendLoad, error) {
	for _, d := range a.drivers {
		if p, ok := d.opened().(*socket.Plane); ok && p != nil {
			return p.Loads(most)
		}
	}
	return nil, socket.ErrNothingInstalled
}

// Apply listens where it is wanted and nowhere else.
func (m *pageServer) Apply(_ context.Context, want config.API) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.server != nil && m.at == want {
		return nil
	}
	m.close()
	secret := &token{path: want.Token}
	if _, err := secret.read(); err != nil {
		return fmt.Errorf("nobody can ask at api.listen: api.tokenFile: %w", err)
	}
	pair := &keyPair{cert: want.Cert, key: want.Key}
	if want.Cert != "" {
		if _, err := pair.get(nil); err != nil {
			return fmt.Errorf("nobody can ask at api.listen: api.tls: %w", err)
		}
	}
	l, err := net.Listen("tcp", want.Listen.String())
	if err != nil {
		return fmt.Errorf("no page and no metrics: the address of api.listen cannot be used: %w", err)
	}
	s := m.limit.Server(guard.Local(m.handler(web.Settings{Token: secret.read, Actions: want.Actions})))
	s.ErrorLog = log.New(io.Discard, "", 0) // whoever speaks no TLS to it is no news
	if want.Cert != "" {
		s.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){} // HTTP/2 has many requests a connection
		s.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: pair.get}
	}
	m.at, m.server = want, s
	m.tasks.Go(func() { m.serve(s, l) })
	return nil
}

// handler serves the page, and beside it what scrapers ask for. How the agent is stands
// in detail only before those who may know.
func (m *pageServer) handler(s web.Settings) http.Handler {
	return m.page.Handler(s, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !s.Knows(r) {
			w = &wordless{ResponseWriter: w}
		}
		m.metrics.ServeHTTP(w, r)
	}))
}

// wordless lets an answer's code pass, and not its words.
type wordless struct{ http.ResponseWriter }

// Write implements io.Writer.
func (w *wordless) Write(p []byte) (int, error) { return len(p), nil }

// serve ends with the server, or when the kernel takes the listener away; then
// somebody else is to listen.
func (m *pageServer) serve(s *http.Server, l net.Listener) {
	serve := s.Serve
	if s.TLSConfig != nil {
		serve = func(l net.Listener) error { return s.ServeTLS(l, "", "") }
	}
	if err := serve(l); errors.Is(err, http.ErrServerClosed) {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.server == s {
		m.server = nil
	}
}

// Intact reports whether anybody listens.
func (m *pageServer) Intact() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.server != nil
}

// Distrust has nothing to read again.
func (*pageServer) Distrust() {}

// Run looks at the host for the page.
func (m *pageServer) Run(ctx context.Context) { m.page.Run(ctx) }

// Close ends the server.
func (m *pageServer) Close() {
	m.mu.Lock()
	m.close()
	m.mu.Unlock()
	m.tasks.Wait()
}

func (m *pageServer) close() {
	if m.server != nil {
		m.server.Close()
		m.server = nil
	}
}
