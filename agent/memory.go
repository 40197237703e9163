package agent

import (
	"bufio"
	"debug/elf"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/host"
)

// memoryLimit returns how much memory the cgroups of this process let it have, in
// bytes; 0: as much as there is, or it is not known.
func memoryLimit() uint64 {
	raw, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return 0
	}
	least := uint64(0)
	// "4:memory:/PATH" of cgroup v1 and "0::/PATH" of v2, see cgroups(7).
	for line := range strings.Lines(string(raw)) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(fields) < 3 {
			continue
		}
		root, file := "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
		if fields[1] == "" {
			file = "memory.max"
			if root, err = host.CgroupRoot(); err != nil {
				continue
			}
		} else if fields[1] != "memory" {
			continue
		}
		for dir := fields[2]; ; dir = filepath.Dir(dir) {
			limit := readLimit(filepath.Join(root, dir, file))
			if limit > 0 && (least == 0 || limit < least) {
				least = limit
			}
			if dir == "/" || dir == "." {
				break
			}
		}
	}
	return least
}

// noLimit is from where on a limit of cgroup v1 means none: it is the largest number
// of pages then.
const noLimit = 1 << 60

func readLimit(path string) uint64 {
	raw, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(raw)), 10, 64)
	if err != nil || n >= noLimit {
		return 0 // "max"
	}
	return n
}

// giveBack returns what start-up and parsing have left behind to the host, without
// anybody waiting for it: an agent should be small.
func (a *Agent) giveBack() {
	a.tasks.Go(func() {
		debug.FreeOSMemory()
		forgetProgram()
	})
}

// forgetProgram lets go of the pages of the program itself that this process has
// looked at. The client of Kubernetes alone is tens of megabytes of code and tables,
// of which most is read once, while it starts; what is needed again comes back from
// the page cache by itself, because nobody has written to it (madvise(2),
// MADV_DONTNEED). An error means that they stay.
func forgetProgram() {
	program, err := os.Readlink("/proc/self/exe")
	if err != nil || !isFixed(program) {
		return
	}
	f, err := os.Open("/proc/self/maps")
	if err != nil {
		return
	}
	defer f.Close()
	// "00400000-02447000 r-xp 00000000 fe:00 1234  /usr/local/bin/pentad", see proc_pid_maps(5).
	for lines := bufio.NewScanner(f); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) < 6 || fields[5] != program || strings.Contains(fields[1], "w") {
			continue
		}
		from, to, _ := strings.Cut(fields[0], "-")
		first, err1 := strconv.ParseUint(from, 16, 64)
		last, err2 := strconv.ParseUint(to, 16, 64)
		if err1 != nil || err2 != nil || last <= first {
			return
		}
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, uintptr(first), uintptr(last-first), unix.MADV_DONTNEED)
	}
}

// isFixed reports whether a program is loaded where it was linked for. One that is not
// (PIE) has had addresses written into pages that are read-only later: those would be
// lost.
func isFixed(program string) bool {
	f, err := elf.Open(program)
	if err != nil {
		return false
	}
	defer f.Close()
	return f.Type == elf.ET_EXEC
}
