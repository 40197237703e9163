package api

import (
	"context"
	"encoding/json"
	"net/http"
	"net/netip"
	"time"
)

// Proxy is a proxy of this host and what it has done since the agent has it.
type Proxy struct {
	Name        string   `json:"name"`
	Protocols   []string `json:"protocol"`
	Listen      []string `json:"listen"`
	Missing     []string `json:"missing,omitempty"` // of these, where it does not listen
	Open        int      `json:"open"`              // connections of clients
	Connections uint64   `json:"connections"`
	Failed      uint64   `json:"failed"`   // that reached no target
	Sent        uint64   `json:"sent"`     // bytes, by clients
	Received    uint64   `json:"received"` // by clients
}

// Forward is a forward and how it is.
type Forward struct {
	Name    string    `json:"name"`
	Listen  string    `json:"listen,omitempty"`
	Missing bool      `json:"missing,omitempty"` // it does not listen there
	Remote  string    `json:"remote,omitempty"`
	To      string    `json:"to"`
	Via     []string  `json:"via"`
	Up      bool      `json:"up"`    // its way is open
	Since   time.Time `json:"since"` // since when it is so
	Why     string    `json:"why,omitempty"`
	Open    int       `json:"open"` // connections
}

// ProxyFlow is one connection of a client of a proxy, or one association for datagrams.
type ProxyFlow struct {
	ID       uint64         `json:"id"`
	Proxy    string         `json:"proxy"`
	Protocol string         `json:"protocol"` // socks5, http, transparent
	Command  string         `json:"command"`
	Client   netip.AddrPort `json:"client"`
	User     string         `json:"user,omitempty"`
	Target   string         `json:"target"` // as the client has named it
	Via      []string       `json:"via,omitempty"`
	Began    time.Time      `json:"began"`
	Ended    time.Time      `json:"ended,omitzero"`
	Sent     uint64         `json:"sent"`
	Received uint64         `json:"received"`
	Outcome  string         `json:"outcome"`
}

// Proxies asks which proxies there are.
func (c *Client) Proxies(ctx context.Context) ([]Proxy, error) {
	var all []Proxy
	return all, c.call(ctx, http.MethodGet, "/v1/proxies", nil, &all)
}

// Forwards asks which forwards there are.
func (c *Client) Forwards(ctx context.Context) ([]Forward, error) {
	var all []Forward
	return all, c.call(ctx, http.MethodGet, "/v1/forwards", nil, &all)
}

// ProxyFlows asks for the connections of clients of proxies that are open.
func (c *Client) ProxyFlows(ctx context.Context) ([]ProxyFlow, error) {
	var all []ProxyFlow
	return all, c.call(ctx, http.MethodGet, "/v1/proxies/flows", nil, &all)
}

// FollowProxies calls each for every connection of a client of a proxy when it gets to
// its target and when it ends, until the context or the agent ends. ready is called once
// nothing is missed any more.
func (c *Client) FollowProxies(ctx context.Context, ready func(), each func(ProxyFlow)) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://pentad/v1/proxies/follow", nil)
	if err != nil {
		return err
	}
	endless := *c.http
	endless.Timeout = 0
	resp, err := endless.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	ready()
	for d := json.NewDecoder(resp.Body); ; {
		var f ProxyFlow
		if err := d.Decode(&f); err != nil {
			return ctx.Err()
		}
		each(f)
	}
}

func serveProxies(mux *http.ServeMux, a Agent) {
	mux.HandleFunc("GET /v1/proxies", func(w http.ResponseWriter, _ *http.Request) {
		reply(w, http.StatusOK, a.Proxies())
	})
	mux.HandleFunc("GET /v1/forwards", func(w http.ResponseWriter, _ *http.Request) {
		reply(w, http.StatusOK, a.Forwards())
	})
	mux.HandleFunc("GET /v1/proxies/flows", func(w http.ResponseWriter, _ *http.Request) {
		reply(w, http.StatusOK, a.ProxyFlows())
	})
	mux.HandleFunc("GET /v1/proxies/follow", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/x-ndjson")
		out := http.NewResponseController(w)
		e := json.NewEncoder(w)
		started := func() { _ = out.Flush() }
		// The client is gone if this fails.
		_ = a.FollowProxies(r.Context(), started, func(f ProxyFlow) error {
			if err := e.Encode(f); err != nil {
				return err
			}
			return out.Flush()
		})
	})
}
