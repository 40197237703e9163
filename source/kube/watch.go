package kube

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
	"unique"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/pentad/pentad/service"
	"github.com/pentad/pentad/source"
)

// addressesEvery is how often the addresses of the host are looked at.
const addressesEvery = 5 * time.Second

// byService is the index of slices by their Service.
const byService = "service"

// notOurs are the labels by which a Service asks not to be served; its slices
// have them, too.
const notOurs = "!" + corev1.IsHeadlessService + ",!service.kubernetes.io/service-proxy-name"

// Source watches one cluster for one node.
type Source struct {
	opts                    Options
	log                     *slog.Logger
	services, slices, nodes cache.SharedIndexInformer
	registrations           []cache.ResourceEventHandlerRegistration
	ranges                  cache.SharedIndexInformer // of ServiceCIDRs, which not every cluster has
	rangesRegistration      cache.ResourceEventHandlerRegistration

	mu    sync.Mutex
	dirty map[types.NamespacedName]bool
	all   bool      // everything has to be translated again
	away  time.Time // since when the API server does not answer; zero: it does
	why   error     // what was wrong last
	wake  chan struct{}
	// noRanges is why there are no ServiceCIDRs, if that is how it is.
	noRanges error

	// Owned by Run.
	emitted  bool // everything was translated once
	at       surroundings
	claims   claims
	entries  map[types.NamespacedName]*entry
	problems map[types.NamespacedName][]string
	checks   map[types.NamespacedName]*source.Check
	unserved map[types.NamespacedName]int        // ports
	strays   map[types.NamespacedName]netip.Addr // endpoints in ranges of ServiceCIDRs
	list     []*service.Service                  // sorted by name
}

// entry is what became of a Service.
type entry struct {
	origin  *service.Origin
	made    time.Time                // when it was heard of; zero: it was there before
	missing map[netip.Addr]time.Time // endpoints of origin that no slice has, and since when
	wanted  []want                   // as translated
	granted []*service.Service       // with the listeners that it may have
}

// Connect returns how to reach the API server: by a kubeconfig, or with the
// service account of this pod if the path is empty.
func Connect(kubeconfig string) (*rest.Config, error) {
	load := rest.InClusterConfig
	if kubeconfig != "" {
		load = func() (*rest.Config, error) { return clientcmd.BuildConfigFromFlags("", kubeconfig) }
	}
	c, err := load()
	if err != nil {
		return nil, fmt.Errorf("source.kubernetes: how to reach the API server: %w", err)
	}
	c.UserAgent = "pentad"
	c.ContentType = runtime.ContentTypeProtobuf
	return c, nil
}

// New returns a source that has not asked for anything yet.
func New(config *rest.Config, opts Options, log *slog.Logger) (*Source, error) {
	s := &Source{
		opts: opts, log: log, wake: make(chan struct{}, 1), dirty: make(map[types.NamespacedName]bool),
		claims: make(claims), entries: make(map[types.NamespacedName]*entry),
		problems: make(map[types.NamespacedName][]string), checks: make(map[types.NamespacedName]*source.Check),
		unserved: make(map[types.NamespacedName]int), strays: make(map[types.NamespacedName]netip.Addr),
	}
	config = rest.CopyConfig(config)
	config.Wrap(func(next http.RoundTripper) http.RoundTripper { return listening{next, s} })
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	core, discovery := client.CoreV1().RESTClient(), client.DiscoveryV1().RESTClient()
	ours := func(o *metav1.ListOptions) { o.LabelSelector = notOurs }
	self := func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, opts.Node).String()
	}
	every := func(*metav1.ListOptions) {}
	networking := client.NetworkingV1().RESTClient()
	index := cache.Indexers{byService: func(o any) ([]string, error) { return []string{o.(*slice).owner().String()}, nil }}
	for _, x := range []struct {
		informer *cache.SharedIndexInformer
		watched
	}{
		{&s.services, watched{core, "services", &corev1.Service{}, ours, nil, s.watchFailed, s.serviceChanged}},
		{&s.slices, watched{discovery, "endpointslices", &discoveryv1.EndpointSlice{}, ours, index, s.watchFailed, s.sliceChanged}},
		// Its own Node alone: a watch of all of them from every node would cost the
		// API server the square of their number.
		{&s.nodes, watched{core, "nodes", &corev1.Node{}, self, nil, s.watchFailed, s.nodeChanged}},
		{&s.ranges, watched{networking, "servicecidrs", &networkingv1.ServiceCIDR{}, every, nil, s.rangesFailed, s.rangesChanged}},
	} {
		registration, err := x.watch(x.informer)
		if err != nil {
			return nil, err
		}
		if x.informer == &s.ranges {
			s.rangesRegistration = registration
		} else {
			s.registrations = append(s.registrations, registration)
		}
	}
	return s, nil
}

