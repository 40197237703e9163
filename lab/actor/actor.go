// Package actor is the helper programs of tests, the demo and the benchmarks: servers
// and clients that are processes of a lab host. A program that has roles is started once
// more, from itself, in one of them; those that several need are here.
package actor

import (
	"fmt"
	"os"
	"os/exec"
)

// Role is one thing that a program can be started as.
type Role func(args []string) error

// roleVar is the variable of the environment that names the role of a process.
const roleVar = "PENTAD_ROLE"

// shared are the roles that every program has.
var shared = map[string]Role{"who": who, "storm": storm}

// Main plays the role in which this process was started, and ends with it. In a process
// that has none it returns.
func Main(roles map[string]Role) {
	name := os.Getenv(roleVar)
	if name == "" {
		return
	}
	role := find(roles, name)
	if role == nil {
		fmt.Fprintln(os.Stderr, "no role", name)
		os.Exit(1)
	}
	play(role, os.Args[1:])
}

// MainByArgument plays the role that the first argument names, and ends with it. Where it
// names none it returns. It is for programs that are started by others than Command.
func MainByArgument(roles map[string]Role) {
	if len(os.Args) < 2 {
		return
	}
	if role := find(roles, os.Args[1]); role != nil {
		play(role, os.Args[2:])
	}
}

func find(roles map[string]Role, name string) Role {
	if role := roles[name]; role != nil {
		return role
	}
	return shared[name]
}

func play(role Role, args []string) {
	if err := role(args); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// Command returns a command that is this program in a role.
func Command(role string, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), roleVar+"="+role)
	return cmd
}
