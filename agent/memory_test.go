package agent

import (
	"debug/elf"
	"testing"
)

// Of a program that is linked dynamically the page with the addresses that its linker has
// written stays, though it is read-only by then: without it the next function of the C
// library that is called for the first time is at 0.
func TestForgetProgram(t *testing.T) {
	const page = 4096
	load := func(flags elf.ProgFlag, from, size uint64) *elf.Prog {
		return &elf.Prog{ProgHeader: elf.ProgHeader{Type: elf.PT_LOAD, Flags: flags, Vaddr: from, Filesz: size, Memsz: size}}
	}
	f := &elf.File{Progs: []*elf.Prog{
		load(elf.PF_R, 0x400000, 0x1728),
		load(elf.PF_R|elf.PF_X, 0x402000, 0x2ea46e9),
		load(elf.PF_R, 0x32a7000, 0x1f35b08),
		load(elf.PF_R|elf.PF_W, 0x51ddbd0, 0x177991),
		{ProgHeader: elf.ProgHeader{Type: elf.PT_GNU_RELRO, Flags: elf.PF_R, Vaddr: 0x51ddbd0, Filesz: 0x430, Memsz: 0x430}},
	}}
	f.Type = elf.ET_EXEC
	got := unwritten(f, page)
	want := [][2]uint64{{0x400000, 0x401000}, {0x402000, 0x32a6000}, {0x32a7000, 0x51dc000}}
	if len(got) != len(want) {
		t.Fatalf("%x, want %x", got, want)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("%x, want %x", got[i], want[i])
		}
	}
	f.Type = elf.ET_DYN
	if got := unwritten(f, page); got != nil {
		t.Errorf("of one that may be anywhere: %x", got)
	}
	forgetProgram() // this test goes on
}
