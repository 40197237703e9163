package drops

import (
	"errors"
	"net/netip"
	"testing"
)

// Reasons are read of the kernel: what we say of them has to be of reasons that there are.
func TestReasons(t *testing.T) {
	reasons, err := readReasons()
	if errors.Is(err, ErrNotSupported) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	known := make(map[string]bool)
	for _, name := range reasons {
		known[name] = true
	}
	for _, name := range []string{"no_socket", "netfilter_drop", "consumed"} {
		if !known[name] {
			t.Errorf("%s is no reason of %v", name, reasons)
		}
	}
	// Kernels differ by a few names: most are of every one.
	var strange []string
	for name := range words {
		if !known[name] {
			strange = append(strange, name)
		}
	}
	if len(strange) > len(words)/4 {
		t.Errorf("this kernel knows no %v", strange)
	}
	c := Counter{reasons: reasons}
	if name := c.name(3<<16 | 7); name != "reason 7 of subsystem 3" {
		t.Errorf("one of a subsystem is %q", name)
	}
}

func TestAddresses(t *testing.T) {
	for _, text := range []string{"192.0.2.1", "2001:db8::1:2", "::"} {
		a := netip.MustParseAddr(text)
		raw := toKernel(a)
		var k kernelAddress
		for i := range k.Word {
			k.Word[i] = uint32(raw[4*i]) | uint32(raw[4*i+1])<<8 | uint32(raw[4*i+2])<<16 | uint32(raw[4*i+3])<<24
		}
		if got := fromKernel(k); got != a {
			t.Errorf("%s comes back as %s", a, got)
		}
	}
	if bootTime().IsZero() {
		t.Error("there is no time of the start")
	}
}
