package migrate

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// readIPVS reads what `ipvsadm-save -n` writes (ipvsadm(8)): a line of options each.
func readIPVS(text []byte) *Result {
	r := &Result{}
	var lines []*statement
	services := make(map[string]*Service)
	used := make(map[string]bool)
	n := 0
	for line := range strings.Lines(string(text)) {
		n++
		words := strings.Fields(cutComment(line))
		if len(words) == 0 {
			continue
		}
		s := &statement{line: n, words: words}
		lines = append(lines, s)
		switch o := ipvsOptions(words); {
		case words[0] == "-A" || words[0] == "--add-service":
			if x := ipvsService(s, o); x != nil {
				x.Name = name("vs-"+o["address"]+map[bool]string{true: "-udp"}[o["udp"] != ""], used)
				services[o["udp"]+o["address"]] = x
				r.Services = append(r.Services, x)
			}
		case words[0] == "-a" || words[0] == "--add-server":
			x := services[o["udp"]+o["address"]]
			if x == nil {
				s.leave("its service was not translated")
				continue
			}
			ipvsServer(s, o, x)
		default:
			s.leave("want -A or -a")
		}
	}
	r.Notes = notes(lines)
	for _, s := range r.Services {
		if s.Forward == "direct" {
			r.Notes = append(r.Notes, Note{1, s.Name, "packets that arrive go on to the real servers: director.interfaces names where they arrive, and real servers have the address (realServer)"})
			break
		}
	}
	return r
}

// ipvsOptions returns options by what they are about.
func ipvsOptions(words []string) map[string]string {
	o := make(map[string]string)
	names := map[string]string{
		"-t": "address", "--tcp-service": "address", "-u": "address", "--udp-service": "address", "-f": "mark", "--fwmark-service": "mark",
		"-s": "scheduler", "--scheduler": "scheduler", "-p": "persistent", "--persistent": "persistent", "-r": "server", "--real-server": "server",
		"-w": "weight", "--weight": "weight", "-x": "threshold", "--u-threshold": "threshold", "-y": "lower", "--l-threshold": "lower", "-M": "netmask",
		"--sched-flags": "flags", "-b": "flags", "--pe": "pe",
	}
	for i := 1; i < len(words); i++ {
		switch w := words[i]; w {
		case "-g", "--gatewaying", "-m", "--masquerading", "-i", "--ipip":
			o["method"] = strings.TrimLeft(w, "-")[:1]
		case "-o", "--ops", "-6":
			o[w] = "yes"
		default:
			key, ok := names[w]
			if !ok {
				o["unknown"] = w
				continue
			}
			value := ""
			if i+1 < len(words) && !strings.HasPrefix(words[i+1], "-") {
				i++
				value = words[i]
			}
			if o[key] = value; w == "-u" || w == "--udp-service" {
				o["udp"] = "yes"
			}
		}
	}
	return o
}

// ipvsService reads `-A -t ADDRESS:PORT -s SCHEDULER [-p SECONDS]`.
func ipvsService(s *statement, o map[string]string) *Service {
	if _, ok := o["mark"]; ok {
		s.leave("a service is an address and a port, and not a mark")
		return nil
	}
	a, err := netip.ParseAddrPort(o["address"])
	if err != nil || a.Port() == 0 {
		s.leave("%s is not an address with a port; save with ipvsadm-save -n", o["address"])
		return nil
	}
	s.take()
	out := &Service{Forward: "nat"}
	out.listen(s, listener(a, o["udp"] != ""))
	out.Balance = ipvsBalance(o["scheduler"], func(why string) { s.leave("%s", why) })
	if p, ok := o["persistent"]; ok {
		seconds, err := strconv.Atoi(p)
		if p == "" {
			seconds, err = 300, nil
		}
		if err != nil || seconds < 1 || seconds > 86400 {
			s.leave("affinity.timeout is 1s to 24h")
		} else {
			out.Affinity = &Affinity{span(time.Duration(seconds) * time.Second)}
		}
	}
	for _, key := range []string{"unknown", "netmask", "flags", "pe", "-o"} {
		if v, ok := o[key]; ok {
			s.leave("the option for %s %s is left out", key, v)
		}
	}
	return out
}

// ipvsServer reads `-a -t ADDRESS:PORT -r ADDRESS:PORT -g|-m|-i [-w WEIGHT]`.
func ipvsServer(s *statement, o map[string]string, out *Service) {
	a, err := netip.ParseAddrPort(o["server"])
	if err != nil {
		s.leave("%s is not an address with a port; save with ipvsadm-save -n", o["server"])
		return
	}
	s.take()
	b := Backend{Address: a.String()}
	switch o["method"] {
	case "g", "":
		out.Forward = "direct"
		b.Address = a.Addr().String()
		if out.Balance != "source-hash" {
			out.Balance = "" // directors choose by the packet alone
		}
	case "i":
		s.leave("tunnels to real servers are not built; packets are translated")
	}
	if slices.ContainsFunc(out.Backends, func(x Backend) bool {
		return (strings.Count(x.Address, ":") > 0) != (strings.Count(b.Address, ":") > 0)
	}) && !a.Addr().Is6() {
		s.leave("servers of one service are all reached directly, or all translated")
		return
	}
	w, err := strconv.Atoi(o["weight"])
	if o["weight"] == "" {
		w, err = 1, nil
	}
	if err != nil || w < 0 || w > 65535 {
		s.leave("%s is no weight", o["weight"])
		return
	}
	b.Weight = &w
	if o["threshold"] != "" && o["threshold"] != "0" {
		s.leave("breaker.maxConnections, for all backends of a service")
	}
	out.Backends = append(out.Backends, b)
}
