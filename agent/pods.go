package agent

import (
	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/plane/pod"
)

func hasPods(c *config.Config) bool { return c.Pods.Wanted() }

func wantPods(k *known) (pod.Want, bool) { return pod.Want{Config: k.config.Pods}, true }

func openPods(a *Agent, _ func()) *pod.Plane { return pod.New(a.opts.RunDir, a.log) }

func removePods(opts Options) error { return pod.Remove(opts.RunDir) }
