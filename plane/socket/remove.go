package socket

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// planeDir is this plane's part of the pin directory.
const planeDir = "socket"

// Remove takes everything of this plane out of the kernel. It may be called in
// any state, also when there is nothing.
func Remove(pins string) error {
	dir := filepath.Join(pins, planeDir)
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	err := errors.Join(detachAll(dir), removeOtherSets(dir, -1), os.RemoveAll(dir))
	if err != nil {
		return fmt.Errorf("pins under %s: %w", dir, err)
	}
	return nil
}
