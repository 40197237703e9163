package lab

import "errors"

// Site is several hosts, a switch between those that have addresses, and pods behind
// them, which all end together.
type Site struct {
	fabric  *Switch
	closers []func() error
}

// NewSite makes a site without hosts.
func NewSite() (*Site, error) {
	fabric, err := NewSwitch()
	if err != nil {
		return nil, err
	}
	return &Site{fabric: fabric, closers: []func() error{fabric.Close}}, nil
}

// Host adds a host, with a cable to the switch if it has addresses, such as
// "10.0.0.1/24".
func (s *Site) Host(addresses ...string) (*Host, error) {
	h, err := NewHost()
	if err != nil {
		return nil, err
	}
	s.OnClose(h.Close)
	if len(addresses) == 0 {
		return h, nil
	}
	_, err = s.fabric.Plug(h, addresses...)
	return h, err
}

// The gateways of pods, which no machine owns but their node.
const (
	gateway4 = "169.254.1.1"
	gateway6 = "fe80::1"
)

// Pod adds a host with one address of each family behind a node, which has a route to
// each; v6 may be empty.
func (s *Site) Pod(node *Host, v4, v6 string) (*Host, error) {
	pod, err := s.Host()
	if err != nil {
		return nil, err
	}
	own, gateways := []string{v4 + "/32"}, []string{gateway4 + "/32"}
	if v6 != "" {
		own, gateways = append(own, v6+"/128"), append(gateways, gateway6+"/64")
	}
	_, at, err := Wire(pod, own, node, gateways)
	if err != nil {
		return nil, err
	}
	err = errors.Join(pod.RouteDevice(gateway4+"/32", "*"), pod.Route("0.0.0.0/0", gateway4), node.RouteDevice(v4+"/32", at))
	if v6 != "" {
		err = errors.Join(err, pod.RouteBy("::/0", gateway6, "*"), node.RouteDevice(v6+"/128", at))
	}
	return pod, err
}

// OnClose adds something to be done when the site is closed. What was added last is
// done first.
func (s *Site) OnClose(f func() error) { s.closers = append(s.closers, f) }

// Close removes everything.
func (s *Site) Close() error {
	var errs []error
	for i := len(s.closers) - 1; i >= 0; i-- {
		errs = append(errs, s.closers[i]())
	}
	s.closers = nil
	return errors.Join(errs...)
}
