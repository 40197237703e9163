// Package nodehealth answers load balancers that ask whether they may send traffic
// to this node: for the node as a whole at /healthz and /livez, and for each
// Service with externalTrafficPolicy Local at its healthCheckNodePort.
//
// Paths, codes, fields and headers are those of kube-proxy, because clouds have
// them hard-wired (KEP-3836, KEP-3458 and the reference of kube-proxy).
package nodehealth

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/pentad/pentad/api/guard"
)

// Check is one Service that has a port to be asked at.
type Check struct {
	Port      uint16
	Namespace string
	Name      string
	// Ready endpoints on this node, of each family: a load balancer that asks by
	// IPv6 sends IPv6.
	Endpoints4, Endpoints6 int
}

// State is what the node says of itself.
type State struct {
	Healthy bool      // services are in the kernel
	Leaving bool      // no new connections should be sent here
	Updated time.Time // when services were last made what they should be
}

// Server answers for one node.
type Server struct {
	log   *slog.Logger
	state func() State

	limit *guard.Limit

	moved chan struct{} // it is to listen elsewhere

	mu       sync.Mutex
	listen   netip.AddrPort
	unserved error // why nobody listens there
	checks   map[uint16]*check
	failed   map[Check]error // those that could not be opened
}

// check is one port that is asked.
type check struct {
	Check
	server *http.Server
}

// maxConnections is how many connections of load balancers are open at once, to all
// ports together.
const maxConnections = 256

// Want is what a server is to be asked for.
type Want struct {
	Listen netip.AddrPort // of /healthz and /livez
	Checks []Check        // sorted by port
}

// Equal reports whether both are the same.
func (w Want) Equal(o Want) bool { return w.Listen == o.Listen && slices.Equal(w.Checks, o.Checks) }

// New returns a server that asks state for each answer.
func New(state func() State, log *slog.Logger) *Server {
	return &Server{
		log: log, state: state, checks: make(map[uint16]*check), limit: guard.NewLimit(maxConnections), moved: make(chan struct{}, 1),
	}
}

// Apply makes the server answer as wanted while it runs. Services are worth more than
// being asked about them: what cannot be listened at is tried again, and Warnings says so.
func (s *Server) Apply(_ context.Context, want Want) error {
	s.set(want.Checks)
	s.mu.Lock()
	defer s.mu.Unlock()
	if want.Listen != s.listen {
		s.listen = want.Listen
		select {
		case s.moved <- struct{}{}:
		default:
		}
	}
	return nil
}

// Intact reports that nobody else can change what the server listens at.
func (*Server) Intact() bool { return true }

// Distrust has nothing to read again.
func (*Server) Distrust() {}

// Close has nothing to let go of: the server ends with Run.
func (*Server) Close() {}

// Run serves what was applied until the context ends.
func (s *Server) Run(ctx context.Context) {
	var tasks sync.WaitGroup
	defer s.closeAll()
	defer tasks.Wait()
	tasks.Go(func() { s.retry(ctx) })
	for {
		s.mu.Lock()
		at := s.listen
		s.mu.Unlock()
		here, leave := context.WithCancel(ctx)
		var serving sync.WaitGroup
		if at.IsValid() {
			serving.Go(func() { s.serve(here, at) })
		}
		select {
		case <-ctx.Done():
		case <-s.moved:
		}
		leave()
		serving.Wait()
		if ctx.Err() != nil {
			return
		}
	}
}

// serve answers for the node as a whole. An address that cannot be used is logged and
// tried again.
func (s *Server) serve(ctx context.Context, at netip.AddrPort) {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		st := s.state()
		s.answer(w, st, st.Healthy && !st.Leaving)
	})
	mux.HandleFunc("/livez", func(w http.ResponseWriter, _ *http.Request) {
		st := s.state()
		s.answer(w, st, st.Healthy)
	})
	srv := s.limit.Server(mux)
	defer context.AfterFunc(ctx, func() { srv.Close() })()
	for ctx.Err() == nil {
		l, err := net.Listen("tcp", at.String())
		if err == nil {
			s.setUnserved(nil)
			if err = srv.Serve(l); errors.Is(err, http.ErrServerClosed) {
				return
			}
		}
		s.setUnserved(err)
		select {
		case <-ctx.Done():
		case <-time.After(retryEvery):
		}
	}
}

// setUnserved notes why the node as a whole cannot be asked for, and logs news of it.
func (s *Server) setUnserved(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil && s.unserved == nil {
		s.log.Error("load balancers cannot ask for the health of this node: the address of source.kubernetes.health cannot be used", "error", err)
	}
	s.unserved = err
}

