package proxy

import (
	"bufio"
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/argon2"
	"golang.org/x/crypto/bcrypt"
)

// users are who may use a proxy, as a file says that is read again when it changes.
type users struct {
	path string
	busy chan struct{} // bounds the hashes that are computed at a time

	mu      sync.Mutex
	looked  time.Time
	version fileVersion
	hashes  map[string]string
	costly  string // the hash that takes longest
	err     error
	key     [sha256.Size]byte
	proven  map[[sha256.Size]byte]bool // users with passwords that were right, under key
}

// fileVersion tells one state of a file from another.
type fileVersion struct {
	size int64
	time time.Time
	node os.FileInfo
}

// lookEvery is how often the file is looked at, at most.
const lookEvery = time.Second

// maxProven bounds what is remembered of passwords that were right.
const maxProven = 10_000

func newUsers(path string) *users {
	u := &users{path: path, busy: make(chan struct{}, 2)}
	_, _ = rand.Read(u.key[:]) // it never fails (crypto/rand)
	return u
}

// check reports whether a user may come in with a password. It takes as long for one who
// is not there. Hashes take long on purpose: strangers cannot have more than two computed
// at a time, and others wait in turn until the context ends.
func (u *users) check(ctx context.Context, user, password string) (bool, error) {
	hash, known, err := u.find(user)
	if err != nil {
		return false, err
	}
	mark := u.mark(user, password)
	u.mu.Lock()
	proven := u.proven[mark]
	u.mu.Unlock()
	if proven {
		return true, nil
	}
	select {
	case u.busy <- struct{}{}:
		defer func() { <-u.busy }()
	case <-ctx.Done():
		return false, ctx.Err()
	}
	if ok := verify(hash, password); !ok || !known {
		return false, nil
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.proven) < maxProven && u.hashes[user] == hash {
		u.proven[mark] = true
	}
	return true, nil
}

func (u *users) mark(user, password string) (m [sha256.Size]byte) {
	h := hmac.New(sha256.New, u.key[:])
	fmt.Fprintf(h, "%d %s%s", len(user), user, password)
	return [sha256.Size]byte(h.Sum(nil))
}

// find returns the hash of a user; of one who is not there the one that takes longest.
func (u *users) find(user string) (hash string, known bool, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.refresh()
	if u.err != nil {
		return "", false, u.err
	}
	if hash, known = u.hashes[user]; known {
		return hash, true, nil
	}
	return u.costly, false, nil
}

// refresh reads the file again if it has changed.
func (u *users) refresh() {
	if time.Since(u.looked) < lookEvery {
		return
	}
	u.looked = time.Now()
	st, err := os.Stat(u.path)
	if err != nil {
		u.hashes, u.err, u.version = nil, err, fileVersion{}
		return
	}
	if u.err == nil && u.version.node != nil && os.SameFile(u.version.node, st) && u.version.size == st.Size() && u.version.time.Equal(st.ModTime()) {
		return
	}
	u.version = fileVersion{st.Size(), st.ModTime(), st}
	u.hashes, u.err = readUsers(u.path, st)
	u.costly = ""
	for _, hash := range u.hashes {
		if u.costly == "" || costOf(hash) > costOf(u.costly) {
			u.costly = hash
		}
	}
	u.proven = make(map[[sha256.Size]byte]bool)
}

// errWritable says that more than the owner of a file decides who may come in.
var errWritable = errors.New("others than its owner can write it; chmod go-w ends that")

// readUsers reads lines USER:HASH.
func readUsers(path string, st os.FileInfo) (map[string]string, error) {
	if st.Mode().Perm()&0o022 != 0 {
		return nil, fmt.Errorf("file of users %s: %w", path, errWritable)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	all := make(map[string]string)
	n := 0
	lines := bufio.NewScanner(bytes.NewReader(text))
	for lines.Scan() {
		n++
		line := strings.TrimSpace(lines.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		user, hash, ok := strings.Cut(line, ":")
		if !ok || user == "" || !isHash(hash) {
			return nil, fmt.Errorf("file of users %s: line %d is not USER:HASH with a hash of bcrypt (cost at most 15) or argon2id; `htpasswd -nB USER` writes one", path, n)
		}
		all[user] = hash
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("file of users %s: line %d: %w", path, n+1, err)
	}
	return all, nil
}

// maxCost bounds what one hash of bcrypt may take: each step doubles it, and this one is
// some seconds.
const maxCost = 15

func isHash(hash string) bool {
	if strings.HasPrefix(hash, "$argon2id$") {
		_, err := parseArgon2(hash)
		return err == nil
	}
	cost, err := bcrypt.Cost([]byte(hash))
	return err == nil && cost <= maxCost
}

// costOf compares what hashes take, roughly: argon2id by its passes over memory, bcrypt by
// its rounds.
func costOf(hash string) uint64 {
	if a, err := parseArgon2(hash); err == nil {
		return uint64(a.memory) * uint64(a.time)
	}
	cost, _ := bcrypt.Cost([]byte(hash)) // it was looked at before
	return 64 << cost
}

func verify(hash, password string) bool {
	if strings.HasPrefix(hash, "$argon2id$") {
		a, err := parseArgon2(hash)
		return err == nil && subtle.ConstantTimeCompare(a.sum, argon2.IDKey([]byte(password), a.salt, a.time, a.memory, a.threads, uint32(len(a.sum)))) == 1
	}
	return bcrypt.CompareHashAndPassword([]byte(hash), []byte(password)) == nil
}

// argon2Hash is one in PHC form: $argon2id$v=19$m=65536,t=3,p=4$SALT$SUM.
type argon2Hash struct {
	memory, time uint32
	threads      uint8
	salt, sum    []byte
}

// maxArgon2Memory bounds what one hash may take, in KiB.
const maxArgon2Memory = 256 << 10

func parseArgon2(text string) (h argon2Hash, err error) {
	parts := strings.Split(text, "$")
	if len(parts) != 6 || parts[2] != "v=19" {
		return h, errors.New("not argon2id, version 19")
	}
	if _, err := fmt.Sscanf(parts[3], "m=%d,t=%d,p=%d", &h.memory, &h.time, &h.threads); err != nil {
		return h, err
	}
	if h.salt, err = base64.RawStdEncoding.DecodeString(parts[4]); err != nil {
		return h, err
	}
	if h.sum, err = base64.RawStdEncoding.DecodeString(parts[5]); err != nil {
		return h, err
	}
	if h.memory > maxArgon2Memory || h.time == 0 || h.time > 100 || h.threads == 0 || len(h.sum) < 16 || len(h.salt) < 8 {
		return h, errors.New("parameters of argon2id out of range")
	}
	return h, nil
}
