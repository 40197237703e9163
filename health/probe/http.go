package probe

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/netip"

	"github.com/pentad/pentad/service"
)

// maxBody is how much of an answer a probe reads before it hangs up.
const maxBody = 64 << 10

// newHTTP returns a probe that sends one GET request and looks at the status.
// Redirects are answers, not instructions.
func newHTTP(h service.Health, dial dialFunc) (Func, error) {
	codes, err := service.ParseStatusCodes(h.Expect)
	if err != nil {
		return nil, fmt.Errorf("status codes %q: %w", h.Expect, err)
	}
	client := &http.Client{
		Transport: &http.Transport{
			DialContext:            dial,
			TLSClientConfig:        tlsConfig(h),
			DisableKeepAlives:      true,
			DisableCompression:     true,
			MaxResponseHeaderBytes: maxBody,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	scheme := "http://"
	if h.TLS {
		scheme = "https://"
	}
	return func(ctx context.Context, addr netip.AddrPort) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, scheme+addr.String()+h.Path, nil)
		if err != nil {
			return err
		}
		req.Host = h.Host
		req.Header.Set("User-Agent", "pentad")
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if !codes.Contains(resp.StatusCode) {
			return fmt.Errorf("answered %s, expected %s", resp.Status, h.Expect)
		}
		_, err = io.CopyN(io.Discard, resp.Body, maxBody)
		if err != nil && err != io.EOF {
			return err
		}
		return nil
	}, nil
}
