package lab

import (
	"os"
	"os/exec"
	"testing"
)

// Need skips a test that cannot have a lab host or one of the programs, and says
// why. In CI a skip would hide that nothing was tested: there it is a failure.
func Need(t testing.TB, programs ...string) {
	t.Helper()
	missing := ""
	if os.Geteuid() != 0 {
		missing = "root"
	}
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			missing = "the program " + p
		}
	}
	switch {
	case missing == "":
	case os.Getenv("CI") != "":
		t.Fatalf("this test needs %s", missing)
	default:
		t.Skipf("this test needs %s; `sudo make test` installs and has all", missing)
	}
}
