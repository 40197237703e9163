package main

import (
	"bufio"
	"io"
	"sync"
	"time"
)

// lateEvery is how long what is written waits for more.
const lateEvery = 20 * time.Millisecond

// lateWriter writes together what comes within a moment: a system call a line is most of
// what many lines cost.
type lateWriter struct {
	mu      sync.Mutex
	buffer  *bufio.Writer
	waiting bool
}

func newLateWriter(to io.Writer) *lateWriter {
	return &lateWriter{buffer: bufio.NewWriterSize(to, 64<<10)}
}

// Write implements io.Writer. An error is that of an earlier Write, perhaps.
func (w *lateWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.waiting {
		w.waiting = true
		time.AfterFunc(lateEvery, func() { _ = w.Flush() }) // the next Write returns the error
	}
	return w.buffer.Write(p)
}

// Flush writes what waits.
func (w *lateWriter) Flush() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.waiting = false
	return w.buffer.Flush()
}
