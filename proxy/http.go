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
	over chan struct{}
	once sync.Once
}

func (c *webConn) Read(b []byte) (int, error)  { return c.session.in.Read(b) }
func (c *webConn) Write(b []byte) (int, error) { return c.Conn.Write(b) }
func (c *webConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() { close(c.over) })
	return err
}

// http serves a client that speaks HTTP, to its last request.
func (s *session) http() {
	_ = s.conn.SetDeadline(time.Time{})
	c := &webConn{session: s, Conn: s.conn, over: make(chan struct{})}
	select {
	case s.queue.conns <- c:
		<-c.over
	case <-s.ctx.Done():
		s.conn.Close()
	}
}

// sessionKey is the key of the session in the context of a request.
type sessionKey struct{}

func (s *server) webServer() *http.Server {
	forward := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL = r.In.URL
			r.Out.Host = r.In.URL.Host // RFC 9112, section 3.2.2
		},
		ModifyResponse: func(r *http.Response) error {
			r.Request.Context().Value(requestKey{}).(*request).late.Stop()
			return nil
		},
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
		ReadHeaderTimeout: handshakeOfHTTP,
		MaxHeaderBytes:    maxHead,
		ErrorLog:          log.New(io.Discard, "", 0),
	}
}

// handshakeOfHTTP bounds how long a client may take to ask, for the first and each
// further request.
const handshakeOfHTTP = 30 * time.Second

// request is one request of a client: what is known of its way.
type request struct {
	*session
	late *time.Timer // ends it when no answer comes
	err  error       // why it got none
}

type requestKey struct{}

func serveHTTP(w http.ResponseWriter, r *http.Request, forward http.Handler) {
	c := r.Context().Value(sessionKey{}).(*webConn)
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
	if r.URL.Scheme != "http" || r.URL.Host == "" {
		http.Error(w, "this is a proxy: it wants CONNECT, or a request with an absolute URI of http", http.StatusBadRequest)
		return
	}
	one.begin("http", r.Method, r.URL.Host)
	// A client that has ended its sending still waits for its answer: only that there is
	// none for too long ends the request.
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(r.Context()))
	defer cancel(nil)
	defer context.AfterFunc(one.ctx, func() { cancel(net.ErrClosed) })()
	q := &request{session: &one, late: time.AfterFunc(one.settings.Idle, func() { cancel(context.DeadlineExceeded) })}
	defer q.late.Stop()
	r.Body = &countingBody{ReadCloser: r.Body, flow: one.flow}
	forward.ServeHTTP(&countingWriter{ResponseWriter: w, flow: one.flow}, r.WithContext(context.WithValue(ctx, requestKey{}, q)))
	outcome := "closed"
	if q.err != nil {
		outcome = Describe(q.err)
	}
	one.plane.flows.end(one.flow, q.err != nil, outcome)
}

// authenticate reports whether a request may be served, and whose it is.
func (s *session) authenticate(r *http.Request) (user string, ok bool) {
	check := s.checker()
	if check == nil {
		return "", true
	}
	text, isBasic := strings.CutPrefix(r.Header.Get("Proxy-Authorization"), "Basic ")
	raw, err := base64.StdEncoding.DecodeString(text)
	if !isBasic || err != nil {
		return "", false
	}
	user, password, _ := strings.Cut(string(raw), ":")
	return user, check(user, password)
}

// connectHTTP serves CONNECT (RFC 9110, section 9.3.6).
func (s *session) connectHTTP(w http.ResponseWriter, r *http.Request, c *webConn) {
	to, err := hostTarget(r.RequestURI)
	if err != nil {
		http.Error(w, "CONNECT wants HOST:PORT", http.StatusBadRequest)
		return
	}
	s.begin("http", "CONNECT", to.String())
	t, err := s.open(to)
	if err != nil {
		s.fail(err)
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
	return c, nil
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

// countingBody counts what the client sends.
type countingBody struct {
	io.ReadCloser
	flow *flow
}

func (b *countingBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.flow.counts.Sent.Add(uint64(n))
	return n, err
}

// countingWriter counts what the client gets.
type countingWriter struct {
	http.ResponseWriter
	flow *flow
}

func (w *countingWriter) Write(b []byte) (int, error) {
	n, err := w.ResponseWriter.Write(b)
	w.flow.counts.Received.Add(uint64(n))
	return n, err
}

// Unwrap lets the server's own abilities through (http.ResponseController).
func (w *countingWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
