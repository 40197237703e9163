package bgp

import (
	"context"
	"log/slog"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/osrg/gobgp/v4/api"
	"github.com/osrg/gobgp/v4/pkg/apiutil"
	"github.com/osrg/gobgp/v4/pkg/packet/bgp"
	"github.com/osrg/gobgp/v4/pkg/server"

	"github.com/pentad/pentad/config"
)

// settings are what a session is made with; with others it is another one. They are
// comparable.
type settings struct {
	id          netip.Addr
	as          uint32
	address     netip.Addr
	peerAS      uint32
	port        uint16
	source      netip.Addr
	password    string
	hold        time.Duration
	multihop    int
	ttlSecurity bool
	keep        bool
	restart     time.Duration // 0 without keep
}

// route is what a peer is told of a prefix.
type route struct {
	hop        netip.Addr // unspecified: our end of the session
	attributes config.Attributes
}

// speaker is our end of the session with one peer.
type speaker struct {
	settings settings
	retry    time.Duration
	log      *slog.Logger
	server   *server.BgpServer
	stop     context.CancelFunc // of the events

	mu     sync.Mutex
	routes map[netip.Prefix]route // that the peer is told
	state  State
	since  time.Time
	why    string        // the session is not, or was not, established
	asked  time.Time     // when the peer was asked for that last
	gone   string        // what BFD says of a peer whose session was reset
	takes  map[bool]bool // families that the peer takes; true: IPv4; nil: not known
	ups    uint64
}

// deferral is how long, after a restart, routes are held back until the peer has sent
// all of its own (RFC 4724, section 4.1).
const deferral = 2 * time.Second

// newSpeaker begins a session, with all routes at hand before it is established: a peer
// that kept those of an earlier agent drops what is not among them.
func newSpeaker(s settings, retry time.Duration, log *slog.Logger, routes map[netip.Prefix]route) (*speaker, error) {
	x := &speaker{settings: s, retry: retry, log: log.With("peer", s.address), routes: make(map[netip.Prefix]route), since: time.Now()}
	x.server = server.NewBgpServer(server.LoggerOption(slog.New(slog.DiscardHandler), new(slog.LevelVar)))
	ctx, stop := context.WithCancel(context.Background())
	x.stop = stop
	go x.server.Serve()
	if err := x.begin(ctx, routes); err != nil {
		x.close(false)
		return nil, err
	}
	return x, nil
}

func (x *speaker) begin(ctx context.Context, routes map[netip.Prefix]route) error {
	if err := x.server.StartBgp(ctx, &api.StartBgpRequest{Global: &api.Global{Asn: x.settings.as, RouterId: x.settings.id.String(), ListenPort: -1}}); err != nil {
		return err
	}
	if err := x.refuseRoutes(ctx); err != nil {
		return err
	}
	if err := x.setRoutes(routes); err != nil {
		return err
	}
	if err := x.server.WatchEvent(ctx, server.WatchEventMessageCallbacks{OnPeerUpdate: x.onPeer}, server.WatchPeer()); err != nil {
		return err
	}
	return x.server.AddPeer(ctx, &api.AddPeerRequest{Peer: x.peer()})
}

// refuseRoutes has routes taken from here only.
func (x *speaker) refuseRoutes(ctx context.Context) error {
	own := &api.Policy{Name: "own", Statements: []*api.Statement{{
		Name:       "own",
		Conditions: &api.Conditions{RouteType: api.Conditions_ROUTE_TYPE_LOCAL},
		Actions:    &api.Actions{RouteAction: api.RouteAction_ROUTE_ACTION_ACCEPT},
	}}}
	if err := x.server.AddPolicy(ctx, &api.AddPolicyRequest{Policy: own}); err != nil {
		return err
	}
	return x.server.SetPolicyAssignment(ctx, &api.SetPolicyAssignmentRequest{Assignment: &api.PolicyAssignment{
		Name: "global", Direction: api.PolicyDirection_POLICY_DIRECTION_IMPORT, Policies: []*api.Policy{own},
		DefaultAction: api.RouteAction_ROUTE_ACTION_REJECT,
	}})
}

