package controller

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"

	"github.com/pentad/pentad/claim"
	"github.com/pentad/pentad/claim/kube"
)

// DefaultQuarantine is how long a Node has been gone before its blocks of addresses are
// free: whoever is cut off from the API server uses them for that long at least.
const DefaultQuarantine = 10 * time.Minute

// How often is looked for Nodes that are gone.
const (
	lookLeast = 100 * time.Millisecond
	lookMost  = 10 * time.Second
)

// freer frees the blocks of addresses of Nodes that are gone. It gives none to anybody:
// nodes claim them.
type freer struct {
	*Controller
	blocks, nodes cache.SharedIndexInformer
	gone          map[claim.Owner]time.Time // since when there has been no such Node
}

// freeBlocks frees blocks until the context ends. A cluster whose pod network is somebody
// else's need not know what blocks are: then it waits.
func (c *Controller) freeBlocks(ctx context.Context) {
	f := &freer{
		Controller: c, gone: make(map[claim.Owner]time.Time),
		blocks: dynamicinformer.NewDynamicSharedInformerFactory(c.dynamic, 0).ForResource(kube.Resource).Informer(),
		nodes:  informers.NewSharedInformerFactory(c.client, 0).Core().V1().Nodes().Informer(),
	}
	if err := f.blocks.SetWatchErrorHandlerWithContext(func(_ context.Context, _ *cache.Reflector, err error) {
		if !apierrors.IsNotFound(err) {
			c.log.Warn("blocks of addresses cannot be watched", "error", err)
		}
	}); err != nil {
		c.log.Error("blocks of addresses of nodes that are gone are not freed", "error", err)
		return
	}
	var informing sync.WaitGroup
	defer informing.Wait()
	for _, i := range []cache.SharedIndexInformer{f.blocks, f.nodes} {
		informing.Go(func() { i.RunWithContext(ctx) })
	}
	if !cache.WaitForCacheSync(ctx.Done(), f.blocks.HasSynced, f.nodes.HasSynced) {
		return
	}
	look := time.NewTicker(max(lookLeast, min(c.opts.Quarantine/10, lookMost)))
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-look.C:
			if err := f.look(ctx, time.Now()); err != nil && ctx.Err() == nil {
				c.log.Error("a block of addresses could not be freed; it is tried again", "error", err)
			}
		}
	}
}

// look frees the blocks whose nodes have been gone for long enough.
func (f *freer) look(ctx context.Context, now time.Time) error {
	was := f.gone
	f.gone = make(map[claim.Owner]time.Time)
	var errs []error
	for _, o := range f.blocks.GetStore().List() {
		u, ok := o.(*unstructured.Unstructured)
		if !ok {
			continue
		}
		b, err := kube.BlockOf(u)
		if err != nil || f.exists(b.Owner) {
			continue
		}
		since, known := was[b.Owner]
		if !known {
			since = now
		}
		f.gone[b.Owner] = since
		if now.Sub(since) >= f.opts.Quarantine && f.isGone(ctx, b.Owner) {
			errs = append(errs, f.free(ctx, u, b))
		}
	}
	return errors.Join(errs...)
}

// exists reports whether there is a Node of the name, on that machine where both say which
// it is.
func (f *freer) exists(o claim.Owner) bool {
	x, ok, err := f.nodes.GetStore().GetByKey(o.Name)
	if err != nil || !ok {
		return err != nil
	}
	return isOf(x.(*corev1.Node), o)
}

func isOf(n *corev1.Node, o claim.Owner) bool {
	id := n.Status.NodeInfo.MachineID
	return id == "" || o.Machine == "" || claim.HashMachineID(id) == o.Machine
}

// isGone asks once more, and not the memory of this process.
func (f *freer) isGone(ctx context.Context, o claim.Owner) bool {
	n, err := f.client.CoreV1().Nodes().Get(ctx, o.Name, metav1.GetOptions{})
	return apierrors.IsNotFound(err) || err == nil && !isOf(n, o)
}

func (f *freer) free(ctx context.Context, u *unstructured.Unstructured, b claim.Block) error {
	uid, version := u.GetUID(), u.GetResourceVersion()
	err := f.dynamic.Resource(kube.Resource).Delete(ctx, u.GetName(), metav1.DeleteOptions{
		Preconditions: &metav1.Preconditions{UID: &uid, ResourceVersion: &version},
	})
	if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
		return nil // somebody has written it: it is looked at again
	}
	if err != nil {
		return fmt.Errorf("AddressBlock %s: %w", u.GetName(), err)
	}
	f.log.Warn("a block of addresses is free: its Node is gone", "block", b.Name(), "node", b.Owner.Name, "quarantine", f.opts.Quarantine)
	return nil
}
