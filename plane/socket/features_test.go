package socket

import (
	"errors"
	"testing"

	"github.com/cilium/ebpf"
)

// A missing feature is named with the kernel that has it; a test that cannot be
// made is no reason to refuse.
func TestCheckFeatures(t *testing.T) {
	have := Feature{"one", "5.1", "nothing", func() error { return nil }}
	lack := Feature{"two", "5.2", "something", func() error { return ebpf.ErrNotSupported }}
	unknown := Feature{"three", "5.3", "nothing", func() error { return errors.New("no permission") }}
	if err := checkFeatures([]Feature{have, unknown}); err != nil {
		t.Errorf("nothing is missing, but: %v", err)
	}
	want := "this kernel lacks two (something): Linux 5.2 or newer has it"
	if err := checkFeatures([]Feature{have, lack, unknown}); err == nil || err.Error() != want {
		t.Errorf("have %v, want %s", err, want)
	}
}
