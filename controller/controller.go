// Package controller is the cluster's controller: it gives Services of type
// LoadBalancer their addresses out of AddressPools, and frees blocks of addresses whose
// nodes are gone. Of several that run one is active, by a Lease.
//
// What has been given is in the status of the Services, and nowhere else: every
// decision is made anew from all of it by the package ipam, so that a controller
// that dies in the middle leaves nothing behind that the next one would not see.
package controller

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
	"k8s.io/client-go/tools/record"

	"github.com/pentad/pentad/ipam"
)

// DefaultLease is how long a controller that is silent stays the active one.
const DefaultLease = 15 * time.Second

// Options say how a controller runs.
type Options struct {
	Namespace    string // of the Lease
	Identity     string // of this process; empty: host name and process
	RequireClass bool   // Services without a loadBalancerClass belong to somebody else
	Log          *slog.Logger

	// How long a leader that does not answer is waited for. Zero: 15 s, as
	// Kubernetes' own controllers do.
	LeaseDuration time.Duration
	// How long a Node has been gone before its blocks of addresses are free. Zero:
	// DefaultQuarantine.
	Quarantine time.Duration
}

// Controller is one running controller.
type Controller struct {
	opts    Options
	log     *slog.Logger
	client  kubernetes.Interface
	dynamic dynamic.Interface
	events  record.EventRecorder

	services, namespaces, pools cache.SharedIndexInformer
	wake                        chan struct{}

	// Owned by the loop.
	written map[types.UID]*corev1.Service // what the informer may not know yet
	said    map[types.UID]string          // the last message of each object
}

// LeaseName is the Lease by which one controller is active.
const LeaseName = "pentad-controller"

// Run runs a controller until the context ends.
func Run(ctx context.Context, config *rest.Config, opts Options) error {
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	if opts.Identity == "" {
		host, err := os.Hostname()
		if err != nil {
			return err
		}
		opts.Identity = fmt.Sprintf("%s-%d", host, os.Getpid())
	}
	if opts.LeaseDuration == 0 {
		opts.LeaseDuration = DefaultLease
	}
	if opts.Quarantine == 0 {
		opts.Quarantine = DefaultQuarantine
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	// Custom resources have no protobuf.
	asJSON := rest.CopyConfig(config)
	asJSON.ContentType = runtime.ContentTypeJSON
	dyn, err := dynamic.NewForConfig(asJSON)
	if err != nil {
		return err
	}
	lock := &resourcelock.LeaseLock{
		LeaseMeta: metav1.ObjectMeta{Name: LeaseName, Namespace: opts.Namespace}, Client: client.CoordinationV1(),
		LockConfig: resourcelock.ResourceLockConfig{Identity: opts.Identity},
	}
	lost := make(chan error, 1)
	// Who has lost the lease and gets it again begins when the first time is over.
	leading := make(chan struct{}, 1)
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Lock: lock, LeaseDuration: opts.LeaseDuration, RenewDeadline: opts.LeaseDuration * 2 / 3, RetryPeriod: opts.LeaseDuration / 8,
		ReleaseOnCancel: true, Name: LeaseName,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(ctx context.Context) {
				select {
				case leading <- struct{}{}:
				case <-ctx.Done():
					return
				}
				defer func() { <-leading }()
				opts.Log.Info("this controller is the active one", "identity", opts.Identity)
				c := newController(client, dyn, opts)
				if err := c.run(ctx); err != nil {
					lost <- err
					stop()
				}
			},
			OnStoppedLeading: func() {},
			OnNewLeader: func(identity string) {
				if identity != opts.Identity {
					opts.Log.Info("another controller is the active one; this one waits", "identity", identity)
				}
			},
		},
	})
	if err != nil {
		return err
	}
	for ctx.Err() == nil {
		// It returns when the lease was lost: stand again.
		elector.Run(ctx)
	}
	leading <- struct{}{}
	select {
	case err := <-lost:
		return err
	default:
		return nil
	}
}

func newController(client kubernetes.Interface, dyn dynamic.Interface, opts Options) *Controller {
	c := &Controller{
		opts: opts, log: opts.Log, client: client, dynamic: dyn, wake: make(chan struct{}, 1),
		written: make(map[types.UID]*corev1.Service), said: make(map[types.UID]string),
	}
	typed := informers.NewSharedInformerFactory(client, 0)
	c.services, c.namespaces = typed.Core().V1().Services().Informer(), typed.Core().V1().Namespaces().Informer()
	c.pools = dynamicinformer.NewDynamicSharedInformerFactory(dyn, 0).ForResource(poolResource).Informer()
	return c
}

// settle is how long changes gather before they are looked at.
const settle = 10 * time.Millisecond

