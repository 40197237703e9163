package probe

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strings"
)

// readPassword returns the first line of a file to which nobody but its owner
// has any right. No path, no password.
func readPassword(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("password file: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return "", fmt.Errorf("password file: %w", err)
	}
	if !st.Mode().IsRegular() || st.Mode().Perm()&0o077 != 0 {
		return "", fmt.Errorf("password file %s has mode %s; others may not have any right to it: chmod 600", path, st.Mode())
	}
	line, err := bufio.NewReader(io.LimitReader(f, 4096)).ReadString('\n')
	if err != nil && err != io.EOF {
		return "", fmt.Errorf("password file: %w", err)
	}
	return strings.TrimRight(line, "\r\n"), nil
}
