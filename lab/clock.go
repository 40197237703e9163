package lab

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// StartWithClock starts a command on the host whose wall clock is off, by whole
// seconds of up to 68 years: it runs ahead if off is positive. Its other clocks and
// its children's are right. It is possible on amd64 only, else the error is
// errors.ErrUnsupported.
func (h *Host) StartWithClock(cmd *exec.Cmd, cgroup string, off time.Duration) (*Process, error) {
	if runtime.GOARCH != "amd64" {
		return nil, fmt.Errorf("a clock that is off on %s: %w", runtime.GOARCH, errors.ErrUnsupported)
	}
	return h.start(cmd, h, cgroup, func(pid int) error { return setClock(pid, off) })
}

// skewed is what clock_gettime(2) becomes. It is a system call, and what it finds for
// CLOCK_REALTIME is corrected:
//
//	mov eax, 228; syscall; test edi, edi; jne out; add qword ptr [rsi], off; out: ret
func skewed(off time.Duration) []byte {
	code := []byte{0xb8, 228, 0, 0, 0, 0x0f, 0x05, 0x85, 0xff, 0x75, 0x07, 0x48, 0x81, 0x06}
	code = binary.LittleEndian.AppendUint32(code, uint32(int32(off/time.Second)))
	return append(code, 0xc3)
}

// setClock waits until a traced child has begun its program, changes how it reads the
// clock, and lets it go. The function that programs call lies in the vDSO, see
// vdso(7); a page of it that is written to is the process's own from then on. It has to
// be called by the thread that started the child.
func setClock(pid int, off time.Duration) error {
	var status unix.WaitStatus
	if _, err := unix.Wait4(pid, &status, unix.WALL, nil); err != nil {
		return fmt.Errorf("clock: %w", err)
	}
	if !status.Stopped() {
		return fmt.Errorf("clock: the program did not begin: status %#x", status)
	}
	at, err := clockFunction(pid)
	if err == nil {
		_, err = unix.PtracePokeText(pid, at, skewed(off))
	}
	if err := errors.Join(err, unix.PtraceDetach(pid)); err != nil {
		return fmt.Errorf("clock: %w", err)
	}
	return nil
}

// clockFunction returns where a process has the function that tells the time.
func clockFunction(pid int) (uintptr, error) {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(maps)) {
		if !strings.Contains(line, "[vdso]") {
			continue
		}
		var first, last uintptr
		if _, err := fmt.Sscanf(line, "%x-%x", &first, &last); err != nil {
			return 0, err
		}
		image := make([]byte, last-first)
		if _, err := unix.PtracePeekText(pid, first, image); err != nil {
			return 0, err
		}
		f, err := elf.NewFile(bytes.NewReader(image))
		if err != nil {
			return 0, err
		}
		symbols, err := f.DynamicSymbols()
		if err != nil {
			return 0, err
		}
		i := slices.IndexFunc(symbols, func(s elf.Symbol) bool { return s.Name == "__vdso_clock_gettime" })
		if i < 0 {
			return 0, errors.New("the vDSO does not tell the time")
		}
		return first + uintptr(symbols[i].Value), nil
	}
	return 0, errors.New("the process has no vDSO")
}
