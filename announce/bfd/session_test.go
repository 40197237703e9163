package bfd

import (
	"errors"
	"math/rand/v2"
	"testing"
	"time"
)

var fast = Settings{Interval: 100 * time.Millisecond, Multiplier: 3}

// wire is two ends and the packets between them, in a time of their own.
type wire struct {
	now     time.Time
	random  *rand.Rand
	ends    [2]*Session
	cut     [2]bool // what the end sends is lost
	stopped [2]bool // the end does nothing
	flight  []flying
	loss    float64
	delay   time.Duration
}

type flying struct {
	to int
	at time.Time
	p  Packet
}

func newWire(a, b Settings, seed uint64) *wire {
	w := &wire{now: time.Unix(1000, 0), random: rand.New(rand.NewPCG(seed, 1))}
	w.ends = [2]*Session{NewSession(a, 1, w.now, w.random.Float64), NewSession(b, 2, w.now, w.random.Float64)}
	return w
}

func (w *wire) send(from int, p Packet) {
	if w.cut[from] || w.random.Float64() < w.loss {
		return
	}
	parsed, err := Parse(p.Append(nil))
	if err != nil {
		panic(err)
	}
	w.flight = append(w.flight, flying{1 - from, w.now.Add(w.delay), parsed})
}

// run lets a time pass, in steps of a millisecond.
func (w *wire) run(d time.Duration) {
	for end := w.now.Add(d); w.now.Before(end); w.now = w.now.Add(time.Millisecond) {
		w.step()
	}
}

func (w *wire) step() {
	flight := w.flight
	w.flight = nil
	for _, f := range flight {
		if f.at.After(w.now) || w.stopped[f.to] {
			w.flight = append(w.flight, f)
			continue
		}
		if answer, ok := w.ends[f.to].Receive(f.p, w.now); ok {
			w.send(f.to, answer)
		}
	}
	for i, s := range w.ends {
		if w.stopped[i] {
			continue
		}
		if p, ok := s.Tick(w.now); ok {
			w.send(i, p)
		}
	}
}

// until runs until both are in a state, and returns how long it took.
func (w *wire) until(t *testing.T, want State, within time.Duration) time.Duration {
	t.Helper()
	began := w.now
	for w.now.Sub(began) < within {
		a, _ := w.ends[0].State()
		b, _ := w.ends[1].State()
		if a == want && b == want {
			return w.now.Sub(began)
		}
		w.run(time.Millisecond)
	}
	a, _ := w.ends[0].State()
	b, _ := w.ends[1].State()
	t.Fatalf("after %v one is %s and the other %s, not both %s", within, a, b, want)
	return 0
}

func TestSessionComesUp(t *testing.T) {
	w := newWire(fast, fast, 1)
	w.until(t, Up, 3*time.Second)
	w.run(2 * time.Second)
	if got := w.ends[0].Detection(); got != 300*time.Millisecond {
		t.Errorf("a silent neighbour counts as dead after %v, want 300ms", got)
	}
	if w.ends[0].polling || w.ends[1].polling {
		t.Error("a poll was never confirmed")
	}
}

func TestSessionDetects(t *testing.T) {
	for _, c := range []struct {
		name      string
		cut       [2]bool
		from, to  time.Duration
		diagnosis [2]Diagnostic
	}{
		{"both directions", [2]bool{true, true}, 200 * time.Millisecond, 301 * time.Millisecond, [2]Diagnostic{Expired, Expired}},
		{"one direction", [2]bool{true, false}, 200 * time.Millisecond, 305 * time.Millisecond, [2]Diagnostic{NeighborDown, Expired}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWire(fast, fast, 2)
			w.until(t, Up, 3*time.Second)
			w.run(time.Second)
			w.cut = c.cut
			took := w.until(t, Down, time.Second)
			if took < c.from || took > c.to {
				t.Errorf("it took %v, want %v to %v", took, c.from, c.to)
			}
			for i, s := range w.ends {
				if s.Diagnostic() != c.diagnosis[i] {
					t.Errorf("end %d says %q, want %q", i, s.Diagnostic(), c.diagnosis[i])
				}
			}
			w.cut = [2]bool{}
			w.until(t, Up, 4*time.Second)
		})
	}
}

