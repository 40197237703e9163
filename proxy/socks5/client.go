package socks5

import (
	"bytes"
	"fmt"
	"io"
)

// Login is who a client is to a server; the zero value is nobody.
type Login struct{ User, Password string }

// Ask is the client's part of the handshake: it authenticates, asks, and returns the
// address that the server names. An error that is a Reply is the server's answer. For
// Bind the second answer is read by ReadReply.
func Ask(c io.ReadWriter, login Login, q Request) (Address, error) {
	if err := introduce(c, login); err != nil {
		return Address{}, err
	}
	if q.Address.Name != "" {
		if err := checkName(q.Address.Name); err != nil {
			return Address{}, err
		}
	}
	if _, err := c.Write(appendAddress([]byte{version, byte(q.Command), 0}, q.Address)); err != nil {
		return Address{}, err
	}
	return ReadReply(c)
}

// introduce agrees with the server about a method, and authenticates.
func introduce(c io.ReadWriter, login Login) error {
	// Who has a password offers to do without, too: the server chooses.
	hello := []byte{version, 1, byte(NoAuthentication)}
	if login != (Login{}) {
		hello = []byte{version, 2, byte(NoAuthentication), byte(UserPassword)}
	}
	if _, err := c.Write(hello); err != nil {
		return err
	}
	var b [2]byte
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return err
	}
	switch {
	case b[0] != version:
		return fmt.Errorf("%w: the server's first byte is %#02x", ErrVersion, b[0])
	case Method(b[1]) == NoAuthentication:
		return nil
	case Method(b[1]) == UserPassword && login != (Login{}):
		return logIn(c, login)
	case Method(b[1]) == noneAcceptable && login == (Login{}):
		return fmt.Errorf("%w: the server wants more than nothing", ErrNoMethod)
	case Method(b[1]) == noneAcceptable:
		return ErrNoMethod
	}
	return fmt.Errorf("%w: the server has chosen method %#02x, which was not offered", ErrMalformed, b[1])
}

// logIn is the client's part of RFC 1929, section 2.
func logIn(c io.ReadWriter, login Login) error {
	b := []byte{passwordVersion}
	for _, text := range []string{login.User, login.Password} {
		if len(text) == 0 || len(text) > 255 {
			return fmt.Errorf("%w: a user and a password have 1 to 255 bytes (RFC 1929)", ErrMalformed)
		}
		b = append(append(b, byte(len(text))), text...)
	}
	if _, err := c.Write(b); err != nil {
		return err
	}
	var answer [2]byte
	if _, err := io.ReadFull(c, answer[:]); err != nil {
		return err
	}
	if answer[1] != 0 {
		return ErrDenied
	}
	return nil
}

// ReadReply reads the answer to a request, and the address in it.
func ReadReply(r io.Reader) (Address, error) {
	var b [3]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return Address{}, err
	}
	if b[0] != version {
		return Address{}, fmt.Errorf("%w: an answer that begins with % x", ErrMalformed, b[:])
	}
	// Some servers send less than the RFC asks for with a failure, and close.
	if Reply(b[1]) != Succeeded {
		return Address{}, Reply(b[1])
	}
	return readAnswered(r)
}

// readAnswered reads the address of an answer. Some servers answer with a name of no
// bytes: the address of an answer to CONNECT is for information only.
func readAnswered(r io.Reader) (Address, error) {
	var b [maxAddress]byte
	if _, err := io.ReadFull(r, b[:2]); err != nil {
		return Address{}, err
	}
	if b[0] == typeName && b[1] == 0 {
		_, err := io.ReadFull(r, b[:2])
		return Address{}, err
	}
	return readAddress(io.MultiReader(bytes.NewReader(b[:2]), r))
}
