package api

import (
	"context"
	"net/http"
	"net/netip"
	"time"
)

// Blocks is the state of the blocks of addresses of which hosts claim their own.
type Blocks struct {
	Own  []netip.Prefix `json:"own"`           // by their names
	All  int            `json:"all"`           // of all hosts
	Away time.Time      `json:"away,omitzero"` // since when the store has not answered; zero: it does
	Why  string         `json:"why,omitempty"` // what is wrong with it
}

// Block is a block that some host has claimed.
type Block struct {
	Prefixes  []netip.Prefix `json:"prefixes"` // one of a family; the first is its name
	Host      string         `json:"host"`     // empty: its object does not say
	Machine   string         `json:"machine,omitempty"`
	Addresses []netip.Addr   `json:"addresses"`      // of the host
	Draining  bool           `json:"draining"`       // no more addresses of it are given
	Own       bool           `json:"own"`            // it is this host's
	Used      *int           `json:"used,omitempty"` // addresses that pods have; absent: another host knows
}

// ReleaseRequest asks to free a block of a host that is gone.
type ReleaseRequest struct {
	Block netip.Prefix `json:"block"` // its name
}

// Blocks asks for the blocks of all hosts.
func (c *Client) Blocks(ctx context.Context) ([]Block, error) {
	var all []Block
	return all, c.call(ctx, http.MethodGet, "/v1/blocks", nil, &all)
}

// ReleaseBlock frees a block of a host that is gone, and returns whose it was.
func (c *Client) ReleaseBlock(ctx context.Context, r ReleaseRequest) (Block, error) {
	var b Block
	return b, c.call(ctx, http.MethodPost, "/v1/blocks/release", r, &b)
}

func serveBlocks(mux *http.ServeMux, a Agent) {
	mux.HandleFunc("GET /v1/blocks", func(w http.ResponseWriter, _ *http.Request) {
		all, err := a.Blocks()
		if err != nil {
			reply(w, http.StatusInternalServerError, Failure{err.Error()})
			return
		}
		reply(w, http.StatusOK, all)
	})
	mux.HandleFunc("POST /v1/blocks/release", act(a.ReleaseBlock))
}
