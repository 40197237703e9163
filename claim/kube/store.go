// Package kube keeps blocks in a Kubernetes cluster: one AddressBlock each.
package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"

	"github.com/pentad/pentad/claim"
)

// Resource is the custom resource AddressBlock; deploy/kubernetes/base/addressblocks.yaml is its
// schema.
var Resource = schema.GroupVersionResource{Group: "pentad.io", Version: "v1alpha1", Resource: "addressblocks"}

// kind of the objects.
const kind = "AddressBlock"

// Store is the blocks of a cluster.
type Store struct {
	objects dynamic.ResourceInterface
	nodes   dynamic.ResourceInterface
}

// New returns the store of a cluster.
func New(config *rest.Config) (*Store, error) {
	// Custom resources have no protobuf.
	asJSON := rest.CopyConfig(config)
	asJSON.ContentType = runtime.ContentTypeJSON
	client, err := dynamic.NewForConfig(asJSON)
	if err != nil {
		return nil, err
	}
	return &Store{client.Resource(Resource), client.Resource(corev1.SchemeGroupVersion.WithResource("nodes"))}, nil
}

func objectOf(b claim.Block) (*unstructured.Unstructured, error) {
	// By way of JSON, as the API server reads it.
	text, err := json.Marshal(map[string]any{
		"apiVersion": Resource.GroupVersion().String(), "kind": kind,
		"metadata": map[string]any{"name": claim.Key(b.Name())}, "spec": claim.RecordOf(b),
	})
	if err != nil {
		return nil, err
	}
	o := &unstructured.Unstructured{}
	if err := o.UnmarshalJSON(text); err != nil {
		return nil, err
	}
	if b.ID != "" {
		o.SetUID(types.UID(b.ID))
		o.SetResourceVersion(b.Revision)
	}
	return o, nil
}

// BlockOf reads an AddressBlock.
func BlockOf(o *unstructured.Unstructured) (claim.Block, error) {
	spec, err := json.Marshal(o.Object["spec"])
	if err != nil {
		return claim.Block{}, err
	}
	b, err := claim.Decode(o.GetName(), spec)
	b.ID, b.Revision = string(o.GetUID()), o.GetResourceVersion()
	return b, err
}

// Create implements claim.Store: the API server makes one object of a name.
func (s *Store) Create(ctx context.Context, b claim.Block) error {
	b.ID = ""
	o, err := objectOf(b)
	if err != nil {
		return err
	}
	_, err = s.objects.Create(ctx, o, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		return claim.ErrTaken
	}
	return err
}

// Update implements claim.Store. The API server compares the version of the object.
func (s *Store) Update(ctx context.Context, b claim.Block) error {
	o, err := objectOf(b)
	if err != nil {
		return err
	}
	_, err = s.objects.Update(ctx, o, metav1.UpdateOptions{})
	return changed(err)
}

// Delete implements claim.Store.
func (s *Store) Delete(ctx context.Context, b claim.Block) error {
	uid := types.UID(b.ID)
	return changed(s.objects.Delete(ctx, claim.Key(b.Name()), metav1.DeleteOptions{
		Preconditions: &metav1.Preconditions{UID: &uid, ResourceVersion: &b.Revision},
	}))
}

func changed(err error) error {
	if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
		return fmt.Errorf("%w: %w", claim.ErrChanged, err)
	}
	return err
}

// readPatience bounds one reading of all.
const readPatience = 30 * time.Second

// errEnded says that a watch is over, as each is after a while.
var errEnded = errors.New("the API server has ended the watch")

// Follow implements claim.Store. It lists without a resource version, which the API server
// answers from what a majority has; from its memory it could tell the past.
func (s *Store) Follow(ctx context.Context, emit func(claim.Table)) error {
	read, done := context.WithTimeout(ctx, readPatience)
	defer done()
	list, err := s.objects.List(read, metav1.ListOptions{})
	if err != nil {
		return err
	}
	objects := make(map[string]*unstructured.Unstructured, len(list.Items))
	for i := range list.Items {
		objects[list.Items[i].GetName()] = &list.Items[i]
	}
	emit(tableOf(objects, true))
	version := list.GetResourceVersion()
	for {
		if version, err = s.watch(ctx, version, objects, emit); err != nil {
			return err
		}
	}
}

// watch follows changes from a version on, and returns the last one when the watch is over.
func (s *Store) watch(ctx context.Context, version string, objects map[string]*unstructured.Unstructured, emit func(claim.Table)) (string, error) {
	began := time.Now()
	w, err := s.objects.Watch(ctx, metav1.ListOptions{ResourceVersion: version, AllowWatchBookmarks: true})
	if err != nil {
		return version, err
	}
	defer w.Stop()
	for e := range w.ResultChan() {
		o, ok := e.Object.(*unstructured.Unstructured)
		if e.Type == watch.Error || !ok {
			return version, apierrors.FromObject(e.Object)
		}
		version = o.GetResourceVersion()
		switch e.Type {
		case watch.Added, watch.Modified:
			objects[o.GetName()] = o
		case watch.Deleted:
			delete(objects, o.GetName())
		default:
			continue // a bookmark
		}
		emit(tableOf(objects, false))
	}
	if ctx.Err() != nil {
		return version, ctx.Err()
	}
	// One that ends at once has lost its server.
	if time.Since(began) < time.Second {
		return version, errEnded
	}
	return version, nil
}

func tableOf(objects map[string]*unstructured.Unstructured, fresh bool) claim.Table {
	t := claim.NewTable(fresh)
	for _, name := range slices.Sorted(maps.Keys(objects)) {
		b, err := BlockOf(objects[name])
		t.Add(name, b, err)
	}
	return t
}

// Node is what a cluster says of a node.
type Node struct {
	Addresses []netip.Addr   // its own, one of a family
	PodCIDRs  []netip.Prefix // that the cluster gives to its pods
	MachineID string         // machine-id(5) of the host; empty: its kubelet does not say
}

// Node asks for a Node.
func (s *Store) Node(ctx context.Context, name string) (n Node, err error) {
	o, err := s.nodes.Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return n, err
	}
	var node corev1.Node
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &node); err != nil {
		return n, err
	}
	n.MachineID = node.Status.NodeInfo.MachineID
	for _, a := range node.Status.Addresses {
		x, err := netip.ParseAddr(a.Address)
		if a.Type == corev1.NodeInternalIP && err == nil && !slices.ContainsFunc(n.Addresses, func(o netip.Addr) bool { return o.Is4() == x.Is4() }) {
			n.Addresses = append(n.Addresses, x)
		}
	}
	for _, text := range node.Spec.PodCIDRs {
		if p, err := netip.ParsePrefix(text); err == nil {
			n.PodCIDRs = append(n.PodCIDRs, p.Masked())
		}
	}
	return n, nil
}
