package config

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestRead(t *testing.T) {
	dir := t.TempDir()
	fifo, big, good := filepath.Join(dir, "fifo"), filepath.Join(dir, "big"), filepath.Join(dir, "good")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(good, []byte("services: []\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(big)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(MaxSize + 1); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{fifo, dir, "/dev/zero"} {
		if _, err := Read(path); !errors.Is(err, ErrNotFile) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if _, err := Read(big); err == nil || !strings.Contains(err.Error(), "longer than 64 MiB") {
		t.Errorf("a file that is too long: %v", err)
	}
	if data, err := Read(good); err != nil || string(data) != "services: []\n" {
		t.Errorf("%q, %v", data, err)
	}
	if _, err := Read(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

// A short text cannot stand for more than a host has memory for.
func TestAliases(t *testing.T) {
	bomb := "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
	for c := 'b'; c < 'k'; c++ {
		bomb += string(c) + ": &" + string(c) + " [" + strings.Repeat("*"+string(c-1)+", ", 10) + "]\n"
	}
	if _, err := Parse("x", []byte(bomb+"services: []\n")); err == nil || !strings.Contains(err.Error(), "aliases make") {
		t.Errorf("a bomb: %v", err)
	}
	if _, err := Parse("x", []byte("services: &s [*s]\n")); err == nil || !strings.Contains(err.Error(), "stands within") {
		t.Errorf("an alias of itself: %v", err)
	}
	shared := "services:\n- {name: a, listen: [192.0.2.1:1], backends: &b [10.0.0.1:1, 10.0.0.2:1]}\n" +
		"- {name: b, listen: [192.0.2.1:2], backends: *b}\n"
	if c, err := Parse("x", []byte(shared)); err != nil || len(c.Services[1].Backends) != 2 {
		t.Errorf("an honest alias: %v", err)
	}
}
