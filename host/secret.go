package host

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
)

// ErrLoose says that others than its owner have a right to a file with a secret.
var ErrLoose = errors.New("others may not have any right to it: chmod 600")

// maxSecret bounds a file with a secret, in bytes.
const maxSecret = 64 << 10

// ReadSecret reads a file that nobody but its owner may have any right to, such as a
// private key. The error is ErrLoose when others have, and never shows what is in it.
func ReadSecret(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s has mode %s; %w", path, st.Mode(), ErrLoose)
	}
	return io.ReadAll(io.LimitReader(f, maxSecret))
}

// ReadPassword reads the first line of a file with a secret; without a path there is
// none.
func ReadPassword(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	text, err := ReadSecret(path)
	if err != nil {
		return "", fmt.Errorf("password file: %w", err)
	}
	line, _, _ := strings.Cut(string(text), "\n")
	return strings.TrimRight(line, "\r"), nil
}