func (s *Server) answer(w http.ResponseWriter, st State, good bool) {
	reply(w, good, struct {
		LastUpdated  time.Time `json:"lastUpdated"`
		CurrentTime  time.Time `json:"currentTime"`
		NodeEligible bool      `json:"nodeEligible"`
	}{st.Updated.UTC(), time.Now().UTC(), !st.Leaving})
}

func reply(w http.ResponseWriter, good bool, body any) {
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("X-Content-Type-Options", "nosniff")
	if !good {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	// Who asks may have gone.
	_ = json.NewEncoder(w).Encode(body)
}

// errTaken says that a port is asked for twice.
var errTaken = errors.New("another Service has the same healthCheckNodePort")

// set replaces the checks. Ports of checks that are gone are closed; one that
// cannot be opened is tried again until it can.
func (s *Server) set(checks []Check) {
	s.mu.Lock()
	defer s.mu.Unlock()
	wanted := make(map[uint16]bool, len(checks))
	for _, c := range checks {
		wanted[c.Port] = true
	}
	for port, c := range s.checks {
		if !wanted[port] {
			c.server.Close()
			delete(s.checks, port)
		}
	}
	before := s.failed
	s.failed = make(map[Check]error)
	seen := make(map[uint16]bool, len(checks))
	for _, c := range checks {
		have := s.checks[c.Port]
		switch {
		case seen[c.Port]:
			s.failed[c] = errTaken
		case have != nil:
			have.Check = c
		default:
			s.try(c, before[c] == nil)
		}
		seen[c.Port] = true
	}
}

// try opens the port of a check; what is wrong is logged if it is news.
func (s *Server) try(c Check, news bool) {
	err := s.open(c)
	if err == nil {
		delete(s.failed, c)
		return
	}
	s.failed[c] = err
	if news {
		s.log.Warn("load balancers cannot ask at a healthCheckNodePort; it is tried again", "service", c.Namespace+"/"+c.Name, "port", c.Port, "error", err)
	}
}

// retryEvery is how often addresses are tried that could not be listened at.
const retryEvery = time.Second

// retry opens ports that others had, until the context ends.
func (s *Server) retry(ctx context.Context) {
	tick := time.NewTicker(retryEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		s.mu.Lock()
		for c, err := range s.failed {
			if ctx.Err() == nil && !errors.Is(err, errTaken) {
				s.try(c, false)
			}
		}
		s.mu.Unlock()
	}
}

// Warnings say where load balancers cannot ask, sorted.
func (s *Server) Warnings() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []string
	for c, err := range s.failed {
		all = append(all, fmt.Sprintf("Service %s/%s: load balancers cannot ask at healthCheckNodePort %d: %v", c.Namespace, c.Name, c.Port, err))
	}
	if s.unserved != nil {
		all = append(all, fmt.Sprintf("load balancers cannot ask for the health of this node at source.kubernetes.health: %v", s.unserved))
	}
	slices.Sort(all)
	return all
}

func (s *Server) open(c Check) error {
	l, err := net.Listen("tcp", ":"+strconv.Itoa(int(c.Port)))
	if err != nil {
		return err
	}
	srv := s.limit.Server(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { s.answerCheck(w, c.Port, overIPv4(r)) }))
	s.checks[c.Port] = &check{c, srv}
	// It ends when it is closed.
	go func() { _ = srv.Serve(l) }()
	return nil
}

// overIPv4 reports by which family a request came.
func overIPv4(r *http.Request) bool {
	local, ok := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	return ok && local.AddrPort().Addr().Unmap().Is4()
}

func (s *Server) answerCheck(w http.ResponseWriter, port uint16, v4 bool) {
	s.mu.Lock()
	have := s.checks[port]
	var c Check
	if have != nil {
		c = have.Check
	}
	s.mu.Unlock()
	st, endpoints := s.state(), c.Endpoints6
	if v4 {
		endpoints = c.Endpoints4
	}
	type name struct {
		Namespace string `json:"namespace"`
		Name      string `json:"name"`
	}
	w.Header().Set("X-Load-Balancing-Endpoint-Weight", strconv.Itoa(endpoints))
	reply(w, st.Healthy && endpoints > 0, struct {
		Service             name `json:"service"`
		LocalEndpoints      int  `json:"localEndpoints"`
		ServiceProxyHealthy bool `json:"serviceProxyHealthy"`
	}{name{c.Namespace, c.Name}, endpoints, st.Healthy})
}

func (s *Server) closeAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for port, c := range s.checks {
		c.server.Close()
		delete(s.checks, port)
	}
}
