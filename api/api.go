// Package api is how commands and scrapers talk to a running agent: HTTP and
// JSON on a unix socket, metrics and health on a TCP port. It holds what both
// ends agree on, the server and the client; it decides nothing.
package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// DefaultRunDir is where the agent's socket lies.
const DefaultRunDir = "/run/pentad"

// SocketName is the agent's socket below its run directory.
const SocketName = "pentad.sock"

// ErrNoAgent says that no agent answers on the socket.
var ErrNoAgent = errors.New("no agent is running")

// ErrDenied says that this user may not talk to the agent.
var ErrDenied = errors.New("you may not talk to the agent")

// Status is what the agent says of itself.
type Status struct {
	Version  string    `json:"version"`
	PID      int       `json:"pid"`
	Started  time.Time `json:"started"`
	Revision uint64    `json:"revision"`
	Config   Config    `json:"config"`
	Probes   Probes    `json:"probes"`
	Cluster  *Cluster  `json:"cluster,omitempty"` // absent: this host is no node of one
	Fleet    *Fleet    `json:"fleet,omitempty"`   // absent: this host belongs to none
	Blocks   *Blocks   `json:"blocks,omitempty"`  // absent: this host claims none
	// MemoryLimit, in bytes, is what the agent's cgroups let it have; 0: anything.
	// What the kernel keeps of the UDP sockets of others counts in it.
	MemoryLimit uint64   `json:"memoryLimit,omitempty"`
	Problems    []string `json:"problems,omitempty"` // what is wrong, a sentence each
	Warnings    []string `json:"warnings,omitempty"` // what makes no sense in the cluster and breaks nothing else
}

// Cluster is the state of a node of a Kubernetes cluster.
type Cluster struct {
	Node     string    `json:"node"`
	Services int       `json:"services"`      // ports of Services, by traffic policy
	Away     time.Time `json:"away,omitzero"` // since when the API server has not answered; zero: it does
	Why      string    `json:"why,omitempty"` // what is wrong with it
	Changed  time.Time `json:"changed"`       // when the last change came from it
	Leaving  bool      `json:"leaving"`       // the Node is being deleted
	Updates  uint64    `json:"updates"`       // how many changes came
	Unserved int       `json:"unserved"`      // ports of a protocol that is not served

	Untracked []netip.Prefix `json:"untracked,omitempty"` // between which connections are not tracked
}

// Fleet is the state of the etcd that hosts share.
type Fleet struct {
	Services int       `json:"services"`         // that this host takes
	Away     time.Time `json:"away,omitzero"`    // since when it has not answered; zero: it does
	Why      string    `json:"why,omitempty"`    // what is wrong with it
	Changed  time.Time `json:"changed,omitzero"` // when the last change came from it
	Updates  uint64    `json:"updates"`          // how many came
}

// Config is the state of the configuration file.
type Config struct {
	File   string    `json:"file"`
	Loaded time.Time `json:"loaded"`          // when the configuration in force was read
	Error  string    `json:"error,omitempty"` // why a later one is not in force
}

// Probes says how the probing of backends goes.
type Probes struct {
	Targets int     `json:"targets"`
	Done    uint64  `json:"done"`
	Late    float64 `json:"lateSeconds"` // how late the last one started
}

// DrainRequest asks to drain backends or to end that.
type DrainRequest struct {
	Service string         `json:"service,omitempty"` // empty: every service that has the address
	Address netip.AddrPort `json:"address,omitzero"`
	Host    netip.Addr     `json:"host,omitzero"` // in place of an Address: every port of it
	Drained bool           `json:"drained"`
	// Timeout is after how long the connections that are left are closed,
	// in ns; 0: never. The kernel remembers it in whole seconds.
	Timeout time.Duration `json:"timeout,omitempty"`
	// Force drains the last backend that takes connections, too.
	Force bool `json:"force,omitempty"`
}

