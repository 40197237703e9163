package proxy

import (
	"context"
	"encoding/base64"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/pentad/pentad/proxy/relay"
	"github.com/pentad/pentad/proxy/socks5"
)

// connQueue is the listener of the server that speaks HTTP: connections of which the
// first byte says that they do.
type connQueue struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newConnQueue() *connQueue {
	return &connQueue{conns: make(chan net.Conn), done: make(chan struct{})}
}

func (q *connQueue) Accept() (net.Conn, error) {
	select {
	case c := <-q.conns:
		return c, nil
	case <-q.done:
		return nil, net.ErrClosed
	}
}

func (q *connQueue) Close() error {
	q.once.Do(func() { close(q.done) })
	return nil
}

func (*connQueue) Addr() net.Addr { return &net.TCPAddr{} }

// webConn is a connection in the hands of the HTTP server. The session goes on when it
// lets go of it.
type webConn struct {
	*session
	net.Conn
	ctx  context.Context // ends when the client has aborted, or all is over
	end  context.CancelFunc
	over chan struct{}
	once sync.Once
}

// Read notes an abort: who has only ended its sending still waits for an answer.
func (c *webConn) Read(b []byte) (int, error) {
	n, err := c.session.in.Read(b)
	if errors.Is(err, syscall.ECONNRESET) {
		c.end()
	}
	return n, err
}

func (c *webConn) Write(b []byte) (int, error) { return c.Conn.Write(b) }

// Close ends the connection.
func (c *webConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() {
		c.end()
		close(c.over)
	})
	return err
}

// http serves a client that speaks HTTP, to its last request.
func (s *session) http() {
	_ = s.conn.SetDeadline(time.Time{})
	c := &webConn{session: s, Conn: s.conn, over: make(chan struct{})}
	c.ctx, c.end = context.WithCancel(s.ctx)
	defer c.end()
	select {
	case s.settings.queue.conns <- c:
		<-c.over
	case <-s.ctx.Done():
		s.conn.Close()
	}
}

// sessionKey is the key of the session in the context of a request.
type sessionKey struct{}

// newWebServer returns a server whose clients have so long to ask, for each request.
func newWebServer(handshake time.Duration) *http.Server {
	forward := &httputil.ReverseProxy{
		Rewrite:        rewrite,
		ModifyResponse: addVia,
		FlushInterval:  -1,
		// A connection to a target is of one request: the next may be of another user.
		Transport: &http.Transport{DialContext: dialForRequest, DisableKeepAlives: true, DisableCompression: true},
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			r.Context().Value(requestKey{}).(*request).err = err
			refuseHTTP(w, err)
		},
		ErrorLog: log.New(io.Discard, "", 0),
	}
	return &http.Server{
		Handler:           http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { serveHTTP(w, r, forward) }),
		ConnContext:       func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, sessionKey{}, c) },
		ReadHeaderTimeout: handshake,
		IdleTimeout:       handshake,
		MaxHeaderBytes:    maxHead,
		ErrorLog:          log.New(io.Discard, "", 0),
	}
}

// rewrite makes the request to the target of that to the proxy. What it says of its path
// stays as it was written (RFC 9110, section 7.7).
func rewrite(r *httputil.ProxyRequest) {
	u := *r.In.URL
	r.Out.URL, r.Out.Host = &u, u.Host // RFC 9112, section 3.2.2
	path := strings.TrimPrefix(r.In.RequestURI, u.Scheme+"://")
	_, path, _ = strings.Cut(path, "/")
	path, _, _ = strings.Cut(path, "?")
	if !strings.HasPrefix(path, "/") {
		u.Opaque = "/" + path
	}
	if r.In.Method == http.MethodOptions && u.Path == "" && u.RawQuery == "" {
		u.Opaque = "*" // RFC 9112, section 3.2.4
	}
	r.Out.URL = &u
	for _, name := range []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"} {
		if v := r.In.Header.Values(name); len(v) > 0 {
			r.Out.Header[name] = v
		}
	}
	r.Out.Header.Add("Via", via)
}

// via says that somebody is in between (RFC 9110, section 7.6.3).
const via = "1.1 pentad"

func addVia(r *http.Response) error {
	r.Header.Add("Via", via)
	return nil
}

// request is one request of a client: what is known of its way.
type request struct {
	*session
	late *time.Timer // ends it when nothing is sent for too long
	err  error       // why it got no answer
}

type requestKey struct{}

func serveHTTP(w http.ResponseWriter, r *http.Request, forward http.Handler) {
	c := r.Context().Value(sessionKey{}).(*webConn)
	control := http.NewResponseController(w)
	_ = control.SetReadDeadline(time.Now().Add(c.settings.Handshake))
	user, ok := c.authenticate(r)
	if !ok {
		w.Header().Set("Proxy-Authenticate", `Basic realm="pentad", charset="UTF-8"`)
		http.Error(w, "the proxy wants to know who you are", http.StatusProxyAuthRequired)
		return
	}
	one := *c.session // each request has a flow of its own
	one.user = user
	if r.Method == http.MethodConnect {
		one.connectHTTP(w, r, c)
		return
	}
	to, err := targetOf(r)
	if err != nil {
		http.Error(w, "this is a proxy: it wants CONNECT, or a request with an absolute URI of http", http.StatusBadRequest)
		return
	}
	if answeredHere(w, r) {
		return
	}
	_ = control.SetReadDeadline(time.Time{})
	one.begin("http", r.Method, to.String())
	one.forwardHTTP(w, r, c, forward)
}

