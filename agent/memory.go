package agent

import (
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
	f, err := elf.Open("/proc/self/exe")
	if err != nil {
		return
	}
	defer f.Close()
	page := uint64(os.Getpagesize())
	for _, r := range unwritten(f, page) {
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, uintptr(r[0]), uintptr(r[1]-r[0]), unix.MADV_DONTNEED)
	}
}

// unwritten returns the pages of a program, from and to, that nobody writes to: those of
// segments that are not to be written. That a page is read-only by now says nothing: into
// those of PT_GNU_RELRO the dynamic linker has written addresses before, and one that is
// not loaded where it was linked for (PIE) has them anywhere.
func unwritten(f *elf.File, page uint64) (all [][2]uint64) {
	if f.Type != elf.ET_EXEC {
		return nil
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_LOAD || p.Flags&elf.PF_W != 0 {
			continue
		}
		from, to := (p.Vaddr+page-1)/page*page, (p.Vaddr+p.Filesz)/page*page
		if from < to {
			all = append(all, [2]uint64{from, to})
		}
	}
	return all
}