// watched is a kind of object and what is done about it.
type watched struct {
	client   rest.Interface
	resource string
	kind     runtime.Object
	selected func(*metav1.ListOptions)
	index    cache.Indexers
	failed   cache.WatchErrorHandlerWithContext
	changed  func(before, after any)
}

// watch makes the informer.
func (w watched) watch(into *cache.SharedIndexInformer) (cache.ResourceEventHandlerRegistration, error) {
	lw := cache.NewFilteredListWatchFromClient(w.client, w.resource, metav1.NamespaceAll, w.selected)
	informer := cache.NewSharedIndexInformer(lw, w.kind, 0, w.index)
	*into = informer
	if err := informer.SetTransform(trim); err != nil {
		return nil, err
	}
	if err := informer.SetWatchErrorHandlerWithContext(w.failed); err != nil {
		return nil, err
	}
	return informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(o any) { w.changed(nil, o) },
		UpdateFunc: func(before, after any) {
			if before.(metav1.Object).GetResourceVersion() != after.(metav1.Object).GetResourceVersion() {
				w.changed(before, after)
			}
		},
		DeleteFunc: func(o any) {
			if lost, ok := o.(cache.DeletedFinalStateUnknown); ok {
				o = lost.Obj
			}
			w.changed(o, nil)
		},
	})
}

func (s *slice) owner() types.NamespacedName {
	return types.NamespacedName{Namespace: s.Namespace, Name: s.service}
}

func (s *Source) serviceChanged(before, after any) {
	if after == nil {
		after = before
	}
	s.touch(after.(*clusterService).key())
}

func (s *Source) sliceChanged(before, after any) {
	for _, o := range []any{before, after} {
		if o != nil {
			s.touch(o.(*slice).owner())
		}
	}
}

func (s *Source) nodeChanged(before, after any) {
	if before != nil && after != nil && before.(*node).equal(after.(*node)) {
		return
	}
	s.touchAll()
}

func (s *Source) rangesChanged(_, _ any) { s.touchAll() }

func (s *Source) touch(key types.NamespacedName) {
	s.mu.Lock()
	s.dirty[key] = true
	s.mu.Unlock()
	s.notify()
}

// listening hears when the API server does what it is asked: a watch that goes on after
// it was away may bring nothing for hours.
type listening struct {
	next   http.RoundTripper
	source *Source
}

// RoundTrip implements http.RoundTripper.
func (l listening) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := l.next.RoundTrip(r)
	switch {
	case err == nil && resp.StatusCode < http.StatusMultipleChoices:
		l.source.answered()
	case err != nil && r.Context().Err() == nil:
		// client-go does not tell of a watch that is refused.
		l.source.failed(err)
	}
	return resp, err
}

func (s *Source) answered() {
	s.mu.Lock()
	away := s.away
	s.away, s.why = time.Time{}, nil
	s.mu.Unlock()
	if !away.IsZero() {
		s.log.Info("the API server answers again", "source", "kubernetes", "away", time.Since(away).Round(time.Millisecond))
	}
}

func (s *Source) touchAll() {
	s.mu.Lock()
	s.all = true
	s.mu.Unlock()
	s.notify()
}

func (s *Source) notify() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// watchFailed says once that the API server is away; client-go tries again.
func (s *Source) watchFailed(_ context.Context, _ *cache.Reflector, err error) { s.failed(err) }

func (s *Source) failed(err error) {
	s.mu.Lock()
	first := s.away.IsZero()
	if first {
		s.away = time.Now()
	}
	s.why = err
	s.mu.Unlock()
	if first && !errors.Is(err, context.Canceled) {
		s.log.Warn("the API server does not answer; services stay as they are", "source", "kubernetes", "error", err)
	}
}

