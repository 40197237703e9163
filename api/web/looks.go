package web

import (
	"context"
	"encoding/json"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/service"
	"github.com/pentad/pentad/view"
)

// look is one look at the host, made once for all browsers. It does not change.
type look struct {
	number uint64
	at     time.Time
	host   *view.Host // nil: nothing is installed, or no service is looked at
	tally  view.Tally
	head   json.RawMessage
	rows   map[string]json.RawMessage // by service
	change []byte                     // what a browser is sent that has the look before
	whole  func() []byte              // what one is sent that has none
}

// head is what is at the top of the page.
type head struct {
	Host  string    `json:"host"`
	Time  time.Time `json:"time"`
	Every float64   `json:"everySeconds"`    // how long it is to the next look
	Error string    `json:"error,omitempty"` // why nothing could be read

	Healthy     bool              `json:"healthy"`
	Problems    []string          `json:"problems"`
	Warnings    []string          `json:"warnings"`
	Agent       *api.Status       `json:"agent"`
	Services    int               `json:"services"`
	Listeners   int               `json:"listeners"`
	Refusing    int               `json:"refusing"`
	Backends    map[string]int    `json:"backends"`
	Connections *view.Connections `json:"connections,omitempty"`
	Hooks       map[string]bool   `json:"hooks"`
}

// message is what a browser is sent.
type message struct {
	Whole bool              `json:"whole"` // there are no other rows
	Head  json.RawMessage   `json:"head"`
	Rows  []json.RawMessage `json:"rows"` // those that are new, or others than before
	Gone  []string          `json:"gone"`
}

// maxSentences is how many problems, and how many warnings, are sent.
const maxSentences = 50

// look looks once more.
func (p *Page) look(ctx context.Context, before *look) *look {
	l := &look{number: 1, at: time.Now(), rows: make(map[string]json.RawMessage)}
	if before != nil {
		l.number = before.number + 1
	}
	h := head{Host: p.name, Time: l.at.UTC(), Problems: []string{}, Warnings: []string{}}
	kernel, err := view.ReadKernel(p.opts.At)
	status, statusErr := view.StatusOf(ctx, p.opts.At, kernel, err)
	if statusErr != nil {
		h.Error = statusErr.Error()
	} else {
		h.fill(status)
	}
	if err == nil {
		if p.details.Load() > 0 {
			l.host = kernel
		}
		l.tally = kernel.Tally()
		var last view.Tally
		var elapsed time.Duration
		if before != nil {
			last, elapsed = before.tally, l.at.Sub(before.at)
		}
		for _, r := range view.Overview(last, kernel, elapsed) {
			// Rows are plain values: they can be written as JSON.
			l.rows[r.Service], _ = json.Marshal(r)
		}
	}
	h.Every = pauseAfter(time.Since(l.at)).Seconds()
	l.head, _ = json.Marshal(h) // plain values, too
	l.change = l.since(before)
	l.whole = sync.OnceValue(func() []byte { return l.since(nil) })
	return l
}

func (h *head) fill(s *view.Status) {
	first := func(all []string) []string { return all[:min(len(all), maxSentences)] }
	h.Healthy, h.Problems, h.Warnings, h.Agent = s.Healthy, first(s.Problems), first(s.Warnings), s.Agent
	h.Services, h.Listeners, h.Refusing, h.Backends, h.Connections = s.Services, s.Listeners, len(s.Refusing), s.Backends, &s.Connections
	if s.Kernel != nil {
		h.Hooks = s.Kernel.Hooks
	}
}

// since writes what a browser needs that has another look, or none.
func (l *look) since(before *look) []byte {
	m := message{Whole: before == nil, Head: l.head, Rows: []json.RawMessage{}, Gone: []string{}}
	for name, row := range l.rows {
		if before == nil || string(before.rows[name]) != string(row) {
			m.Rows = append(m.Rows, row)
		}
	}
	if before != nil {
		for name := range before.rows {
			if _, is := l.rows[name]; !is {
				m.Gone = append(m.Gone, name)
			}
		}
	}
	data, _ := json.Marshal(m) // parts that were JSON already
	return data
}