// targetOf returns where a request with an absolute URI goes.
func targetOf(r *http.Request) (target, error) {
	if r.URL.Scheme != "http" || r.URL.Host == "" {
		return target{}, errors.New("no absolute URI of http")
	}
	host := r.URL.Host
	if r.URL.Port() == "" {
		host = net.JoinHostPort(r.URL.Hostname(), "80")
	}
	return hostTarget(host)
}

// answeredHere answers what is for the last proxy that it may reach, and counts down for
// the others (RFC 9110, section 7.6.2).
func answeredHere(w http.ResponseWriter, r *http.Request) bool {
	text := r.Header.Get("Max-Forwards")
	if r.Method != http.MethodOptions && r.Method != http.MethodTrace || text == "" {
		return false
	}
	n, err := strconv.ParseUint(text, 10, 32)
	switch {
	case err != nil:
		return false
	case n > 0:
		r.Header.Set("Max-Forwards", strconv.FormatUint(n-1, 10))
		return false
	case r.Method == http.MethodTrace:
		http.Error(w, "this proxy does not repeat what it is told", http.StatusNotImplemented)
	default:
		w.Header().Set("Allow", "CONNECT, DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT")
	}
	return true
}

// forwardHTTP forwards a request. It goes on while the client has not aborted and bytes
// are sent in either direction.
func (s *session) forwardHTTP(w http.ResponseWriter, r *http.Request, c *webConn, forward http.Handler) {
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(r.Context()))
	defer cancel(nil)
	defer context.AfterFunc(c.ctx, func() { cancel(net.ErrClosed) })()
	q := &request{session: s, late: time.AfterFunc(s.settings.Idle, func() { cancel(context.DeadlineExceeded) })}
	defer q.late.Stop()
	// A body that breaks off ends in a panic, which the server understands.
	outcome := "closed: the answer broke off"
	defer func() { s.plane.flows.end(s.flow, q.err != nil, outcome) }()
	forward.ServeHTTP(w, r.WithContext(context.WithValue(ctx, requestKey{}, q)))
	outcome = "closed"
	if q.err != nil {
		outcome = Describe(q.err)
	}
}

// authenticate reports whether a request may be served, and whose it is.
func (s *session) authenticate(r *http.Request) (user string, ok bool) {
	check := s.checker()
	if check == nil {
		return "", true
	}
	scheme, text, _ := strings.Cut(r.Header.Get("Proxy-Authorization"), " ")
	raw, err := base64.StdEncoding.DecodeString(strings.TrimSpace(text))
	if !strings.EqualFold(scheme, "Basic") || err != nil {
		return "", false
	}
	user, password, _ := strings.Cut(string(raw), ":")
	return user, check(user, password)
}

// connectHTTP serves CONNECT (RFC 9110, section 9.3.6).
func (s *session) connectHTTP(w http.ResponseWriter, r *http.Request, c *webConn) {
	to, err := hostTarget(r.RequestURI)
	if err != nil {
		w.Header().Set("Connection", "close")
		http.Error(w, "CONNECT wants HOST:PORT", http.StatusBadRequest)
		return
	}
	s.begin("http", "CONNECT", to.String())
	t, err := s.open(to)
	if err != nil {
		s.fail(err)
		// What follows may be for the tunnel that there is not.
		w.Header().Set("Connection", "close")
		refuseHTTP(w, err)
		return
	}
	_, in, err := http.NewResponseController(w).Hijack()
	if err != nil {
		s.fail(err)
		relay.Abort(t)
		return
	}
	defer c.Close()
	_ = s.conn.SetDeadline(time.Time{})
	if _, err := io.WriteString(s.conn, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil {
		s.fail(err)
		relay.Abort(t)
		return
	}
	// What the server has read of it, and what this has before it.
	s.sent, _ = in.Reader.Peek(in.Reader.Buffered())
	s.relay(t)
}

func hostTarget(text string) (target, error) {
	host, port, err := net.SplitHostPort(text)
	if err != nil {
		return target{}, err
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return target{}, errors.New("no port")
	}
	return socks5.ParseAddress(host, uint16(n))
}

// dialForRequest connects by the way of the request that the context is of.
func dialForRequest(ctx context.Context, _, address string) (net.Conn, error) {
	q := ctx.Value(requestKey{}).(*request)
	to, err := hostTarget(address)
	if err != nil {
		return nil, err
	}
	c, err := q.open(to)
	if err != nil {
		return nil, err
	}
	q.plane.flows.reached(q.flow)
	return &meteredConn{c, q}, nil
}

// meteredConn is a connection to the target of a request: what goes over it is counted,
// and shows that nobody is idle.
type meteredConn struct {
	net.Conn
	of *request
}

func (c *meteredConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.moved(n, &c.of.flow.counts.Received)
	return n, err
}

func (c *meteredConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.moved(n, &c.of.flow.counts.Sent)
	return n, err
}

func (c *meteredConn) moved(n int, count *atomic.Uint64) {
	if n > 0 {
		count.Add(uint64(n))
		c.of.late.Reset(c.of.settings.Idle)
	}
}

// refuseHTTP tells a client of HTTP why it does not get where it wants.
func refuseHTTP(w http.ResponseWriter, err error) {
	code := http.StatusBadGateway
	switch {
	case errors.Is(err, errRefused), errors.Is(err, errOwn), errors.Is(err, errHost):
		code = http.StatusForbidden
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, syscall.ETIMEDOUT):
		code = http.StatusGatewayTimeout
	}
	http.Error(w, Describe(err), code)
}
