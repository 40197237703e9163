package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/api/guard"
	"github.com/pentad/pentad/config"
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

// maxStrangers is how many connections of whoever asks for metrics are open at
// once.
const maxStrangers = 64

// metricsServer is the role that answers scrapers at api.listen.
type metricsServer struct {
	handler http.Handler
	limit   *guard.Limit

	mu     sync.Mutex
	at     config.API
	server *http.Server // nil: nobody listens
	tasks  sync.WaitGroup
}

func openMetrics(a *Agent, _ func()) *metricsServer {
	return &metricsServer{handler: a.metricsHandler(), limit: guard.NewLimit(maxStrangers)}
}

// Apply listens where it is wanted and nowhere else.
func (m *metricsServer) Apply(_ context.Context, want config.API) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.server != nil && m.at == want {
		return nil
	}
	m.close()
	l, err := net.Listen("tcp", want.Listen.String())
	if err != nil {
		return fmt.Errorf("no metrics: the address of api.listen cannot be used: %w", err)
	}
	s := m.limit.Server(guard.Local(m.handler))
	m.at, m.server = want, s
	m.tasks.Go(func() { m.serve(s, l) })
	return nil
}

// serve ends with the server, or when the kernel takes the listener away; then
// somebody else is to listen.
func (m *metricsServer) serve(s *http.Server, l net.Listener) {
	if err := s.Serve(l); errors.Is(err, http.ErrServerClosed) {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.server == s {
		m.server = nil
	}
}

// Intact reports whether anybody listens.
func (m *metricsServer) Intact() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.server != nil
}

// Distrust has nothing to read again.
func (*metricsServer) Distrust() {}

// Run has no chores.
func (*metricsServer) Run(ctx context.Context) { <-ctx.Done() }

// Close ends the server.
func (m *metricsServer) Close() {
	m.mu.Lock()
	m.close()
	m.mu.Unlock()
	m.tasks.Wait()
}

func (m *metricsServer) close() {
	if m.server != nil {
		m.server.Close()
		m.server = nil
	}
}