// pauseAfter is how long it is to the next look, after one that took so long: looks take
// a tenth of one processor, but for those that take very long.
func pauseAfter(took time.Duration) time.Duration {
	return min(max(time.Second, 9*took), max(15*time.Second, took))
}

// looks has one look made after the other while anybody waits for them.
type looks struct {
	make func(ctx context.Context, before *look) *look
	wake chan struct{}

	mu      sync.Mutex
	waiting int
	newest  *look
	changed chan struct{} // closed when there is a newer one
}

func newLooks(make_ func(context.Context, *look) *look) *looks {
	return &looks{make: make_, wake: make(chan struct{}, 1), changed: make(chan struct{})}
}

// join says that somebody waits from now on; the caller calls leave.
func (l *looks) join() (leave func()) {
	l.mu.Lock()
	l.waiting++
	l.mu.Unlock()
	select {
	case l.wake <- struct{}{}:
	default:
	}
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.waiting--; l.waiting == 0 {
			l.newest = nil // it may be large, and is stale when somebody comes again
		}
	}
}

// after waits for a look that is newer.
func (l *looks) after(ctx context.Context, number uint64) (*look, error) {
	for {
		l.mu.Lock()
		newest, changed := l.newest, l.changed
		l.mu.Unlock()
		if newest != nil && newest.number > number {
			return newest, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (l *looks) run(ctx context.Context) {
	var last *look
	for ctx.Err() == nil {
		l.mu.Lock()
		wanted := l.waiting > 0
		l.mu.Unlock()
		if !wanted {
			// Numbers go on: who comes back to an old look is sent a whole one.
			if last != nil {
				last = &look{number: last.number, at: last.at}
			}
			select {
			case <-l.wake:
			case <-ctx.Done():
			}
			continue
		}
		began := time.Now()
		last = l.make(ctx, last)
		l.publish(last)
		select {
		case <-time.After(pauseAfter(time.Since(began))):
		case <-ctx.Done():
		}
	}
}

func (l *looks) publish(newest *look) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.waiting > 0 {
		l.newest = newest
	}
	close(l.changed)
	l.changed = make(chan struct{})
}

// maxShown is how many backends of a service are shown, those first that are out.
const maxShown = 200

// detail is what is shown of the service whose page is open.
type detail struct {
	Name    string           `json:"name"`
	Error   string           `json:"error,omitempty"` // why it is not known
	Service *view.Service    `json:"service"`         // null: there is none of that name
	More    int              `json:"more"`            // backends that are not shown
	Takes   int              `json:"takes"`           // backends that take the next connection, of all
	Total   int              `json:"total"`           // backends
	History map[string]lines `json:"history"`         // of those that are shown
	Every   float64          `json:"everySeconds"`
}

// lines are the points of a history, oldest first.
type lines struct {
	InFlight []uint32  `json:"inFlight"`
	Failed   []uint32  `json:"failed"`
	Response []float32 `json:"responseSeconds"`
}

func newLines(points []view.Point) (l lines) {
	for _, p := range points {
		l.InFlight, l.Failed, l.Response = append(l.InFlight, p.InFlight), append(l.Failed, p.Failed), append(l.Response, p.ResponseTime)
	}
	return l
}

// details are those of one look, made once for all browsers.
type details struct {
	mu     sync.Mutex
	number uint64 // of the look
	made   map[string][]byte
}

func (p *Page) serveLooks(s Settings) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		out, ctx, done := p.open(w, r)
		defer done()
		leave := p.looks.join()
		defer leave()
		hello := struct {
			Actions bool `json:"actions"`
		}{s.Actions}
		if out.sendJSON("hello", hello) != nil {
			return
		}
		name := r.URL.Query().Get("service")
		if name != "" {
			p.details.Add(1)
			defer p.details.Add(-1)
		}
		var last *look
		for {
			var number uint64
			if last != nil {
				number = last.number
			}
			l, err := p.looks.after(ctx, number)
			if err != nil {
				return
			}
			data := l.change
			switch {
			case last == nil:
				data = l.whole()
			case l.number != last.number+1:
				data = l.since(last)
			}
			if !s.Knows(r) { // the token may be another one by now
				return
			}
			if out.send("look", data) != nil || name != "" && !p.sendDetail(ctx, out, l, name) {
				return
			}
			last = l
		}
	}
}

