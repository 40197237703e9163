// pentad-cni is the CNI plugin of pentad. It is a program of its own because it is started
// for each pod: it has little to load.
package main

import (
	"github.com/containernetworking/cni/pkg/skel"

	"github.com/pentad/pentad/cni"
)

func main() { skel.PluginMainFuncs(cni.Funcs, cni.Versions, "pentad-cni: the pod network of pentad") }
