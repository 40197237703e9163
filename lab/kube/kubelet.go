package kube

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/pentad/pentad/lab"
)

// RealNode is a host with a kubelet and containerd: pods that are scheduled there
// run, behind Debian's CNI plugin bridge. Both programs and the pods are in the cgroup
// lab.Inside of the host, and see a /run of their own, so that nothing of them is left
// once the host is closed.
type RealNode struct {
	Name    string
	Host    *lab.Host
	process *lab.Process
}

const containerdConfig = `version = 2
root = "%[1]s/containerd"
state = "/run/containerd"
[grpc]
address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "%[2]s"
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "native"
default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "%[1]s/cni"
`

const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: false}, webhook: {enabled: false}, x509: {clientCAFile: %[2]s/ca.crt}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
cgroupsPerQOS: false
enforceNodeAllocatable: []
failCgroupV1: false
failSwapOn: false
localStorageCapacityIsolation: false
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
evictionHard: {memory.available: "0%%", nodefs.available: "0%%", imagefs.available: "0%%", nodefs.inodesFree: "0%%"}
imageGCHighThresholdPercent: 100
makeIPTablesUtilChains: false
nodeStatusUpdateFrequency: 2s
syncFrequency: 10s
resolvConf: %[1]s/resolv.conf
`

const cniConfig = `{"cniVersion": "0.4.0", "name": "lab", "plugins": [{
  "type": "bridge", "bridge": "pods0", "isGateway": true, "hairpinMode": true,
  "ipam": {"type": "host-local", "dataDir": "/run/cni", "ranges": [[{"subnet": "%s"}]], "routes": [{"dst": "0.0.0.0/0"}]}
}]}
`

// startNode runs in a mount namespace of its own.
const startNode = `set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /var/log
mount -t tmpfs tmpfs /var/lib
mkdir -p /run/containerd /run/netns
# What a kubelet would set for the whole machine (setupKernelTunables): it is shown
# files instead.
for key in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops kernel/keys/root_maxkeys kernel/keys/root_maxbytes; do
	file=/run/sysctl-$(echo "$key" | tr / -)
	cat "/proc/sys/$key" >"$file"
	mount --bind "$file" "/proc/sys/$key"
done
mount --make-rshared /
containerd --config "$1/containerd.toml" &
until ctr --address /run/containerd/containerd.sock version >/dev/null 2>&1; do sleep 0.1; done
for image in "$1"/images/*.tar; do ctr --address /run/containerd/containerd.sock -n k8s.io image import "$image"; done
exec "$2" --config="$1/kubelet.yaml" --kubeconfig="$3" --hostname-override="$4" --node-ip="$5" --root-dir=/var/lib/kubelet --v=1
`

// StartNode starts a kubelet on a host. Images are files that WriteImage made, by
// name; the one named sandbox holds the network of pods.
func (c *Cluster) StartNode(name string, h *lab.Host, address, podCIDR, sandbox string, images map[string]string) (*RealNode, error) {
	n := &RealNode{Name: name, Host: h}
	kubeconfig, err := c.Kubeconfig("kubelet-"+name, "system:node:"+name, "system:nodes")
	if err != nil {
		return nil, err
	}
	for _, dir := range []string{"cni", "images"} {
		if err := os.Mkdir(filepath.Join(h.Dir, dir), 0o755); err != nil {
			return nil, err
		}
	}
	for file, text := range map[string]string{
		"containerd.toml": fmt.Sprintf(containerdConfig, h.Dir, sandbox), "kubelet.yaml": fmt.Sprintf(kubeletConfig, h.Dir, c.Host.Dir),
		"cni/lab.conflist": fmt.Sprintf(cniConfig, podCIDR), "resolv.conf": "",
	} {
		if err := os.WriteFile(filepath.Join(h.Dir, file), []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	i := 0
	for image, program := range images {
		i++
		if err := WriteImage(filepath.Join(h.Dir, "images", fmt.Sprintf("%d.tar", i)), image, program); err != nil {
			return nil, err
		}
	}
	n.process, err = h.Start(exec.Command("unshare", "--mount", "sh", "-c", startNode, "node", h.Dir,
		filepath.Join(c.bin, string(Kubelet)), kubeconfig, name, address), lab.Inside)
	return n, err
}

// Log is what kubelet and containerd have printed.
func (n *RealNode) Log() string { return n.process.Log.String() }

// Ready waits until the node takes pods.
func (n *RealNode) Ready(ctx context.Context, c *Cluster) error {
	err := lab.Eventually(ready, func() error {
		node, err := c.Client.CoreV1().Nodes().Get(ctx, n.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, cond := range node.Status.Conditions {
			if cond.Type == corev1.NodeReady && cond.Status == corev1.ConditionTrue {
				return nil
			}
		}
		return fmt.Errorf("conditions are %v", node.Status.Conditions)
	})
	if err != nil {
		return fmt.Errorf("node %s: %w\n%s", n.Name, err, lab.Indent(tail(n.Log())))
	}
	return nil
}

// Close removes the control groups of pods that have ended with the host.
func (n *RealNode) Close() error {
	var errs []error
	ids, err := filepath.Glob("/sys/fs/cgroup/*/*")
	if err != nil {
		return err
	}
	for _, dir := range ids {
		// The identity of a container: nobody else names a control group so.
		if name := filepath.Base(dir); len(name) == 64 && strings.Trim(name, "0123456789abcdef") == "" {
			errs = append(errs, os.Remove(dir))
		}
	}
	return errors.Join(errs...)
}

// StartScheduler starts the scheduler.
func (c *Cluster) StartScheduler() error {
	kubeconfig, err := c.Kubeconfig("scheduler", "system:kube-scheduler")
	if err != nil {
		return err
	}
	_, err = c.Host.Start(exec.Command(filepath.Join(c.bin, string(Scheduler)), "--kubeconfig="+kubeconfig, "--leader-elect=false"), lab.Outside)
	return err
}