// peer is the peer in the words of gobgp.
func (x *speaker) peer() *api.Peer {
	s := x.settings
	out := &api.Peer{
		Conf: &api.PeerConf{NeighborAddress: s.address.String(), PeerAsn: s.peerAS, LocalAsn: s.as, AuthPassword: s.password},
		Timers: &api.Timers{Config: &api.TimersConfig{
			HoldTime: seconds(s.hold), KeepaliveInterval: max(1, seconds(s.hold)/3), ConnectRetry: seconds(x.retry), IdleHoldTimeAfterReset: 1,
		}},
		Transport: &api.Transport{RemotePort: uint32(s.port)},
	}
	if s.source.IsValid() {
		out.Transport.LocalAddress = s.source.String()
	}
	if s.multihop > 0 {
		out.EbgpMultihop = &api.EbgpMultihop{Enabled: true, MultihopTtl: uint32(s.multihop)}
	}
	if s.ttlSecurity {
		out.TtlSecurity = &api.TtlSecurity{Enabled: true, TtlMin: 255}
	}
	if s.keep {
		out.GracefulRestart = &api.GracefulRestart{
			Enabled: true, RestartTime: uint32(seconds(s.restart)), DeferralTime: uint32(seconds(deferral)), LocalRestarting: true,
		}
	}
	for _, f := range []api.Family_Afi{api.Family_AFI_IP, api.Family_AFI_IP6} {
		family := &api.Family{Afi: f, Safi: api.Family_SAFI_UNICAST}
		out.AfiSafis = append(out.AfiSafis, &api.AfiSafi{
			Config:            &api.AfiSafiConfig{Family: family, Enabled: true},
			MpGracefulRestart: &api.MpGracefulRestart{Config: &api.MpGracefulRestartConfig{Enabled: s.keep}},
		})
	}
	return out
}

func seconds(d time.Duration) uint64 { return uint64(d / time.Second) }

// isFor reports whether the session is one with these settings. Another time to retry is
// worth no session that is established.
func (x *speaker) isFor(s settings, retry time.Duration) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.settings == s && (x.retry == retry || x.state == Established)
}

// setRoutes makes what the peer is told just these.
func (x *speaker) setRoutes(routes map[netip.Prefix]route) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	var add, remove []*apiutil.Path
	for p, r := range routes {
		if old, ok := x.routes[p]; !ok || !reflect.DeepEqual(old, r) {
			path, err := newPath(p, r)
			if err != nil {
				return err
			}
			add = append(add, path)
		}
	}
	for p, r := range x.routes {
		if _, ok := routes[p]; !ok {
			path, err := newPath(p, r)
			if err != nil {
				return err
			}
			remove = append(remove, path)
		}
	}
	if len(add) > 0 {
		if _, err := x.server.AddPath(apiutil.AddPathRequest{Paths: add}); err != nil {
			return err
		}
	}
	if len(remove) > 0 {
		if err := x.server.DeletePath(apiutil.DeletePathRequest{Paths: remove}); err != nil {
			return err
		}
	}
	x.routes = maps.Clone(routes)
	return nil
}

func newPath(p netip.Prefix, r route) (*apiutil.Path, error) {
	nlri, err := bgp.NewIPAddrPrefix(p)
	if err != nil {
		return nil, err
	}
	path := &apiutil.Path{Family: bgp.RF_IPv4_UC, Nlri: nlri, Attrs: []bgp.PathAttributeInterface{bgp.NewPathAttributeOrigin(bgp.BGP_ORIGIN_ATTR_TYPE_IGP)}}
	if p.Addr().Is4() {
		hop, err := bgp.NewPathAttributeNextHop(r.hop)
		if err != nil {
			return nil, err
		}
		path.Attrs = append(path.Attrs, hop)
	} else {
		path.Family = bgp.RF_IPv6_UC
		reach, err := bgp.NewPathAttributeMpReachNLRI(path.Family, []bgp.PathNLRI{{NLRI: nlri}}, r.hop)
		if err != nil {
			return nil, err
		}
		path.Attrs = append(path.Attrs, reach)
	}
	a := r.attributes
	if a.MED != nil {
		path.Attrs = append(path.Attrs, bgp.NewPathAttributeMultiExitDisc(*a.MED))
	}
	if a.LocalPref != nil {
		path.Attrs = append(path.Attrs, bgp.NewPathAttributeLocalPref(*a.LocalPref))
	}
	if len(a.Communities) > 0 {
		path.Attrs = append(path.Attrs, bgp.NewPathAttributeCommunities(a.Communities))
	}
	if len(a.LargeCommunities) > 0 {
		large := make([]*bgp.LargeCommunity, len(a.LargeCommunities))
		for i, c := range a.LargeCommunities {
			large[i] = bgp.NewLargeCommunity(c[0], c[1], c[2])
		}
		path.Attrs = append(path.Attrs, bgp.NewPathAttributeLargeCommunities(large))
	}
	return path, nil
}

