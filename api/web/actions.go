package web

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"

	"github.com/pentad/pentad/api"
)

// maxRequest bounds what is sent with an action, in bytes.
const maxRequest = 16 << 10

// serveDrain drains a backend, or ends that. Who asks has said the token, in a header
// that a browser sends for nobody else's page.
func (p *Page) serveDrain(s Settings) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if !s.Actions {
			http.Error(w, "the configuration has no api.actions: true", http.StatusForbidden)
			return
		}
		if r.Header.Get("Content-Type") != "application/json" {
			http.Error(w, "want application/json", http.StatusUnsupportedMediaType)
			return
		}
		var q api.DrainRequest
		d := json.NewDecoder(io.LimitReader(r.Body, maxRequest))
		d.DisallowUnknownFields()
		if err := d.Decode(&q); err != nil {
			answer(w, nil, errors.New("the request is not valid: "+err.Error()))
			return
		}
		a, err := api.NewClient(p.opts.At.RunDir).Drain(r.Context(), q)
		word := "drain"
		if !q.Drained {
			word = "enable"
		}
		p.opts.Log.Info("asked by the page", "action", word, "service", q.Service, "backend", q.Address, "force", q.Force, "from", r.RemoteAddr, "error", err)
		answer(w, a, err)
	}
}