// sendDetail reports whether the browser has taken it.
func (p *Page) sendDetail(ctx context.Context, out stream, l *look, name string) bool {
	data, err := p.detail(ctx, l, name)
	return err == nil && out.send("service", data) == nil
}

// detail returns what is sent of a service.
func (p *Page) detail(ctx context.Context, l *look, name string) ([]byte, error) {
	p.made.mu.Lock()
	defer p.made.mu.Unlock()
	if p.made.number != l.number {
		p.made.number, p.made.made = l.number, make(map[string][]byte)
	}
	if data, is := p.made.made[name]; is {
		return data, nil
	}
	d := detail{Name: name, Error: "nothing is known of it"}
	from := l.host
	if from == nil {
		// The look was made before anybody asked for a service.
		var err error
		if from, err = view.ReadKernel(p.opts.At); err != nil {
			d.Error = err.Error()
		}
	}
	if from != nil {
		d = p.describe(ctx, from, name)
	}
	data, err := json.Marshal(d)
	p.made.made[name] = data
	return data, err
}

// describe makes a detail of a look.
func (p *Page) describe(ctx context.Context, from *view.Host, name string) detail {
	d := detail{Name: name, History: make(map[string]lines), Every: view.HistoryEvery.Seconds()}
	s, ok := from.WithProbes(ctx, p.opts.At, name).Find(name)
	if !ok {
		return d
	}
	d.Service, d.Total = &s, len(s.Backends)
	for _, b := range s.Backends {
		if b.Takes {
			d.Takes++
		}
	}
	if d.More = max(0, len(s.Backends)-maxShown); d.More > 0 {
		s.Backends = slices.Clone(s.Backends)
		slices.SortStableFunc(s.Backends, func(a, b view.Backend) int { return rank(a) - rank(b) })
		s.Backends = s.Backends[:maxShown]
		for i := range s.Listeners {
			s.Listeners[i].To = s.Listeners[i].To[:min(len(s.Listeners[i].To), maxShown)]
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, b := range s.Backends {
		at, err := netip.ParseAddrPort(b.Address)
		if points := p.history.Of(name, at); err == nil && points != nil {
			d.History[b.Address] = newLines(points)
		}
	}
	return d
}

// rank is lower for backends that are more worth a look.
func rank(b view.Backend) int {
	switch {
	case b.Takes:
		return 1
	case b.State == service.Standby.String():
		return 2
	}
	return 0
}

// parts are the roles of this host beside services.
type parts struct {
	Proxies       []api.Proxy       `json:"proxies"`
	Forwards      []api.Forward     `json:"forwards"`
	Announcements api.Announcements `json:"announcements"`
	Blocks        []api.Block       `json:"blocks"`
	Pods          []view.Pod        `json:"pods"`
	Captures      []api.Capture     `json:"captures"`
	Errors        []string          `json:"errors"` // of what could not be read
}

func (p *Page) serveParts(w http.ResponseWriter, r *http.Request) {
	done, err := p.alone(r.Context())
	if err != nil {
		return
	}
	defer done()
	client := api.NewClient(p.opts.At.RunDir)
	all := parts{Errors: []string{}}
	note := func(err error) {
		// A role that the agent does not play has nothing to tell.
		if err != nil && !slices.Contains(all.Errors, err.Error()) {
			all.Errors = append(all.Errors, err.Error())
		}
	}
	all.Proxies, err = client.Proxies(r.Context())
	note(err)
	all.Forwards, err = client.Forwards(r.Context())
	note(err)
	all.Announcements, err = client.Announcements(r.Context())
	note(err)
	if status, err := client.Status(r.Context()); err == nil && status.Blocks != nil {
		all.Blocks, err = client.Blocks(r.Context())
		note(err)
	}
	all.Pods, err = view.ReadPods()
	note(err)
	all.Captures, err = client.Captures(r.Context())
	note(err)
	answer(w, all, nil)
}
