package host_test

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/lab"
)

// lockVar makes this program one that holds the lock on the directory that it names,
// and as much memory as an agent has: the more, the longer it takes to die.
const lockVar = "PENTAD_TEST_LOCK"

func TestMain(m *testing.M) {
	dir := os.Getenv(lockVar)
	if dir == "" {
		os.Exit(m.Run())
	}
	memory := make([]byte, 24<<20)
	for i := 0; i < len(memory); i += os.Getpagesize() {
		memory[i] = 1
	}
	lock, err := host.Lock(dir)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println("locked")
	time.Sleep(time.Minute)
	lock.Close()
	os.Exit(int(memory[0]))
}

// Who comes straight after a kill -9 gets the lock, though for a moment the dying
// process has it still; one who holds it in good health is named.
func TestLockAfterKill(t *testing.T) {
	lab.Need(t)
	h, err := lab.NewHost()
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	}()
	for i := range 200 {
		holder := exec.Command("/proc/self/exe")
		holder.Env = append(os.Environ(), lockVar+"="+h.Pins)
		holder.Stderr = os.Stderr
		out, err := holder.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := holder.Start(); err != nil {
			t.Fatal(err)
		}
		if line, err := bufio.NewReader(out).ReadString('\n'); line != "locked\n" {
			t.Fatalf("the holder says %q: %v", line, err)
		}
		if i == 0 {
			var held *host.LockedError
			if _, err := host.LockWithin(t.Context(), h.Pins, time.Minute); !errors.As(err, &held) || held.PID != holder.Process.Pid {
				t.Errorf("while process %d holds the lock: %v", holder.Process.Pid, err)
			}
		}
		if err := holder.Process.Signal(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		lock, err := host.LockWithin(t.Context(), h.Pins, 5*time.Second)
		if err != nil {
			t.Errorf("kill %d: %v", i, err)
		} else {
			lock.Close()
		}
		_ = holder.Wait() // it was killed
	}
}
