package controller

import (
	"bytes"
	"context"
	"log/slog"
	"runtime"
	"testing"
	"time"

	"go.uber.org/goleak"
	apiruntime "k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/pentad/pentad/claim/kube"
)

// When run returns nothing of it is left: another one may begin.
func TestRunLeavesNothing(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	dyn := dynamicfake.NewSimpleDynamicClientWithCustomListKinds(apiruntime.NewScheme(),
		map[schema.GroupVersionResource]string{poolResource: "AddressPoolList", kube.Resource: "AddressBlockList"})
	for _, lead := range []time.Duration{0, 200 * time.Millisecond} {
		ctx, stop := context.WithTimeout(t.Context(), lead)
		c := newController(fake.NewClientset(), dyn, Options{Log: slog.New(slog.DiscardHandler)})
		if err := c.run(ctx); err != nil {
			t.Error(err)
		}
		stop()
		// goleak waits for goroutines to end; whoever begins again does not.
		stacks := make([]byte, 1<<20)
		if stacks = stacks[:runtime.Stack(stacks, true)]; bytes.Contains(stacks, []byte("informer).RunWithContext")) || bytes.Contains(stacks, []byte("Informer).RunWithContext")) {
			t.Errorf("an informer still runs:\n%s", stacks)
		}
	}
}
