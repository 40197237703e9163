package view

import (
	"time"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/flow"
)

// Flow is one connection.
type Flow struct {
	Time            time.Time `json:"time"`
	Event           string    `json:"event"`
	PID             int       `json:"pid,omitempty"`
	Command         string    `json:"command,omitempty"`
	Cgroup          string    `json:"cgroup,omitempty"` // of the process
	UID             *uint32   `json:"uid,omitempty"`    // of the socket
	Client          string    `json:"client,omitempty"` // the socket's own address and port
	Service         string    `json:"service,omitempty"`
	Protocol        string    `json:"protocol"`
	VIP             string    `json:"vip,omitempty"`
	Backend         string    `json:"backend,omitempty"`
	Proxy           string    `json:"proxy,omitempty"`  // the proxy of this host that the client uses
	Target          string    `json:"target,omitempty"` // of a client of a proxy, as it has named it
	Via             []string  `json:"via,omitempty"`    // upstreams, the nearest first; direct
	User            string    `json:"user,omitempty"`   // of a client of a proxy, as it has authenticated
	Outcome         string    `json:"outcome"`
	RTTSeconds      float64   `json:"rttSeconds,omitempty"`
	DurationSeconds float64   `json:"durationSeconds,omitempty"`
	Sent            *uint64   `json:"sent,omitempty"` // bytes; absent: not known
	Received        *uint64   `json:"received,omitempty"`
}

// NewProxyFlow returns what is shown of a flow of a client of a proxy.
func NewProxyFlow(f api.ProxyFlow) Flow {
	out := Flow{
		Time: f.Began.UTC(), Event: "open", Client: f.Client.String(), Protocol: "tcp", Proxy: f.Proxy, Target: f.Target, Via: f.Via, User: f.User,
		Outcome: f.Outcome, Sent: &f.Sent, Received: &f.Received,
	}
	if f.Command == "UDP ASSOCIATE" {
		out.Protocol = "udp"
	}
	if !f.Ended.IsZero() {
		out.Event, out.Time, out.DurationSeconds = "closed", f.Ended.UTC(), f.Ended.Sub(f.Began).Seconds()
	} else if f.Outcome == "connected" {
		out.Event = "established"
	}
	return out
}

// NewFlow returns what is shown of a flow.
func NewFlow(f flow.Flow) Flow {
	out := Flow{
		Time: f.Time.UTC(), Event: f.Event, PID: f.PID, Command: f.Command, Cgroup: f.Cgroup, Service: f.Service, Protocol: f.Protocol.String(),
		VIP: f.VIP.String(), Outcome: f.Outcome, RTTSeconds: f.RTT.Seconds(), DurationSeconds: f.Duration.Seconds(),
	}
	if f.HasOwner {
		out.UID = &f.UID
	}
	if f.Client.IsValid() {
		out.Client = f.Client.String()
	}
	if f.Backend.IsValid() {
		out.Backend = f.Backend.String()
	}
	if f.HasBytes {
		out.Sent, out.Received = &f.Sent, &f.Received
	}
	return out
}
