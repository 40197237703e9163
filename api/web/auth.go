package web

import (
	"crypto/subtle"
	"net/http"
	"strings"
)

// guard lets those through who say the token, where there is one. Pages of others are
// kept out whatever they know: a browser says who asks (Fetch Metadata).
func (s Settings) guard(h http.HandlerFunc) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.Header.Get("Sec-Fetch-Site") {
		case "", "same-origin", "none":
		default:
			http.Error(w, "another page may not read this", http.StatusForbidden)
			return
		}
		if !s.Knows(r) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="pentad"`)
			http.Error(w, "the token of api.tokenFile is needed: Authorization: Bearer ...", http.StatusUnauthorized)
			return
		}
		h(w, r)
	})
}

// Knows reports whether a request has the token, or none is needed. A token that cannot
// be read is one that nobody knows.
func (s Settings) Knows(r *http.Request) bool {
	want, err := s.Token()
	if err != nil {
		return false
	}
	if want == "" {
		return true
	}
	scheme, said, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	return strings.EqualFold(scheme, "Bearer") && subtle.ConstantTimeCompare([]byte(said), []byte(want)) == 1
}