// onPeer takes what the session says of itself.
func (x *speaker) onPeer(e *apiutil.WatchEventMessage_PeerEvent, at time.Time) {
	if e.Type != apiutil.PEER_EVENT_STATE {
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	was := x.state
	x.state = stateOf(e.Peer.State.SessionState)
	if (x.state == Established) != (was == Established) {
		x.since = at
	}
	if x.state == Established {
		x.takes = familiesOf(e.Peer.State.RemoteCap)
	}
	if why := x.reasonOf(e.Peer.State.DisconnectReason, e.Peer.State.DisconnectMessage); why != "" && x.state != Established {
		if why != x.why || was == Established {
			x.log.Warn("a router is told nothing any more, or not yet", "reason", why)
		}
		x.why = why
	}
	if x.state == Established && was != Established {
		x.ups, x.why, x.gone = x.ups+1, "", ""
		x.log.Info("a router is told of VIPs", "prefixes", len(x.routes))
	}
}

// reasonOf is reason, but for a session that was reset from here.
func (x *speaker) reasonOf(why api.PeerState_DisconnectReason, message string) string {
	if x.gone != "" && why == api.PeerState_DISCONNECT_REASON_NOTIFICATION_SENT {
		return x.gone
	}
	return reason(why, message)
}

// familiesOf returns the families that a peer takes, by its capabilities (RFC 4760, section
// 8); one that names none takes IPv4.
func familiesOf(capabilities []bgp.ParameterCapabilityInterface) map[bool]bool {
	takes := make(map[bool]bool)
	for _, c := range capabilities {
		if m, ok := c.(*bgp.CapMultiProtocol); ok {
			takes[true] = takes[true] || m.CapValue == bgp.RF_IPv4_UC
			takes[false] = takes[false] || m.CapValue == bgp.RF_IPv6_UC
		}
	}
	if len(takes) == 0 {
		takes[true] = true
	}
	return takes
}

// askWhy asks the peer for the reason why there is no session, if there is none for a
// while and it was not asked just now.
func (x *speaker) askWhy(ctx context.Context) {
	x.mu.Lock()
	now := time.Now()
	due := x.state != Established && now.Sub(x.since) > refresh && now.Sub(x.asked) > diagnoseEvery
	if due {
		x.asked = now
	}
	x.mu.Unlock()
	if !due {
		return
	}
	why := diagnose(ctx, x.settings)
	x.mu.Lock()
	defer x.mu.Unlock()
	if why == "" || x.state == Established || why == x.why || ctx.Err() != nil {
		return
	}
	x.why = why
	x.log.Warn("a router is told nothing", "reason", why)
}

// reset ends the session, which begins anew.
func (x *speaker) reset(why string) {
	x.mu.Lock()
	established := x.state == Established
	if established {
		x.gone = "BFD says that it is gone: " + why
	}
	x.mu.Unlock()
	if !established {
		return
	}
	err := x.server.ResetPeer(context.Background(), &api.ResetPeerRequest{Address: x.settings.address.String(), Communication: "BFD: " + why})
	if err != nil {
		x.log.Error("the session with a peer that is gone could not be reset", "error", err)
	}
}

// gracefulShutdown asks routers to take another way (RFC 8326).
const gracefulShutdown = 0xffff0000

// sayFarewell marks every route as one that goes soon. It reports whether anybody is
// there to see it.
func (x *speaker) sayFarewell() bool {
	x.mu.Lock()
	listens := x.state == Established && len(x.routes) > 0
	routes := maps.Clone(x.routes)
	x.mu.Unlock()
	if !listens {
		return false
	}
	for p, r := range routes {
		if !slices.Contains(r.attributes.Communities, gracefulShutdown) {
			r.attributes.Communities = append(slices.Clone(r.attributes.Communities), gracefulShutdown)
		}
		if r.attributes.LocalPref != nil {
			r.attributes.LocalPref = new(uint32)
		}
		routes[p] = r
	}
	return x.setRoutes(routes) == nil
}

// close ends the session. With keep the peer is not told, so that it waits for another
// agent.
func (x *speaker) close(keep bool) {
	x.stop()
	if err := x.server.StopBgp(context.Background(), &api.StopBgpRequest{AllowGracefulRestart: keep}); err != nil {
		x.log.Debug("the speaker did not end cleanly", "error", err)
	}
	x.server.Stop()
}

func (x *speaker) report() Report {
	x.mu.Lock()
	defer x.mu.Unlock()
	return Report{
		State: x.state, Since: x.since, Why: x.why, Ups: x.ups, Prefixes: slices.SortedFunc(maps.Keys(x.routes), netip.Prefix.Compare), Takes: maps.Clone(x.takes),
	}
}
