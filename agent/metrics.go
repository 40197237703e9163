package agent

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/service"
)

// Metrics are all that the agent exports beside those of Go and of the process.
// docs/metrics.md is written from this list.
var Metrics = []struct{ Name, Type, Labels, Help string }{
	{"pentad_build_info", "gauge", "version", "Always 1."},
	{"pentad_config_valid", "gauge", "", "1 when the newest text of the file is in force, else 0."},
	{"pentad_config_last_reload_successful", "gauge", "", "1 when the file could be put in force when it was read last, else 0; the same as pentad_config_valid."},
	{"pentad_config_last_reload_success_timestamp_seconds", "gauge", "", "When a text of the file was put in force last, in Unix seconds."},
	{"pentad_config_revision", "gauge", "", "Revision of the snapshot in force; it grows with every change."},
	{"pentad_services", "gauge", "", "Services of the snapshot."},
	{"pentad_services_without_room", "gauge", "", "Services that did not fit into the kernel."},
	{"pentad_service_usable_backends", "gauge", "service,family", "Backends to which the next connection may go; 0: connections are refused."},
	{"pentad_service_metrics_omitted", "gauge", "", "1 when there are more than 10,000 services or backends, for which there are no metrics each, else 0."},
	{"pentad_role_up", "gauge", "role", "1 when the role does what it should, else 0."},
	{"pentad_kernel_in_sync", "gauge", "", "1 when the kernel has the whole snapshot, else 0."},
	{"pentad_backends", "gauge", "state", "Backends of the snapshot by state."},
	{"pentad_hook_attached", "gauge", "hook", "1 when the program is attached, else 0."},
	{"pentad_kernel_memory_bytes", "gauge", "map", "Kernel memory of a map."},
	{"pentad_connections_translated_total", "counter", "", "Connections and first datagrams that got a backend."},
	{"pentad_connections_refused_total", "counter", "", "Connections and datagrams refused because no backend was usable."},
	{"pentad_service_refused_total", "counter", "service", "Connections and datagrams of sockets that were refused because no backend of the service was usable."},
	{"pentad_connections_untracked_total", "counter", "", "Connections whose VIP could not be remembered: getpeername shows the backend."},
	{"pentad_connections_despite_ejection_total", "counter", "", "Connections that went to an ejected backend because too many are ejected."},
	{"pentad_connections_reset_total", "counter", "", "Connections closed because their backend was down or gone."},
	{"pentad_binds_refused_total", "counter", "", "Sockets of the host that wanted a port that is held for a service."},
	{"pentad_backend_up", "gauge", "service,backend", "1 when the next connection may go to the backend, or could if it were not full or a lower group did not serve; else 0."},
	{"pentad_backend_connections_in_flight", "gauge", "service,backend", "TCP connections from their SYN to their end, and connected UDP sockets."},
	{"pentad_backend_connections_total", "counter", "service,backend", "Connections that were begun."},
	{"pentad_backend_connect_failures_total", "counter", "service,backend", "Connects whose SYN was refused, found no way, or got no answer in time."},
	{"pentad_backend_ejections_total", "counter", "service,backend", "How often a client ejected the backend."},
	{"pentad_backend_ejected", "gauge", "service,backend", "1 while any client does not use the backend, else 0."},
	{"pentad_backend_rtt_seconds", "gauge", "service,backend", "Smoothed round trip time of handshakes; absent while unknown."},
	{"pentad_backend_response_seconds", "gauge", "service,backend", "Time from a request to the first byte of its answer, as measured last; absent while unknown."},
	{"pentad_backend_metrics_omitted", "gauge", "", "1 when there are more than 10,000 backends, for which there are no metrics each, else 0."},
	{"pentad_cluster_services", "gauge", "", "Ports of Services of the Kubernetes cluster, by traffic policy. This and the next ones: on its nodes only."},
	{"pentad_cluster_updates_total", "counter", "", "Changes that came from the cluster."},
	{"pentad_cluster_warnings", "gauge", "", "Things in the cluster that make no sense; `pentad status` names them."},
	{"pentad_cluster_ports_unserved", "gauge", "", "Ports of Services whose protocol is not served: SCTP."},
	{"pentad_cluster_away_seconds", "gauge", "", "For how long the API server has not answered; 0 while it does."},
	{"pentad_proxy_connections_open", "gauge", "proxy", "Connections of clients of a proxy that are open."},
	{"pentad_director_packets_total", "counter", "service", "Packets to a service with forward: direct that were sent on."},
	{"pentad_director_bytes_total", "counter", "service", "Their bytes, with all headers."},
	{"pentad_director_opened_total", "counter", "service", "TCP connections that they began."},
	{"pentad_director_dropped_total", "counter", "reason", "Packets to services with forward: direct that were dropped: no_real, no_way, ttl, malformed."},
	{"pentad_bgp_peer_up", "gauge", "peer", "1 while the session with a router is established, else 0."},
	{"pentad_bgp_sessions_total", "counter", "peer", "How often it was."},
	{"pentad_bgp_prefixes_announced", "gauge", "peer", "Prefixes that a router is told, or would be while there is no session."},
	{"pentad_bfd_peer_up", "gauge", "peer", "1 while BFD sees the router, else 0. Only of peers with bfd."},
	{"pentad_bfd_sessions_total", "counter", "peer", "How often it came to see it."},
	{"pentad_l2_vips_owned", "gauge", "", "VIPs that this host has on its segments. This and the next ones: with announce.l2 only."},
	{"pentad_l2_vips_contested", "gauge", "", "VIPs that somebody else says he has, too, or has who is no announcer."},
	{"pentad_l2_announcers", "gauge", "", "Announcers of the group, with this one."},
	{"pentad_l2_answers_total", "counter", "protocol", "Questions for VIPs that the kernel has answered, by arp and ndp."},
	{"pentad_pods", "gauge", "", "Pods of this host that have a device of the plugin. This and the next ones: with a section pods only."},
	{"pentad_pod_addresses_free", "gauge", "", "Pods that still find an address in the blocks of this host."},
	{"pentad_pod_blocks", "gauge", "state", "Prefixes of this host's blocks: open, or draining, of which no more addresses are given."},
	{"pentad_pod_hosts", "gauge", "", "Other hosts to whose pods this one knows the way."},
	{"pentad_proxy_connections_total", "counter", "proxy", "Connections of clients of a proxy that asked for something."},
	{"pentad_proxy_connections_failed_total", "counter", "proxy", "Of these, those that did not get to their target."},
	{"pentad_proxy_bytes_total", "counter", "proxy,direction", "Bytes that clients of a proxy have sent and received."},
	{"pentad_probes_total", "counter", "service,result", "Probes that ended, by success and failure."},
	{"pentad_probe_duration_seconds", "gauge", "service,backend", "How long the last probe of a backend took."},
	{"pentad_probe_failures_in_a_row", "gauge", "service,backend", "Probes in a row that failed; 0 after a success."},
	{"pentad_probe_delay_seconds", "gauge", "", "How late the last probe started, or one that still waits."},
	{"pentad_probes_unmade", "gauge", "", "Backends whose last probe could not be made, by a fault of this host: they count as what they were."},
}

