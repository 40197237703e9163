package socks5

import (
	"fmt"
	"io"
	"net/netip"
	"slices"
)

// Request is what a client asks for.
type Request struct {
	Command Command
	Address Address
}

// Greet is the server's part of the choice of a method and of authentication. check
// says whether a user may come in; nil: everybody may, and is not asked. It returns the
// user, empty where nobody was asked. The connection is to be closed after any error: the
// client has been told, where the RFC has a message for it.
func Greet(c io.ReadWriter, check func(user, password string) bool) (user string, err error) {
	var b [257]byte
	if _, err := io.ReadFull(c, b[:1]); err != nil {
		return "", err
	}
	if b[0] != version {
		return "", fmt.Errorf("%w: the first byte is %#02x", ErrVersion, b[0])
	}
	if _, err := io.ReadFull(c, b[:1]); err != nil {
		return "", err
	}
	methods := b[1 : 1+int(b[0])]
	if _, err := io.ReadFull(c, methods); err != nil {
		return "", err
	}
	want := NoAuthentication
	if check != nil {
		want = UserPassword
	}
	if !slices.Contains(methods, byte(want)) {
		_, err := c.Write([]byte{version, byte(noneAcceptable)})
		if err == nil {
			err = ErrNoMethod
		}
		return "", err
	}
	if _, err := c.Write([]byte{version, byte(want)}); err != nil {
		return "", err
	}
	if check == nil {
		return "", nil
	}
	return authenticate(c, check)
}

// passwordVersion is that of the negotiation of RFC 1929.
const passwordVersion = 1

// authenticate is the server's part of RFC 1929, section 2.
func authenticate(c io.ReadWriter, check func(user, password string) bool) (string, error) {
	user, password, err := readPassword(c)
	if err == nil && !check(user, password) {
		err = ErrDenied
	}
	if err != nil {
		// Any status but 0 is a failure; after it the server must close.
		_, _ = c.Write([]byte{passwordVersion, 1})
		return user, err
	}
	_, err = c.Write([]byte{passwordVersion, 0})
	return user, err
}

func readPassword(r io.Reader) (user, password string, err error) {
	var b [255]byte
	if _, err := io.ReadFull(r, b[:1]); err != nil {
		return "", "", err
	}
	if b[0] != passwordVersion {
		return "", "", fmt.Errorf("%w: version %d of the user and password", ErrMalformed, b[0])
	}
	var texts [2]string
	for i := range texts {
		if _, err := io.ReadFull(r, b[:1]); err != nil {
			return "", "", err
		}
		if b[0] == 0 {
			return texts[0], "", fmt.Errorf("%w: an empty user or password", ErrMalformed)
		}
		text := b[:b[0]]
		if _, err := io.ReadFull(r, text); err != nil {
			return texts[0], "", err
		}
		texts[i] = string(text)
	}
	return texts[0], texts[1], nil
}

// ReadRequest reads what the client asks for. An error that is a Reply, or is
// ErrMalformed, is to be answered (ReplyTo) before the connection is closed.
func ReadRequest(r io.Reader) (Request, error) {
	var b [3]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return Request{}, err
	}
	if b[0] != version || b[2] != 0 {
		return Request{}, fmt.Errorf("%w: a request that begins with % x", ErrMalformed, b[:])
	}
	to, err := readAddress(r)
	q := Request{Command(b[1]), to}
	if err == nil && (q.Command < Connect || q.Command > Associate) {
		err = CommandNotSupported
	}
	return q, err
}

// WriteReply answers a request. bound is the address that belongs to the reply; that of
// a failure may be the zero value.
func WriteReply(w io.Writer, r Reply, bound netip.AddrPort) error {
	b := appendAddress([]byte{version, byte(r), 0}, AddressOf(bound))
	_, err := w.Write(b)
	return err
}