// Away returns since when the API server does not answer, or the zero time, and what
// is wrong.
func (s *Source) Away() (since time.Time, why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.away.IsZero() {
		return s.away, nil
	}
	return s.away, explained(s.why)
}

// explained adds to an error what to look at, where it does not say so itself.
func explained(err error) error {
	var certificate x509.CertificateInvalidError
	if errors.As(err, &certificate) && certificate.Reason == x509.Expired {
		return fmt.Errorf("%w; if the certificate is not that old, the clock of this host is wrong", err)
	}
	return err
}

// Run emits every state of the cluster until the context ends, the first one once
// all objects are known. While emit is busy changes gather.
func (s *Source) Run(ctx context.Context, emit func(source.Update)) error {
	var tasks sync.WaitGroup
	defer tasks.Wait()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	for _, informer := range []cache.SharedIndexInformer{s.services, s.slices, s.nodes, s.ranges} {
		tasks.Go(func() { informer.RunWithContext(ctx) })
	}
	for _, r := range s.registrations {
		if !cache.WaitForCacheSync(ctx.Done(), r.HasSynced) {
			return nil
		}
	}
	if !cache.WaitForCacheSync(ctx.Done(), s.rangesKnown) {
		return nil
	}
	addresses := time.NewTicker(addressesEvery)
	defer addresses.Stop()
	s.touchAll()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-addresses.C:
			if s.moved() {
				s.touchAll()
			}
		case <-s.wake:
			if u, changed := s.update(); changed {
				emit(u)
			}
		}
	}
}

// self returns this node's Node, or nil while there is none.
func (s *Source) self() *node {
	for _, o := range s.nodes.GetStore().List() {
		return o.(*node)
	}
	return nil
}

// moved reports whether the host has other addresses than before.
func (s *Source) moved() bool {
	own := s.hostAddresses(s.self())
	if len(own) != len(s.at.own) {
		return true
	}
	for a := range own {
		if !s.at.own[a] {
			return true
		}
	}
	return false
}

func (s *Source) hostAddresses(n *node) map[netip.Addr]bool {
	own := make(map[netip.Addr]bool)
	if n != nil {
		for _, a := range n.addresses {
			own[a] = true
		}
	}
	found, err := net.InterfaceAddrs()
	if err != nil {
		s.log.Warn("the addresses of this host cannot be read", "source", "kubernetes", "error", err)
	}
	for _, f := range found {
		p, err := netip.ParsePrefix(f.String())
		if err == nil && servable(p.Addr()) == nil {
			own[p.Addr().Unmap()] = true
		}
	}
	return own
}

// look finds out where this node is.
func (s *Source) look() *node {
	n := s.self()
	s.at = surroundings{node: unique.Make(s.opts.Node), own: s.hostAddresses(n), allowed: s.opts.AllowExternalIPs}
	if n != nil {
		s.at.zone = unique.Make(n.zone)
	}
	s.at.nodePorts = nodePortAddresses(s.opts.NodePortAddresses, s.at.own, n)
	for _, c := range s.cidrs() {
		s.at.ranges = append(s.at.ranges, c.ranges...)
	}
	return n
}

// nodePortAddresses returns where NodePorts are served: at the addresses of the host
// that were chosen, or at those that the Node names first.
func nodePortAddresses(chosen []netip.Prefix, own map[netip.Addr]bool, n *node) []netip.Addr {
	if len(chosen) == 0 {
		if n == nil {
			return nil
		}
		return n.primary
	}
	var all []netip.Addr
	for a := range own {
		if slices.ContainsFunc(chosen, func(p netip.Prefix) bool { return p.Contains(a) }) {
			all = append(all, a)
		}
	}
	slices.SortFunc(all, netip.Addr.Compare)
	return all
}

