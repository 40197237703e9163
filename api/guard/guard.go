// Package guard makes the HTTP servers that strangers reach: users of the host,
// pods, load balancers, web pages in somebody's browser. What a stranger holds is
// bounded in number and in time, so that he cannot take the files that the agent
// needs for what matters.
package guard

import (
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"
)

// How long a client may take, and how many bytes of headers it may send. Answers
// are long where there are many services, and scrapers may be far away.
const (
	readTimeout  = 10 * time.Second
	writeTimeout = 30 * time.Second
	idleTimeout  = 30 * time.Second
	maxHeader    = 16 << 10
)

// Limit bounds the connections of all its servers together. Over the bound, the
// one goes that has asked for nothing for longest.
type Limit struct {
	most int

	mu    sync.Mutex
	conns map[net.Conn]state
}

// state is what a connection does.
type state struct {
	asking bool // it waits for an answer
	since  time.Time
}

// NewLimit returns a bound of so many connections.
func NewLimit(most int) *Limit {
	return &Limit{most: most, conns: make(map[net.Conn]state)}
}

// Server returns a server below the limit. It is the caller's to start and stop.
func (l *Limit) Server(h http.Handler) *http.Server {
	return &http.Server{
		Handler: h, ConnState: l.observe, MaxHeaderBytes: maxHeader,
		ReadHeaderTimeout: readTimeout, ReadTimeout: readTimeout, WriteTimeout: writeTimeout, IdleTimeout: idleTimeout,
	}
}

func (l *Limit) observe(c net.Conn, s http.ConnState) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch s {
	case http.StateNew, http.StateIdle, http.StateActive:
		l.conns[c] = state{s == http.StateActive, time.Now()}
	default:
		delete(l.conns, c)
	}
	if len(l.conns) > l.most {
		victim := l.dispensable(c)
		delete(l.conns, victim)
		victim.Close()
	}
}

// dispensable returns the connection that has asked for nothing for longest, or
// the last one when all wait for answers.
func (l *Limit) dispensable(last net.Conn) net.Conn {
	found := last
	var since time.Time
	for c, s := range l.conns {
		if c != last && !s.asking && (since.IsZero() || s.since.Before(since)) {
			found, since = c, s.since
		}
	}
	return found
}

// Local refuses requests that come over loopback under a name that is not this
// host's: a web page may give its own name this address (DNS rebinding) and then
// read what the browser gets. Who comes from elsewhere may call the host what the
// network calls it.
func Local(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if isLoopback(r) && !isOwnName(r.Host) {
			http.Error(w, "this host has another name", http.StatusMisdirectedRequest)
			return
		}
		h.ServeHTTP(w, r)
	})
}

func isLoopback(r *http.Request) bool {
	a, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	if !ok {
		return false
	}
	addr, err := netip.ParseAddrPort(a.String())
	return err == nil && addr.Addr().Unmap().IsLoopback()
}

// isOwnName reports whether the Host of a request is an address, localhost, or the
// name of this host.
func isOwnName(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host = strings.TrimSuffix(strings.Trim(host, "[]"), ".")
	if _, err := netip.ParseAddr(host); err == nil || host == "" || strings.EqualFold(host, "localhost") {
		return true
	}
	own, err := os.Hostname()
	return err == nil && strings.EqualFold(host, own)
}