// run allocates until the context ends, which is also when the lease is lost.
func (c *Controller) run(ctx context.Context) error {
	broadcaster := record.NewBroadcaster(record.WithContext(ctx))
	defer broadcaster.Shutdown()
	broadcaster.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: c.client.CoreV1().Events("")})
	c.events = broadcaster.NewRecorder(scheme.Scheme, corev1.EventSource{Component: "pentad-controller"})

	changed := cache.ResourceEventHandlerFuncs{
		AddFunc: func(any) { c.notify() }, UpdateFunc: func(_, _ any) { c.notify() }, DeleteFunc: func(any) { c.notify() },
	}
	var synced []cache.InformerSynced
	var informing sync.WaitGroup
	defer informing.Wait()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	for _, i := range []cache.SharedIndexInformer{c.services, c.namespaces, c.pools} {
		if err := i.SetTransform(slim); err != nil {
			return err
		}
		r, err := i.AddEventHandler(changed)
		if err != nil {
			return err
		}
		synced = append(synced, r.HasSynced)
		informing.Go(func() { i.RunWithContext(ctx) })
	}
	informing.Go(func() { c.freeBlocks(ctx) })
	if !cache.WaitForCacheSync(ctx.Done(), synced...) {
		return nil
	}
	c.notify()
	again := time.NewTimer(time.Hour)
	again.Stop()
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-again.C:
			c.notify()
		case <-c.wake:
			if err := c.reconcile(ctx); err != nil && ctx.Err() == nil {
				c.log.Error("not everything could be written; it is tried again", "error", err)
				again.Reset(time.Second)
			}
			select {
			case <-ctx.Done():
			case <-time.After(settle):
			}
		}
	}
}

// slim drops what nobody here reads and is the larger part of many objects.
func slim(o any) (any, error) {
	if m, ok := o.(metav1.Object); ok {
		m.SetManagedFields(nil)
	}
	return o, nil
}

func (c *Controller) notify() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// reconcile decides anew who has which address, and writes what differs.
func (c *Controller) reconcile(ctx context.Context) error {
	all := c.ourServices()
	byOwner := make(map[string]*corev1.Service, len(all))
	claims := make([]ipam.Claim, 0, len(all))
	unreadable := make(map[string]string)
	for _, s := range all {
		claim, problem := claimOf(s)
		claims = append(claims, claim)
		byOwner[claim.Owner] = s
		if problem != "" {
			unreadable[claim.Owner] = problem
		}
	}
	find := func(owner string) (service, namespace labels.Set) {
		s := byOwner[owner]
		if s == nil {
			return nil, nil
		}
		if ns, ok, err := c.namespaces.GetStore().GetByKey(s.Namespace); err == nil && ok {
			namespace = ns.(*corev1.Namespace).Labels
		}
		return s.Labels, namespace
	}
	pools, conditions, err := c.readPools(find)
	if err != nil {
		return err
	}
	var errs []error
	byClaim := make(map[string]ipam.Claim, len(claims))
	for _, claim := range claims {
		byClaim[claim.Owner] = claim
	}
	results := ipam.Allocate(pools, claims)
	for _, r := range results {
		if p, ok := unreadable[r.Owner]; ok {
			r.Reason, r.Message = ipam.Invalid, p
		}
		errs = append(errs, c.write(ctx, byOwner[r.Owner], byClaim[r.Owner], r))
	}
	errs = append(errs, c.clearOthers(ctx))
	errs = append(errs, c.writePools(ctx, pools, conditions, results))
	return errors.Join(errs...)
}

// ourServices returns the Services as this process knows them: what it has written
// counts until the informer has it.
func (c *Controller) ourServices() []*corev1.Service {
	var all []*corev1.Service
	live := make(map[types.UID]bool)
	for _, o := range c.services.GetStore().List() {
		s := o.(*corev1.Service)
		if !c.ours(s) {
			continue
		}
		live[s.UID] = true
		if w := c.written[s.UID]; w != nil {
			if newer(w.ResourceVersion, s.ResourceVersion) {
				s = w
			} else {
				delete(c.written, s.UID)
			}
		}
		all = append(all, s)
	}
	for _, o := range c.pools.GetStore().List() {
		live[o.(metav1.Object).GetUID()] = true
	}
	gone := func(uid types.UID) bool { return !live[uid] }
	maps.DeleteFunc(c.written, func(uid types.UID, _ *corev1.Service) bool { return gone(uid) })
	maps.DeleteFunc(c.said, func(uid types.UID, _ string) bool { return gone(uid) })
	return all
}

// newer compares resource versions, which are numbers that grow (KEP-5504).
func newer(a, b string) bool { return len(a) > len(b) || len(a) == len(b) && a > b }

