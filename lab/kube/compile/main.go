// Command compile compiles what the tests of a cluster run of Kubernetes and Helm,
// unless it is there, and says how far it is: go test shows nothing until a package is
// done.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/pentad/pentad/lab/kube"
)

func main() {
	ctx := context.Background()
	_, err := kube.Build(ctx, kube.APIServer, kube.ControllerManager, kube.Scheduler, kube.Kubelet, kube.Proxy)
	if err == nil {
		_, err = kube.Helm(ctx)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