// update translates what has changed.
func (s *Source) update() (source.Update, bool) {
	s.mu.Lock()
	dirty, all := s.dirty, s.all
	s.dirty, s.all = make(map[types.NamespacedName]bool), false
	s.mu.Unlock()
	if !all && len(dirty) == 0 {
		return source.Update{}, false
	}
	n := s.self()
	if all {
		n = s.look()
		for _, key := range s.services.GetStore().ListKeys() {
			dirty[parseKey(key)] = true
		}
		for key := range s.entries {
			dirty[key] = true
		}
	}
	s.settle(dirty)
	s.emitted = true
	u := source.Update{From: service.SourceKubernetes, Services: s.list, Problems: s.sortedProblems(n)}
	u.Checks = s.sortedChecks()
	for _, ports := range s.unserved {
		u.Unserved += ports
	}
	if n != nil {
		u.Pods, u.Leaving = n.pods, n.leaving
	}
	reserved, problems := reserve(s.cidrs(), s.at.own, u.Pods, s.strays)
	u.Reserved, u.Problems = reserved, append(append(u.Problems, problems...), s.rangesProblem()...)
	return u, true
}

func parseKey(key string) types.NamespacedName {
	namespace, name, _ := strings.Cut(key, "/")
	return types.NamespacedName{Namespace: namespace, Name: name}
}

// settle translates Services and finds out who may have which listener.
func (s *Source) settle(dirty map[types.NamespacedName]bool) {
	said := make(map[types.NamespacedName][]string, len(dirty))
	contested := make(map[types.NamespacedName]bool)
	for key := range dirty {
		others, problems := s.retranslate(key)
		said[key] = problems
		for _, o := range others {
			contested[o] = true
		}
	}
	gone, come := make(map[*service.Service]bool), []*service.Service(nil)
	regrant := func(key types.NamespacedName) {
		e := s.entries[key]
		granted, lost := s.claims.grant(key, e.wanted)
		come = append(come, s.replace(e, granted, gone)...)
		if _, fresh := said[key]; !fresh {
			// Only who has what has changed for it.
			said[key] = withoutLost(s.problems[key])
		}
		s.note(key, append(said[key], lost...))
		if len(e.wanted) == 0 {
			delete(s.entries, key)
		}
	}
	for key := range dirty {
		regrant(key)
	}
	for key := range contested {
		if !dirty[key] && s.entries[key] != nil {
			regrant(key)
		}
	}
	s.list = merge(s.list, gone, come)
}

// retranslate returns the Services that want the same as this one did or does.
func (s *Source) retranslate(key types.NamespacedName) (others []types.NamespacedName, problems []string) {
	e := s.entries[key]
	if e == nil {
		e = &entry{}
		s.entries[key] = e
	}
	others = s.claims.remove(key, e.wanted)
	e.wanted = nil
	delete(s.checks, key)
	delete(s.unserved, key)
	delete(s.strays, key)
	o, exists, err := s.services.GetStore().GetByKey(key.String())
	if err != nil || !exists {
		return others, nil
	}
	cs := o.(*clusterService)
	t := translate(cs, s.slicesOf(key), &s.at)
	e.wanted = t.services
	s.linger(e, key, t.origin, time.Now())
	if t.check != nil {
		s.checks[key] = t.check
	}
	if t.unserved > 0 {
		s.unserved[key] = t.unserved
	}
	if t.stray.IsValid() {
		s.strays[key] = t.stray
	}
	return append(others, s.claims.add(cs, e.wanted)...), t.problems
}

// missingFor is how long an endpoint must be in no slice of its Service to be gone:
// the endpointslice-controller moves endpoints from one slice to another by writing
// both, one after the other.
const missingFor = time.Second

// settledAfter is how long the endpoints of a Service that is new, or made anew, may be
// on their way.
const settledAfter = 5 * time.Second

// linger leaves endpoints in the origin that have been in the slices until just now.
func (s *Source) linger(e *entry, key types.NamespacedName, to *service.Origin, now time.Time) {
	before := e.origin
	e.origin = to
	if to == nil {
		return
	}
	if before == nil {
		before = &service.Origin{}
		// Those that are there when this process starts have theirs.
		if s.emitted {
			e.made = now
			time.AfterFunc(settledAfter, func() { s.touch(key) })
		}
	}
	to.Unsettled = !e.made.IsZero() && now.Sub(e.made) < settledAfter
	missing := make(map[netip.Addr]time.Time)
	for _, a := range before.Endpoints {
		if to.Has(a) {
			continue
		}
		since, noted := e.missing[a]
		if !noted {
			since = now
		}
		if now.Sub(since) < missingFor {
			missing[a] = since
		}
		if !noted {
			time.AfterFunc(missingFor, func() { s.touch(key) })
		}
	}
	for a := range missing {
		to.Endpoints = append(to.Endpoints, a)
	}
	slices.SortFunc(to.Endpoints, netip.Addr.Compare)
	e.missing = missing
}