// write gives a Service the status that it shall have.
func (c *Controller) write(ctx context.Context, s *corev1.Service, claim ipam.Claim, r ipam.Result) error {
	status, differs := desiredStatus(s, claim, r)
	if r.Message != "" {
		c.say(s, s.UID, corev1.EventTypeWarning, string(r.Reason), r.Message)
	}
	if !differs {
		return nil
	}
	next := s.DeepCopy()
	next.Status = status
	// The version of s goes with it: a Service that was changed meanwhile is
	// looked at again first.
	done, err := c.client.CoreV1().Services(s.Namespace).UpdateStatus(ctx, next, metav1.UpdateOptions{})
	if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
		c.notify()
		return nil
	}
	if err != nil {
		return fmt.Errorf("service %s: %w", r.Owner, err)
	}
	c.written[s.UID] = done
	var texts []string
	for _, a := range r.Addresses {
		texts = append(texts, a.String())
	}
	c.log.Info("addresses of a Service", "service", r.Owner, "addresses", strings.Join(texts, " "), "reason", r.Reason)
	if r.Message == "" {
		c.say(s, s.UID, corev1.EventTypeNormal, string(r.Reason), "has "+strings.Join(texts, " and "))
	}
	return nil
}

// clearOthers takes our condition from Services that want no address of us any more.
func (c *Controller) clearOthers(ctx context.Context) error {
	var errs []error
	for _, o := range c.services.GetStore().List() {
		s := o.(*corev1.Service)
		if c.ours(s) || s.DeletionTimestamp != nil || meta.FindStatusCondition(s.Status.Conditions, conditionAllocated) == nil {
			continue
		}
		next := s.DeepCopy()
		meta.RemoveStatusCondition(&next.Status.Conditions, conditionAllocated)
		_, err := c.client.CoreV1().Services(s.Namespace).UpdateStatus(ctx, next, metav1.UpdateOptions{})
		if err != nil && !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("service %s/%s: %w", s.Namespace, s.Name, err))
		}
	}
	return errors.Join(errs...)
}

// say makes an Event, once for as long as it is the same.
func (c *Controller) say(o runtime.Object, uid types.UID, kind, reason, message string) {
	if c.said[uid] == message {
		return
	}
	c.said[uid] = message
	c.events.Event(o, kind, reason, message)
}

// pooled is a pool and what is to be said of it.
type pooled struct {
	object   *unstructured.Unstructured
	pool     *AddressPool
	problems []string
}

func (c *Controller) readPools(find lookup) ([]ipam.Pool, []pooled, error) {
	var pools []ipam.Pool
	var all []pooled
	for _, o := range c.pools.GetStore().List() {
		u, ok := o.(*unstructured.Unstructured)
		if !ok || u.GetDeletionTimestamp() != nil {
			continue
		}
		p, err := readPool(u)
		if err != nil {
			return nil, nil, err
		}
		pool, problems := p.pool(find)
		pools = append(pools, pool)
		all = append(all, pooled{u, p, problems})
	}
	return pools, all, nil
}

// writePools says of each pool how it is used and what is wrong with it.
func (c *Controller) writePools(ctx context.Context, pools []ipam.Pool, all []pooled, results []ipam.Result) error {
	overlaps := ipam.Overlaps(pools)
	var errs []error
	for i, p := range all {
		want := p.pool.condition(p.problems, overlaps)
		if want.Status == metav1.ConditionFalse {
			c.say(p.object, p.object.GetUID(), corev1.EventTypeWarning, want.Reason, want.Message)
		}
		status := AddressPoolStatus{Used: used(pools[i], results), Conditions: p.pool.Status.Conditions}
		have := meta.FindStatusCondition(status.Conditions, conditionReady)
		if status.Used == p.pool.Status.Used && have != nil && have.Status == want.Status && have.Reason == want.Reason &&
			have.Message == want.Message && have.ObservedGeneration == want.ObservedGeneration {
			continue
		}
		meta.SetStatusCondition(&status.Conditions, want)
		errs = append(errs, c.writePool(ctx, p.object, status))
	}
	return errors.Join(errs...)
}

func (c *Controller) writePool(ctx context.Context, u *unstructured.Unstructured, status AddressPoolStatus) error {
	raw, err := runtime.DefaultUnstructuredConverter.ToUnstructured(&status)
	if err != nil {
		return err
	}
	next := u.DeepCopy()
	next.Object["status"] = raw
	_, err = c.dynamic.Resource(poolResource).UpdateStatus(ctx, next, metav1.UpdateOptions{})
	if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
		return nil // the change that came first brings us back here
	}
	if err != nil {
		return fmt.Errorf("AddressPool %s: %w", u.GetName(), err)
	}
	return nil
}

// used counts the addresses of a pool that Services have, each once.
func used(p ipam.Pool, results []ipam.Result) int {
	seen := make(map[string]bool)
	for _, r := range results {
		for _, a := range r.Addresses {
			for _, x := range p.Ranges {
				if x.Contains(a) {
					seen[a.String()] = true
				}
			}
		}
	}
	return len(seen)
}
