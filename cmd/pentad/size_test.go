package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// maxProgram is how large the program may be, in bytes. One package that calls methods by
// a name of which the linker knows nothing, as templates do, has it keep every method of
// every type: 29 MB more, 17 MB of them resident in each agent.
const maxProgram = 60 << 20

func TestProgramIsSmall(t *testing.T) {
	if testing.Short() {
		t.Skip("it builds the program")
	}
	makefile, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(makefile), "build -trimpath -tags grpcnotrace -ldflags '$(LDFLAGS)' -o bin/pentad") {
		t.Error("the Makefile builds the program in another way than this test")
	}
	path := filepath.Join(t.TempDir(), "pentad")
	build := exec.Command("go", "build", "-trimpath", "-tags", "grpcnotrace", "-ldflags", "-s -w", "-o", path, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	s, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if s.Size() > maxProgram {
		t.Errorf("the program has %d bytes", s.Size())
	}
}