func (s *Source) slicesOf(key types.NamespacedName) []*slice {
	found, err := s.slices.GetIndexer().ByIndex(byService, key.String())
	if err != nil {
		return nil
	}
	all := make([]*slice, len(found))
	for i, o := range found {
		all[i] = o.(*slice)
	}
	slices.SortFunc(all, func(a, b *slice) int { return strings.Compare(a.Name, b.Name) })
	return all
}

// replace makes granted what the entry has; what is the same stays the same
// pointer. It notes what goes and returns what comes.
func (s *Source) replace(e *entry, granted []*service.Service, gone map[*service.Service]bool) (come []*service.Service) {
	old := make(map[string]*service.Service, len(e.granted))
	for _, o := range e.granted {
		old[o.Name] = o
	}
	for i, g := range granted {
		before := old[g.Name]
		delete(old, g.Name)
		if before != nil && before.Equal(g) {
			granted[i] = before
			continue
		}
		if before != nil {
			gone[before] = true
		}
		come = append(come, g)
	}
	for _, o := range old {
		gone[o] = true
	}
	e.granted = granted
	return come
}

// merge returns a sorted list without what is gone and with what comes. Few of many
// change: they are searched for, and the rest is copied as it is.
func merge(list []*service.Service, gone map[*service.Service]bool, come []*service.Service) []*service.Service {
	type edit struct {
		at  int // in list
		add *service.Service
	}
	find := func(name string) int {
		i, _ := slices.BinarySearchFunc(list, name, func(s *service.Service, name string) int { return strings.Compare(s.Name, name) })
		return i
	}
	edits := make([]edit, 0, len(gone)+len(come))
	for s := range gone {
		edits = append(edits, edit{at: find(s.Name)})
	}
	for _, s := range come {
		edits = append(edits, edit{find(s.Name), s})
	}
	slices.SortFunc(edits, func(a, b edit) int {
		if c := cmp.Compare(a.at, b.at); c != 0 || a.add == nil || b.add == nil {
			return c
		}
		return strings.Compare(a.add.Name, b.add.Name)
	})
	next := make([]*service.Service, 0, len(list)+len(come))
	done := 0
	for _, e := range edits {
		next = append(next, list[done:max(done, e.at)]...)
		done = max(done, e.at)
		if e.add != nil {
			next = append(next, e.add)
		}
		if done < len(list) && gone[list[done]] {
			done++
		}
	}
	return append(next, list[done:]...)
}

// lostMark tells what claims say from what the translation says.
const lostMark = "is not served for it:"

func withoutLost(problems []string) []string {
	return slices.DeleteFunc(slices.Clone(problems), func(p string) bool { return strings.Contains(p, lostMark) })
}

func (s *Source) note(key types.NamespacedName, problems []string) {
	if len(problems) == 0 {
		delete(s.problems, key)
		return
	}
	s.problems[key] = problems
}

func (s *Source) sortedProblems(n *node) []source.Problem {
	var all []source.Problem
	if n == nil {
		all = append(all, source.Problem{Object: "Node " + s.opts.Node, Message: "there is no such Node, so that this host's addresses, zone and pods are not known: " +
			"NodePorts are served on the loopback only; set source.kubernetes.node"})
	}
	for key, problems := range s.problems {
		for _, p := range problems {
			all = append(all, source.Problem{Object: "Service " + key.String(), Message: p})
		}
	}
	slices.SortFunc(all, func(a, b source.Problem) int {
		return cmp.Or(strings.Compare(a.Object, b.Object), strings.Compare(a.Message, b.Message))
	})
	return slices.Compact(all)
}

func (s *Source) sortedChecks() []source.Check {
	all := make([]source.Check, 0, len(s.checks))
	for _, c := range s.checks {
		all = append(all, *c)
	}
	slices.SortFunc(all, func(a, b source.Check) int {
		return cmp.Or(cmp.Compare(a.Port, b.Port), strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
	})
	return all
}
