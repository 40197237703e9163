package api

import (
	"context"
	"net/http"
	"net/netip"
	"time"
)

// Announcements are what the network is told of VIPs.
type Announcements struct {
	VIPs  []AnnouncedVIP `json:"vips"`
	Peers []BGPPeer      `json:"peers"`
	// Announcers are the other hosts that could have the same VIPs on a segment.
	Announcers []string `json:"announcers,omitempty"`
}

// AnnouncedVIP is an address that others may be told of.
type AnnouncedVIP struct {
	Address  netip.Addr `json:"address"`
	Services []string   `json:"services"` // that have it
	Missing  string     `json:"missing,omitempty"`
	// To are who is told now, NotTo who is not though there is nothing missing, and why.
	To    []string `json:"to"`
	NotTo []string `json:"notTo,omitempty"`
	L2    *L2      `json:"l2,omitempty"`
}

// L2 is who has a VIP on its segment.
type L2 struct {
	Owner   string `json:"owner,omitempty"` // a host; empty: none that is an announcer
	Here    bool   `json:"here"`
	Problem string `json:"problem,omitempty"` // somebody else has it, too
}

// BGPPeer is a router that is told of VIPs.
type BGPPeer struct {
	Address     string    `json:"address"`
	AS          uint32    `json:"as"`
	State       string    `json:"state"`
	Established bool      `json:"established"`
	Since       time.Time `json:"since,omitzero"` // established, or not
	Why         string    `json:"why,omitempty"`  // it is not
	Prefixes    int       `json:"prefixes"`       // that it is told, or would be
	BFD         *BFDPeer  `json:"bfd,omitempty"`
}

// BFDPeer is a router that BFD watches.
type BFDPeer struct {
	State string    `json:"state"`
	Since time.Time `json:"since"`
	Why   string    `json:"why,omitempty"` // it is not up
	// DetectionSeconds is after how long without a packet it is gone; 0: it says nothing.
	DetectionSeconds float64 `json:"detectionSeconds"`
}

// Announcements asks what the network is told.
func (c *Client) Announcements(ctx context.Context) (Announcements, error) {
	var all Announcements
	return all, c.call(ctx, http.MethodGet, "/v1/announcements", nil, &all)
}

// Withdraw takes back from the network what it was told, because this host will not
// forward any more.
func (c *Client) Withdraw(ctx context.Context) error {
	var none struct{}
	return c.call(ctx, http.MethodPost, "/v1/withdraw", none, &none)
}

func serveAnnouncements(mux *http.ServeMux, a Agent) {
	mux.HandleFunc("GET /v1/announcements", func(w http.ResponseWriter, _ *http.Request) {
		reply(w, http.StatusOK, a.Announcements())
	})
	mux.HandleFunc("POST /v1/withdraw", act(func(context.Context, struct{}) (struct{}, error) {
		a.Withdraw()
		return struct{}{}, nil
	}))
}