// An end that stands still for a while comes up again, once, and stays up.
func TestSessionStandsStill(t *testing.T) {
	for _, still := range []time.Duration{400 * time.Millisecond, 5 * time.Second} {
		w := newWire(fast, fast, 3)
		w.until(t, Up, 3*time.Second)
		w.run(time.Second)
		w.stopped[0] = true
		w.run(still)
		w.stopped[0] = false
		w.run(10 * time.Millisecond)
		w.until(t, Up, 4*time.Second)
		_, since := w.ends[0].State()
		w.run(10 * time.Second)
		if state, later := w.ends[0].State(); state != Up || later != since {
			t.Errorf("after %v without moving it is %s, and it came up again at %v, after %v", still, state, later, since)
		}
	}
}

// Ends that want to be watched differently do not give each other up.
func TestSessionsThatDiffer(t *testing.T) {
	slow := Settings{Interval: 900 * time.Millisecond, Multiplier: 2}
	w := newWire(fast, slow, 4)
	w.until(t, Up, 4*time.Second)
	w.run(5 * time.Second)
	if a, b := w.ends[0].Detection(), w.ends[1].Detection(); a != 1800*time.Millisecond || b != 2700*time.Millisecond {
		t.Errorf("they count each other as dead after %v and %v, want 1.8s and 2.7s", a, b)
	}
	w.until(t, Up, time.Millisecond*2)
}

func TestSessionIsTakenDown(t *testing.T) {
	w := newWire(fast, fast, 5)
	w.until(t, Up, 3*time.Second)
	w.send(0, w.ends[0].Close(w.now))
	w.run(10 * time.Millisecond)
	if state, _ := w.ends[1].State(); state != Down || w.ends[1].Diagnostic() != NeighborDown {
		t.Errorf("the other end is %s, because %s", state, w.ends[1].Diagnostic())
	}
	if p, ok := w.ends[0].Tick(w.now.Add(time.Hour)); ok {
		t.Errorf("an end that was closed sends %+v", p)
	}
}

// Whoever wants no packets gets none but answers to polls.
func TestNeighbourWantsNothing(t *testing.T) {
	now := time.Unix(1000, 0)
	s := NewSession(fast, 1, now, func() float64 { return 1 })
	s.Receive(Packet{State: Init, Multiplier: 3, Mine: 7, Yours: 1, DesiredTx: time.Second, RequiredRx: time.Second}, now)
	s.Receive(Packet{State: Up, Final: true, Multiplier: 3, Mine: 7, Yours: 1, DesiredTx: time.Second, RequiredRx: 0}, now)
	for range 100 {
		now = now.Add(20 * time.Millisecond)
		if p, ok := s.Tick(now); ok {
			t.Fatalf("%+v is sent to who wants nothing", p)
		}
	}
	if a, ok := s.Receive(Packet{State: Up, Poll: true, Multiplier: 3, Mine: 7, Yours: 1, DesiredTx: time.Second, RequiredRx: 0}, now); !ok || !a.Final || a.Poll {
		t.Errorf("a poll is answered by %+v, %v", a, ok)
	}
}

// One who wanted no packets, and is silent since, is spoken to again: whoever is there now
// may wait for that.
func TestNeighbourIsGoneThatWantedNothing(t *testing.T) {
	for _, state := range []State{AdminDown, Down} {
		now := time.Unix(1000, 0)
		s := NewSession(fast, 1, now, func() float64 { return 1 })
		s.Receive(Packet{State: state, Multiplier: 3, Mine: 7, DesiredTx: time.Second}, now)
		sent := 0
		for range 100 {
			now = now.Add(100 * time.Millisecond)
			if _, ok := s.Tick(now); ok {
				sent++
			}
		}
		if sent < 5 {
			t.Errorf("after %s it was sent %d packets in ten seconds", state, sent)
		}
	}
}

