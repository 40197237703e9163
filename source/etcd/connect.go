// Package etcd is what a fleet shares: an etcd, with its hosts' configuration.
package etcd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/host"
)

// Bounds of a connection.
const (
	dialTimeout = 5 * time.Second
	// A member that says nothing for so long is left for another.
	keepaliveAfter   = 10 * time.Second
	keepaliveTimeout = 5 * time.Second
)

// Connect returns a client. It does not wait for a member to answer.
func Connect(ctx context.Context, c *config.Etcd) (*clientv3.Client, error) {
	settings := clientv3.Config{
		Context: ctx, Endpoints: c.Endpoints, DialTimeout: dialTimeout, Logger: zap.NewNop(),
		DialKeepAliveTime: keepaliveAfter, DialKeepAliveTimeout: keepaliveTimeout, PermitWithoutStream: true,
	}
	if c.CA != "" || c.Cert != "" {
		t, err := tlsOf(c)
		if err != nil {
			return nil, err
		}
		settings.TLS = t
		settings.DialOptions = append(settings.DialOptions, grpc.WithTransportCredentials(transport{credentials.NewTLS(t), c}))
	}
	if c.User != "" {
		password, err := host.ReadPassword(c.Password)
		if err != nil {
			return nil, fmt.Errorf("source.etcd: %w", err)
		}
		settings.Username, settings.Password = c.User, password
	}
	client, err := clientv3.New(settings)
	if err != nil {
		return nil, fmt.Errorf("source.etcd: %w", err)
	}
	return client, nil
}

// transport does the handshake with the certificates that lie in the files then: they are
// replaced before they expire, while agents run.
type transport struct {
	credentials.TransportCredentials // of the start, for all that is no handshake
	config                           *config.Etcd
}

// ClientHandshake implements credentials.TransportCredentials.
func (t transport) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	now, err := tlsOf(t.config)
	if err != nil {
		return nil, nil, err
	}
	return credentials.NewTLS(now).ClientHandshake(ctx, authority, conn)
}

// Clone implements credentials.TransportCredentials.
func (t transport) Clone() credentials.TransportCredentials {
	return transport{t.TransportCredentials.Clone(), t.config}
}

func tlsOf(c *config.Etcd) (*tls.Config, error) {
	t := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.Cert != "" {
		pair, err := tls.LoadX509KeyPair(c.Cert, c.Key)
		if err != nil {
			return nil, fmt.Errorf("source.etcd.tls: %w", err)
		}
		t.Certificates = []tls.Certificate{pair}
	}
	if c.CA == "" {
		return t, nil
	}
	pem, err := os.ReadFile(c.CA)
	if err != nil {
		return nil, fmt.Errorf("source.etcd.tls: %w", err)
	}
	t.RootCAs = x509.NewCertPool()
	if !t.RootCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("source.etcd.tls: there is no certificate in %s", c.CA)
	}
	return t, nil
}
