package api

import (
	"context"
	"net/http"
)

// Capture is whose connections are led to a proxy that they do not know of.
type Capture struct {
	Name     string   `json:"name"`
	Mode     string   `json:"mode"`     // ebpf, redirect, tproxy
	Protocol []string `json:"protocol"` // tcp, udp
	Whose    string   `json:"whose"`    // in words: processes, or what arrives at an interface
	Where    string   `json:"where"`    // in words: destinations
	To       []string `json:"to"`       // where the proxy listens
	Proxy    string   `json:"proxy,omitempty"`
	Down     string   `json:"onProxyDown"` // refuse, direct
}

// Captures asks which captures there are.
func (c *Client) Captures(ctx context.Context) ([]Capture, error) {
	var all []Capture
	return all, c.call(ctx, http.MethodGet, "/v1/captures", nil, &all)
}

func serveCaptures(mux *http.ServeMux, a Agent) {
	mux.HandleFunc("GET /v1/captures", func(w http.ResponseWriter, _ *http.Request) {
		reply(w, http.StatusOK, a.Captures())
	})
}