// Over a bad wire, with ends that stand still: once all is well again both are up within
// seconds, and then nothing ever changes.
func TestSessionsOverABadWire(t *testing.T) {
	for seed := range uint64(60) {
		r := rand.New(rand.NewPCG(seed, 7))
		any := func() Settings {
			return Settings{Interval: time.Duration(20+r.IntN(500)) * time.Millisecond, Multiplier: uint8(1 + r.IntN(5))}
		}
		w := newWire(any(), any(), seed)
		w.delay = time.Duration(r.IntN(10)) * time.Millisecond
		for range 10 {
			w.loss = float64(r.IntN(4)) / 4
			w.stopped = [2]bool{r.IntN(4) == 0, r.IntN(4) == 0}
			w.cut = [2]bool{r.IntN(4) == 0, r.IntN(4) == 0}
			w.run(time.Duration(r.IntN(2000)) * time.Millisecond)
		}
		w.loss, w.stopped, w.cut = 0, [2]bool{}, [2]bool{}
		w.run(20 * time.Second)
		w.until(t, Up, 10*time.Second)
		_, since := w.ends[1].State()
		w.run(10 * time.Second)
		// With a multiplier of 1 a packet that is on its way for a while is late.
		tolerant := w.ends[0].settings.Multiplier > 1 && w.ends[1].settings.Multiplier > 1
		if state, later := w.ends[1].State(); tolerant && (state != Up || later != since) {
			t.Fatalf("seed %d: it does not stay up: %s since %v, before since %v", seed, state, later, since)
		}
	}
}

func TestMalformedPackets(t *testing.T) {
	good := Packet{State: Up, Multiplier: 3, Mine: 1, Yours: 2, DesiredTx: time.Second, RequiredRx: time.Second}
	change := func(f func(b []byte)) []byte {
		b := good.Append(nil)
		f(b)
		return b
	}
	for name, b := range map[string][]byte{
		"empty":             nil,
		"short":             good.Append(nil)[:23],
		"version 0":         change(func(b []byte) { b[0] = 0 }),
		"version 2":         change(func(b []byte) { b[0] = 2 << 5 }),
		"multiplier 0":      change(func(b []byte) { b[2] = 0 }),
		"length too short":  change(func(b []byte) { b[3] = 23 }),
		"length too long":   change(func(b []byte) { b[3] = 25 }),
		"authenticated":     change(func(b []byte) { b[1] |= bitAuth }),
		"multipoint":        change(func(b []byte) { b[1] |= bitMultipoint }),
		"no discriminator":  change(func(b []byte) { clear(b[4:8]) }),
		"up for no session": change(func(b []byte) { clear(b[8:12]) }),
		"poll and final":    change(func(b []byte) { b[1] |= bitPoll | bitFinal }),
	} {
		if p, err := Parse(b); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %+v, %v", name, p, err)
		}
	}
	if p, err := Parse(good.Append(nil)); err != nil || p != good {
		t.Errorf("%+v comes back as %+v, %v", good, p, err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(Packet{State: Init, Multiplier: 3, Mine: 1, Yours: 2, Poll: true}.Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := Parse(b)
		if err != nil {
			return
		}
		again, err := Parse(p.Append(nil))
		if err != nil || again != p {
			t.Fatalf("%+v comes back as %+v, %v", p, again, err)
		}
		now := time.Unix(1000, 0)
		s := NewSession(fast, 1, now, func() float64 { return 0.5 })
		s.Receive(p, now)
		s.Receive(p, now)
		for range 10 {
			s.Tick(now)
			now = now.Add(time.Second)
		}
	})
}
