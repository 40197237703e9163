// Package etcd is what a fleet shares: an etcd, with its hosts' configuration.
package etcd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

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

// tlsOf reads certificates anew at each connection: they are replaced before they expire.
func tlsOf(c *config.Etcd) (*tls.Config, error) {
	t := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.Cert != "" {
		read := func() (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(c.Cert, c.Key)
			if err != nil {
				return nil, fmt.Errorf("source.etcd.tls: %w", err)
			}
			return &pair, nil
		}
		if _, err := read(); err != nil {
			return nil, err
		}
		t.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return read() }
	}
	if c.CA == "" {
		return t, nil
	}
	if _, err := authorities(c.CA); err != nil {
		return nil, err
	}
	// The standard verification knows the authorities of the start only; this one does
	// the same with those of now.
	t.InsecureSkipVerify = true
	t.VerifyConnection = func(s tls.ConnectionState) error { return verify(c.CA, s) }
	return t, nil
}

func authorities(path string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("source.etcd.tls: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("source.etcd.tls: there is no certificate in %s", path)
	}
	return pool, nil
}

// verify does what package tls would.
func verify(ca string, s tls.ConnectionState) error {
	pool, err := authorities(ca)
	if err != nil {
		return err
	}
	if len(s.PeerCertificates) == 0 || s.ServerName == "" {
		return errors.New("the member of etcd has shown no certificate")
	}
	opts := x509.VerifyOptions{Roots: pool, DNSName: s.ServerName, Intermediates: x509.NewCertPool()}
	for _, c := range s.PeerCertificates[1:] {
		opts.Intermediates.AddCert(c)
	}
	_, err = s.PeerCertificates[0].Verify(opts)
	return err
}