// DrainAnswer is what a DrainRequest has done.
type DrainAnswer struct {
	Backends []Drained `json:"backends"`
	// Refusing are listeners that refuse connections from now on, because of it.
	Refusing []string `json:"refusing,omitempty"`
}

// Drained is one backend that a DrainRequest was about.
type Drained struct {
	Service string         `json:"service"`
	Address netip.AddrPort `json:"address"`
	Was     bool           `json:"was"`            // it had been so before
	Note    string         `json:"note,omitempty"` // why it takes nothing all the same
}

// ReloadRequest asks to read the configuration again and to put it in force.
type ReloadRequest struct {
	Force bool `json:"force,omitempty"` // whatever it removes; see guard in the configuration
}

// ReloadAnswer says what is in force.
type ReloadAnswer struct {
	Revision uint64 `json:"revision"`
	Services int    `json:"services"`
	Changed  bool   `json:"changed"` // the services are others than before
	// Skipped says of included files that they are not valid, and not in force.
	Skipped []string `json:"skipped,omitempty"`
}

// ProbeRecord is what the probes of one backend met with.
type ProbeRecord struct {
	Service     string         `json:"service"`
	Address     netip.AddrPort `json:"address"`
	Probe       string         `json:"probe"`
	Up          bool           `json:"up"`
	Last        time.Time      `json:"last,omitzero"` // when the last one ended; absent: none has
	TookSeconds float64        `json:"tookSeconds,omitempty"`
	Error       string         `json:"error,omitempty"` // of the last one; absent: a success
	InARow      int            `json:"inARow,omitempty"`
	Next        time.Time      `json:"next,omitzero"`
	Succeeded   uint64         `json:"succeeded"`
	Failed      uint64         `json:"failed"`
}

// Failure is the body of every answer that is not 200.
type Failure struct {
	Error string `json:"error"`
}

// Agent is what the server needs of an agent.
type Agent interface {
	Status() Status
	// Drain returns once the kernel has it.
	Drain(ctx context.Context, r DrainRequest) (DrainAnswer, error)
	// Reload returns once the kernel has what the file says.
	Reload(ctx context.Context, r ReloadRequest) (ReloadAnswer, error)
	// Probes returns the records of a service, or of all with "".
	Probes(service string) []ProbeRecord
	// Proxies returns the proxies of this host.
	Proxies() []Proxy
	// Forwards returns the forwards of this host.
	Forwards() []Forward
	// Captures returns whose connections are captured on this host.
	Captures() []Capture
	// Announcements returns what the network is told.
	Announcements() Announcements
	// Withdraw takes it all back, for good.
	Withdraw()
	// Blocks returns the blocks of addresses of all hosts.
	Blocks() ([]Block, error)
	// ReleaseBlock frees a block of a host that is gone.
	ReleaseBlock(ctx context.Context, r ReleaseRequest) (Block, error)
	// ProxyFlows returns the connections of their clients that are open.
	ProxyFlows() []ProxyFlow
	// FollowProxies calls each for every one that gets to its target or ends, until the
	// context ends. It calls started when nothing is missed any more.
	FollowProxies(ctx context.Context, started func(), each func(ProxyFlow) error) error
}

// ErrNotFound is returned by an Agent for an object that does not exist.
var ErrNotFound = errors.New("not found")

// ErrRefused is returned by an Agent for what makes no sense, or what it does only when
// it is forced to.
var ErrRefused = errors.New("not possible")

// Handler serves the agent's API.
func Handler(a Agent) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) {
		reply(w, http.StatusOK, a.Status())
	})
	mux.HandleFunc("GET /v1/probes", func(w http.ResponseWriter, r *http.Request) {
		reply(w, http.StatusOK, a.Probes(r.URL.Query().Get("service")))
	})
	serveProxies(mux, a)
	serveCaptures(mux, a)
	serveAnnouncements(mux, a)
	serveBlocks(mux, a)
	mux.HandleFunc("POST /v1/drain", act(a.Drain))
	mux.HandleFunc("POST /v1/reload", act(a.Reload))
	return mux
}

