package main

import (
	"time"

	"github.com/spf13/cobra"

	"github.com/pentad/pentad/controller"
	"github.com/pentad/pentad/source/kube"
)

func newController() *cobra.Command {
	var kubeconfig string
	var log logFlags
	lease, quarantine := durationValue(controller.DefaultLease), durationValue(controller.DefaultQuarantine)
	var opts controller.Options
	cmd := &cobra.Command{
		Use:   "controller",
		Short: "Run the controller of a cluster",
		Long: "Run the controller of a Kubernetes cluster: it gives Services of type LoadBalancer their addresses out of\n" +
			"AddressPools, and frees blocks of addresses whose nodes are gone. Several may run; one of them is active, by a\n" +
			"Lease, and another takes over when it is gone.\n" +
			"Which address a Service has stands in its status and changes only when the Service asks for another.",
		Example: "  pentad controller --kubeconfig /etc/kubernetes/admin.conf",
		Args:    wants(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			opts.Log, opts.LeaseDuration, opts.Quarantine = log.logger(), time.Duration(lease), time.Duration(quarantine)
			config, err := kube.Connect(kubeconfig)
			if err != nil {
				return err
			}
			return controller.Run(cmd.Context(), config, opts)
		},
	}
	cmd.Flags().StringVar(&kubeconfig, "kubeconfig", "", "how to reach the API server; empty: the service account of this pod")
	cmd.Flags().StringVar(&opts.Namespace, "namespace", "kube-system", "namespace of the Lease by which one controller is active")
	cmd.Flags().BoolVar(&opts.RequireClass, "require-class", false,
		"leave Services without a loadBalancerClass to others; ours is "+controller.LoadBalancerClass)
	cmd.Flags().Var(&lease, "lease", "how long a controller that is silent stays the active one")
	cmd.Flags().Var(&quarantine, "quarantine", "how long a Node has been gone before its blocks of addresses are free")
	log.add(cmd)
	return cmd
}