// collector reads the kernel and the agent when it is scraped.
type collector struct {
	agent *Agent
	descs map[string]*prometheus.Desc
}

func newCollector(a *Agent) *collector {
	c := &collector{agent: a, descs: make(map[string]*prometheus.Desc)}
	for _, m := range Metrics {
		var labels []string
		if m.Labels != "" {
			labels = strings.Split(m.Labels, ",")
		}
		c.descs[m.Name] = prometheus.NewDesc(m.Name, m.Help, labels, nil)
	}
	return c
}

// Describe implements prometheus.Collector.
func (c *collector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range c.descs {
		out <- d
	}
}

// meter takes what is measured. It is good for one scrape.
type meter struct {
	descs    map[string]*prometheus.Desc
	out      chan<- prometheus.Metric
	services *service.Snapshot
}

func (m meter) gauge(name string, v float64, labels ...string) {
	m.out <- prometheus.MustNewConstMetric(m.descs[name], prometheus.GaugeValue, v, labels...)
}

func (m meter) counter(name string, v uint64, labels ...string) {
	m.out <- prometheus.MustNewConstMetric(m.descs[name], prometheus.CounterValue, float64(v), labels...)
}

func (m meter) failed(name string, err error) {
	m.out <- prometheus.NewInvalidMetric(m.descs[name], err)
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(out chan<- prometheus.Metric) {
	a := c.agent
	a.mu.Lock()
	snap, invalid, loaded := a.known.services, a.invalid, a.loaded
	a.mu.Unlock()
	m := meter{c.descs, out, snap}
	var failed error
	for _, r := range a.roles() {
		if !r.minor {
			failed = errors.Join(failed, r.err)
		}
		if r.mode != off {
			m.gauge("pentad_role_up", truth(r.isSound()), r.name)
		}
	}
	m.gauge("pentad_config_last_reload_successful", truth(invalid == nil))
	if !loaded.IsZero() {
		m.gauge("pentad_config_last_reload_success_timestamp_seconds", float64(loaded.Unix()))
	}
	m.gauge("pentad_build_info", 1, a.opts.Version)
	m.gauge("pentad_config_valid", truth(invalid == nil))
	m.gauge("pentad_config_revision", float64(snap.Revision))
	m.gauge("pentad_services", float64(len(snap.Services)))
	m.gauge("pentad_services_without_room", float64(withoutRoom(failed)))
	m.gauge("pentad_kernel_in_sync", truth(failed == nil))
	states := make(map[service.State]int)
	for _, s := range snap.Services {
		for _, st := range s.States() {
			states[st]++
		}
	}
	for _, st := range []service.State{service.Serving, service.Standby, service.Drained, service.Down} {
		m.gauge("pentad_backends", float64(states[st]), st.String())
	}
	st := a.monitor.Stats()
	m.gauge("pentad_probe_delay_seconds", st.Late.Seconds())
	m.gauge("pentad_probes_unmade", float64(st.Unmade))
	a.measureProbes(m)
	if s := a.Status(); s.Cluster != nil {
		measureCluster(s, m)
	}
	for _, d := range a.drivers {
		d.measure(m)
	}
}

// measureProbes says how the probes of every backend end, if there are not too many.
func (a *Agent) measureProbes(m meter) {
	records := a.monitor.Records("")
	type counts struct{ succeeded, failed uint64 }
	byService := make(map[string]counts)
	for k, r := range records {
		c := byService[k.Service]
		byService[k.Service] = counts{c.succeeded + r.Succeeded, c.failed + r.Failed}
	}
	if len(byService) <= maxServiceMetrics {
		for name, c := range byService {
			m.counter("pentad_probes_total", c.succeeded, name, "success")
			m.counter("pentad_probes_total", c.failed, name, "failure")
		}
	}
	if len(records) > maxBackendMetrics {
		return
	}
	for k, r := range records {
		if r.At.IsZero() {
			continue
		}
		failures := 0
		if r.Err != nil {
			failures = r.InARow
		}
		m.gauge("pentad_probe_duration_seconds", r.Took.Seconds(), k.Service, k.Address.String())
		m.gauge("pentad_probe_failures_in_a_row", float64(failures), k.Service, k.Address.String())
	}
}

func measureCluster(s api.Status, m meter) {
	m.gauge("pentad_cluster_services", float64(s.Cluster.Services))
	m.counter("pentad_cluster_updates_total", s.Cluster.Updates)
	m.gauge("pentad_cluster_warnings", float64(len(s.Warnings)))
	m.gauge("pentad_cluster_ports_unserved", float64(s.Cluster.Unserved))
	away := 0.0
	if !s.Cluster.Away.IsZero() {
		away = time.Since(s.Cluster.Away).Seconds()
	}
	m.gauge("pentad_cluster_away_seconds", away)
}

func measureSocket(p *socket.Plane, m meter) {
	usage, err := p.Usage()
	if errors.Is(err, socket.ErrNothingInstalled) {
		return
	}
	if err != nil {
		m.failed("pentad_connections_translated_total", err)
		return
	}
	for _, h := range usage.Hooks {
		m.gauge("pentad_hook_attached", truth(h.Attached), h.Name)
	}
	for name, n := range usage.Memory {
		m.gauge("pentad_kernel_memory_bytes", float64(n), name)
	}
	m.counter("pentad_connections_translated_total", usage.Counters.Translated)
	m.counter("pentad_connections_refused_total", usage.Counters.Refused)
	m.counter("pentad_connections_untracked_total", usage.Counters.Untracked)
	m.counter("pentad_connections_despite_ejection_total", usage.Counters.Panics)
	m.counter("pentad_connections_reset_total", usage.Counters.Reset)
	m.counter("pentad_binds_refused_total", usage.Counters.Held)
	loads, err := p.Loads(maxBackendMetrics)
	m.gauge("pentad_backend_metrics_omitted", truth(errors.Is(err, socket.ErrMany)))
	m.gauge("pentad_service_metrics_omitted", truth(len(m.services.Services) > maxServiceMetrics || err != nil))
	if err != nil {
		return
	}
	type key struct {
		service string
		address netip.AddrPort
	}
	known := make(map[key]service.Load, len(loads))
	for _, l := range loads {
		measureBackend(l, m)
		known[key{l.Service, l.Address}] = service.Load{InFlight: l.InFlight, Ejected: l.Ejected}
	}
	refusals, err := p.Refusals()
	if err != nil {
		m.failed("pentad_service_refused_total", err)
	}
	for _, s := range m.services.Services {
		if n, known := refusals[s.Name]; known && len(m.services.Services) <= maxServiceMetrics {
			m.counter("pentad_service_refused_total", n, s.Name)
		}
		measureService(s, m, func(b service.Backend) service.Load { return known[key{s.Name, b.Address}] })
	}
}

// measureService says how many backends take connections, and which.
func measureService(s *service.Service, m meter, load func(service.Backend) service.Load) {
	listens := make(map[service.Family]bool)
	for _, l := range s.Listeners {
		listens[service.FamilyOf(l.Address.Addr())] = true
	}
	for _, f := range service.EachFamily {
		if !listens[f] {
			continue
		}
		c := s.Choose(f, load)
		if len(m.services.Services) <= maxServiceMetrics {
			m.gauge("pentad_service_usable_backends", float64(len(c.Takers())), s.Name, f.String())
		}
		for _, b := range c.Candidates {
			m.gauge("pentad_backend_up", truth(b.Takes || b.State == service.Standby || b.State == service.Full), s.Name, b.Address.String())
		}
	}
}

func measureBackend(l socket.BackendLoad, m meter) {
	labels := []string{l.Service, l.Address.String()}
	m.gauge("pentad_backend_connections_in_flight", float64(l.InFlight), labels...)
	m.counter("pentad_backend_connections_total", l.Connections, labels...)
	m.counter("pentad_backend_connect_failures_total", l.Failed, labels...)
	m.counter("pentad_backend_ejections_total", l.Ejections, labels...)
	m.gauge("pentad_backend_ejected", truth(l.Ejected), labels...)
	if l.RTT > 0 {
		m.gauge("pentad_backend_rtt_seconds", l.RTT.Seconds(), labels...)
	}
	if l.Response > 0 {
		m.gauge("pentad_backend_response_seconds", l.Response.Seconds(), labels...)
	}
}

// maxServiceMetrics is for how many services there are metrics each.
const maxServiceMetrics = 10_000

// maxBackendMetrics is for how many backends there are metrics each. Beyond it a
// scrape would cost more than the connections.
const maxBackendMetrics = 10_000

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

func withoutRoom(err error) int {
	var full *socket.FullError
	if !errors.As(err, &full) {
		return 0
	}
	return len(full.Services)
}

// metricsHandler serves /metrics and /healthz.
func (a *Agent) metricsHandler() http.Handler {
	r := prometheus.NewRegistry()
	r.MustRegister(newCollector(a), collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(r, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		status := a.Status()
		if len(status.Problems) > 0 {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		for _, p := range status.Problems {
			fmt.Fprintln(w, p)
		}
		if len(status.Problems) == 0 {
			fmt.Fprintln(w, "ok")
		}
	})
	return mux
}
