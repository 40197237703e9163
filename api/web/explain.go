package web

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"

	"github.com/pentad/pentad/flow"
	"github.com/pentad/pentad/plane/socket"
	"github.com/pentad/pentad/view"
)

// query is what is to be explained.
type query struct {
	to   string
	from netip.Addr // not valid: a socket of this host connects
	pid  int        // 0: any process
}

func readQuery(v url.Values) (q query, err error) {
	if q.to = v.Get("to"); q.to == "" {
		return q, errors.New("to where? Want ADDRESS:PORT, or the name of a service")
	}
	if text := v.Get("from"); text != "" {
		if q.from, err = netip.ParseAddr(text); err != nil {
			return q, fmt.Errorf("from: %q is no address; want one such as 198.51.100.7", text)
		}
		q.from = q.from.Unmap()
	}
	if text := v.Get("pid"); text != "" {
		n, err := strconv.ParseInt(text, 10, 32)
		if err != nil || n < 1 {
			return q, errors.New("process: the id of a process is a whole number from 1")
		}
		q.pid = int(n)
	}
	if q.from.IsValid() && q.pid != 0 {
		return q, errors.New("a process is for connections of this host and from for packets from elsewhere: one of them")
	}
	return q, nil
}

// maxExplained bounds how many listeners of one address, or of one service, are explained.
const maxExplained = 20

func (p *Page) serveExplain(w http.ResponseWriter, r *http.Request) {
	done, err := p.alone(r.Context())
	if err != nil {
		return
	}
	defer done()
	q, err := readQuery(r.URL.Query())
	if err != nil {
		answer(w, nil, err)
		return
	}
	all, err := p.explain(r.Context(), q)
	if errors.Is(err, socket.ErrNothingInstalled) {
		err = errors.New("nothing is installed in the kernel: no VIP is translated")
	}
	answer(w, all, err)
}

func (p *Page) explain(ctx context.Context, q query) ([]*flow.Explanation, error) {
	e, err := view.NewExplainer(ctx, p.opts.At, q.from)
	if err != nil {
		return nil, err
	}
	questions, err := e.Questions(q.to)
	if err != nil {
		return nil, err
	}
	var all []*flow.Explanation
	for _, one := range questions[:min(len(questions), maxExplained)] {
		one.PID = q.pid
		x, err := e.Explain(one)
		if errors.Is(err, flow.ErrNoProcess) {
			return nil, fmt.Errorf("there is no process %d", q.pid)
		} else if err != nil {
			return nil, err
		}
		all = append(all, x)
	}
	return all, nil
}
