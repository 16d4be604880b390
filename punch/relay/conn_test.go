package relay

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sync/errgroup"
)

// pipe is a framed connection and the other end of it.
func pipe(t *testing.T) (f *framed, far net.Conn, wait func()) {
	near, far := net.Pipe()
	var group errgroup.Group
	f = newFramed(near, &group, new(blocks), slog.New(slog.DiscardHandler))
	return f, far, func() {
		f.close()
		if err := errors.Join(group.Wait(), far.Close()); err != nil {
			t.Error(err)
		}
	}
}

// pieces reads a stream in pieces of random sizes.
type pieces struct {
	net.Conn
	stream []byte
	rng    *rand.Rand
}

func (p *pieces) Read(b []byte) (int, error) {
	if len(p.stream) == 0 {
		return 0, io.EOF
	}
	n := copy(b, p.stream[:min(len(p.stream), 1+p.rng.IntN(3000))])
	p.stream = p.stream[n:]
	return n, nil
}

func TestReadKeepsOrder(t *testing.T) {
	for seed := range uint64(50) {
		rng := rand.New(rand.NewPCG(seed, 1))
		var want []byte
		for range 300 {
			d := make([]byte, 1+rng.IntN(1500))
			if rng.IntN(50) == 0 {
				d = make([]byte, MaxFrame)
			}
			d[0] = []byte{FlowByte, FlowByte, FlowByte, ControlByte, 0x33}[rng.IntN(5)]
			d[len(d)-1] = max(d[len(d)-1], byte(rng.IntN(256)))
			want = appendFrame(want, d)
		}
		f := &framed{conn: &pieces{stream: want, rng: rng}, lender: new(blocks)}
		var got []byte
		err := f.read(func(run []byte) error {
			first := run[framePrefix]
			frames := 0
			for rest := run; len(rest) > 0; frames++ {
				d, r, ok := cutFrame(rest)
				if !ok || d[0] != first {
					t.Fatalf("seed %d: a run that begins with %#x has a frame of %#x", seed, first, d[:1])
				}
				rest = r
			}
			if first != FlowByte && frames != 1 {
				t.Fatalf("seed %d: %d frames of %#x at once", seed, frames, first)
			}
			got = append(got, run...)
			return nil
		})
		if !errors.Is(err, io.EOF) || !bytes.Equal(got, want) {
			t.Fatalf("seed %d: %d bytes came, not %d, then %v", seed, len(got), len(want), err)
		}
	}
}

// TestReadDoesNotWait: a frame is handed on when it is there, also when it is
// followed by half of another.
func TestReadDoesNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, far, wait := pipe(t)
		var got []int
		go func() {
			_ = f.read(func(run []byte) error { got = append(got, numbers(t, run)...); return nil })
		}()
		two := append(numbered(1, 30), numbered(2, 30)...)
		for _, cut := range [][2]int{{0, 1}, {1, 2}, {2, 31}, {31, 32}, {32, 33}, {33, 50}, {50, 64}} {
			if _, err := far.Write(two[cut[0]:cut[1]]); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			if want := cut[1] / 32; len(got) != want {
				t.Errorf("after %d bytes %d frames were handed on, not %d", cut[1], len(got), want)
			}
		}
		wait()
	})
}

func TestReadRefuses(t *testing.T) {
	for name, b := range map[string][]byte{
		"empty frame":    {0, 0},
		"too long":       {0xff, 0xff, FlowByte},
		"after a frame":  append(numbered(1, 40), 0, 0),
		"after and long": append(numbered(1, 40), 0xff, 0xff),
	} {
		f := &framed{conn: &pieces{stream: b, rng: rand.New(rand.NewPCG(1, 1))}, lender: new(blocks)}
		if err := f.read(func([]byte) error { return nil }); !errors.Is(err, errFrame) {
			t.Errorf("%s: %v, want %v", name, err, errFrame)
		}
	}
}

// TestWriterRests: what is offered is written, control first, and then no
// goroutine and no memory is left.
func TestWriterRests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, far, wait := pipe(t)
		f.offer(numbered(1, 100))
		synctest.Wait() // the writer hangs in it
		f.offer(numbered(2, 100))
		f.offerTrain(numbered(3, 100)[framePrefix:], 100)
		f.control([]byte{ControlByte, 7})
		var want []byte
		for _, b := range [][]byte{numbered(1, 100), {0, 2, ControlByte, 7}, numbered(2, 100), numbered(3, 100)} {
			want = append(want, b...)
		}
		got := make([]byte, len(want))
		if _, err := io.ReadFull(far, got); err != nil || !bytes.Equal(got, want) {
			t.Errorf("written: % x (%v), want % x", got, err, want)
		}
		synctest.Wait()
		f.mu.Lock()
		if f.writing || f.urgent != nil || f.queue.blocks != nil {
			t.Error("the writer has not ended")
		}
		f.mu.Unlock()
		wait()
	})
}

// TestWriteDeadline: a connection that takes nothing ends, and what is offered to
// it never waits.
func TestWriteDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, _, wait := pipe(t)
		start := time.Now()
		for i := range 1000 {
			f.offer(numbered(i, 1440))
			f.control(make([]byte, 100))
		}
		if time.Since(start) != 0 {
			t.Error("an offer waited")
		}
		f.mu.Lock()
		if f.queue.size > maxQueued || len(f.urgent) > maxUrgent {
			t.Errorf("%d and %d bytes wait", f.queue.size, len(f.urgent))
		}
		f.mu.Unlock()
		time.Sleep(writeDeadline + time.Second)
		f.mu.Lock()
		if !f.ended || f.queue.blocks != nil {
			t.Error("a dead connection goes on")
		}
		f.mu.Unlock()
		f.offer(numbered(1, 100)) // has no effect
		wait()
	})
}

// TestSlowConnection: one that takes a little now and then goes on.
func TestSlowConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, far, wait := pipe(t)
		for i := range 40 {
			f.offer(numbered(i, 1440))
		}
		b := make([]byte, writePiece)
		for range 3 {
			time.Sleep(writeDeadline - time.Second)
			if _, err := io.ReadFull(far, b); err != nil {
				t.Fatal(err)
			}
		}
		wait()
	})
}

func FuzzCutRun(f *testing.F) {
	f.Add(numbered(1, 40))
	f.Add(append(numbered(1, 40), 0, 1, ControlByte, 0, 3, FlowByte))
	f.Add([]byte{0, 0})
	f.Add([]byte{0xff, 0xff, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		run, err := cutRun(b)
		if err != nil {
			if len(run) != 0 {
				t.Fatal("frames and an error")
			}
			return
		}
		if !bytes.Equal(run, b[:len(run)]) {
			t.Fatal("a run is not the beginning")
		}
		var first []byte
		for rest := run; len(rest) > 0; {
			d, r, ok := cutFrame(rest)
			if !ok {
				t.Fatal("a run has a frame that is none")
			}
			first = append(first, d[0])
			rest = r
		}
		if len(first) > 1 && slices.ContainsFunc(first, func(c byte) bool { return c != FlowByte }) {
			t.Fatalf("a run of frames that begin with % x", first)
		}
		if _, _, ok := cutFrame(b); ok && len(run) == 0 {
			t.Fatal("a whole frame was not found")
		}
	})
}
