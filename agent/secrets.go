package agent

import (
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/pentad/pentad/host"
)

// shortestToken is how many characters a token has at least: it is all that stands
// between a network and what this host does.
const shortestToken = 16

// token is a secret in a file, which is read again when it changes. Without a path there
// is none.
type token struct {
	path string

	mu    sync.Mutex
	stamp stamp
	value string
	err   error
}

// stamp tells one text of a file from another.
type stamp struct {
	written, changed time.Time
	mode             os.FileMode
	size             int64
	inode            uint64
}

func stampOf(path string) (stamp, error) {
	st, err := os.Stat(path)
	if err != nil {
		return stamp{}, err
	}
	s := stamp{written: st.ModTime(), mode: st.Mode(), size: st.Size()}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		s.inode, s.changed = sys.Ino, time.Unix(sys.Ctim.Unix())
	}
	return s, nil
}

func (t *token) read() (string, error) {
	if t.path == "" {
		return "", nil
	}
	now, err := stampOf(t.path)
	if err != nil {
		return "", err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if now == t.stamp {
		return t.value, t.err
	}
	t.stamp = now
	if t.value, t.err = host.ReadPassword(t.path); t.err == nil && len(t.value) < shortestToken {
		t.err = fmt.Errorf("the first line of %s is a token of %d characters; want %d or more, such as `openssl rand -hex 16` prints", t.path, len(t.value), shortestToken)
	}
	if t.err == nil && strings.ContainsFunc(t.value, func(r rune) bool { return r <= ' ' || r > '~' }) {
		t.err = fmt.Errorf("the first line of %s has a blank, or a character that is none of ASCII: no header can say it", t.path)
	}
	if t.err != nil {
		t.value = ""
	}
	return t.value, t.err
}

// keyPair is a certificate in files, which are read again when they change. A pair that
// is half written leaves the one before.
type keyPair struct {
	cert, key string

	mu     sync.Mutex
	stamps [2]stamp
	pair   *tls.Certificate
}

func (k *keyPair) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	cert, err := stampOf(k.cert)
	key, err2 := stampOf(k.key)
	k.mu.Lock()
	defer k.mu.Unlock()
	if now := [2]stamp{cert, key}; err == nil && err2 == nil && now != k.stamps {
		var pair tls.Certificate
		if pair, err = tls.LoadX509KeyPair(k.cert, k.key); err == nil {
			k.pair, k.stamps = &pair, now
		}
	}
	if k.pair == nil {
		return nil, errors.Join(err, err2)
	}
	return k.pair, nil
}