// act serves what changes something.
func act[Request, Answer any](do func(context.Context, Request) (Answer, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var req Request
		if err := json.NewDecoder(io.LimitReader(r.Body, 1<<16)).Decode(&req); err != nil {
			reply(w, http.StatusBadRequest, Failure{"the request is not valid: " + err.Error()})
			return
		}
		answer, err := do(r.Context(), req)
		switch {
		case errors.Is(err, ErrNotFound):
			reply(w, http.StatusNotFound, Failure{err.Error()})
		case errors.Is(err, ErrRefused):
			reply(w, http.StatusBadRequest, Failure{err.Error()})
		case err != nil:
			reply(w, http.StatusInternalServerError, Failure{err.Error()})
		default:
			reply(w, http.StatusOK, answer)
		}
	}
}

func reply(w http.ResponseWriter, code int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	// The client is gone if this fails, and nobody is left to tell.
	_ = json.NewEncoder(w).Encode(body)
}

// Listen opens the agent's socket in the run directory, for its owner alone. A
// socket that a dead agent left is replaced; the caller holds the agent's lock.
func Listen(runDir string) (net.Listener, error) {
	if err := os.MkdirAll(runDir, 0o755); err != nil {
		return nil, fmt.Errorf("run directory: %w", err)
	}
	path := filepath.Join(runDir, SocketName)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("agent socket: %w", err)
	}
	// Nobody else may connect, not even before a chmod.
	mask := unix.Umask(0o177)
	l, err := net.Listen("unix", path)
	unix.Umask(mask)
	if err != nil {
		return nil, fmt.Errorf("agent socket: %w", err)
	}
	return l, nil
}

// Client talks to the agent of one run directory.
type Client struct {
	path string
	http *http.Client
}

// NewClient returns a client; it does not connect yet.
func NewClient(runDir string) *Client {
	path := filepath.Join(runDir, SocketName)
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}
	return &Client{path: path, http: &http.Client{
		Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true},
		Timeout:   10 * time.Second,
	}}
}

// Status asks the agent how it is. The error is ErrNoAgent when none answers.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var s Status
	return s, c.call(ctx, http.MethodGet, "/v1/status", nil, &s)
}

// Probes asks what the probes of a service, or of all with "", met with.
func (c *Client) Probes(ctx context.Context, service string) ([]ProbeRecord, error) {
	var all []ProbeRecord
	return all, c.call(ctx, http.MethodGet, "/v1/probes?service="+url.QueryEscape(service), nil, &all)
}

// Drain asks the agent to drain backends or to end that.
func (c *Client) Drain(ctx context.Context, r DrainRequest) (DrainAnswer, error) {
	var a DrainAnswer
	return a, c.call(ctx, http.MethodPost, "/v1/drain", r, &a)
}

// Reload asks the agent to read its file again.
func (c *Client) Reload(ctx context.Context, r ReloadRequest) (ReloadAnswer, error) {
	var a ReloadAnswer
	return a, c.call(ctx, http.MethodPost, "/v1/reload", r, &a)
}

func (c *Client) call(ctx context.Context, method, path string, body, into any) error {
	var in bytes.Buffer
	if body != nil {
		if err := json.NewEncoder(&in).Encode(body); err != nil {
			return err
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://pentad"+path, &in)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	var refused *net.OpError
	if errors.As(err, &refused) && refused.Op == "dial" {
		if errors.Is(err, os.ErrPermission) {
			return fmt.Errorf("%w: %s; run as root", ErrDenied, c.path)
		}
		return fmt.Errorf("%w (nobody answers on %s)", ErrNoAgent, c.path)
	}
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		var f Failure
		if err := json.NewDecoder(resp.Body).Decode(&f); err != nil || f.Error == "" {
			return fmt.Errorf("the agent answered %s", resp.Status)
		}
		return errors.New(f.Error)
	}
	return json.NewDecoder(resp.Body).Decode(into)
}
