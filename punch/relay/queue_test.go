package relay

import (
	"bytes"
	"encoding/binary"
	"sync/atomic"
	"testing"
)

// numbered is a flow frame of a size that carries a number.
func numbered(number, size int) []byte {
	d := make([]byte, size)
	copy(d, Header{FlowByte, 1, 2, 3}.bytes())
	binary.BigEndian.PutUint32(d[headerSize:], uint32(number))
	return appendFrame(nil, d)
}

func (h Header) bytes() []byte { return h[:] }

// numbers are those of the frames of a run.
func numbers(t *testing.T, run []byte) (all []int) {
	t.Helper()
	for len(run) > 0 {
		d, rest, ok := cutFrame(run)
		if !ok {
			t.Fatalf("%d bytes are no frame", len(run))
		}
		all = append(all, int(binary.BigEndian.Uint32(d[headerSize:])))
		run = rest
	}
	return all
}

func drainQueue(t *testing.T, q *queue) (all []int) {
	t.Helper()
	for b := q.take(); b != nil; b = q.take() {
		all = append(all, numbers(t, b.bytes())...)
		q.lender.giveBack(b)
	}
	if q.size != 0 || q.blocks != nil {
		t.Fatalf("empty queue of %d bytes in %d blocks", q.size, len(q.blocks))
	}
	return all
}

func TestQueueKeepsNewest(t *testing.T) {
	for _, size := range []int{headerSize + 4, 100, 1440, MaxFrame} {
		var count atomic.Uint64
		q := queue{lender: new(blocks), dropped: &count}
		const rounds, batch = 2000, 7
		for i := range rounds {
			var run []byte
			for j := range batch {
				run = append(run, numbered(i*batch+j, size)...)
			}
			q.put(run)
			if q.size > maxQueued {
				t.Fatalf("%d bytes are queued", q.size)
			}
			if n := len(q.blocks); n > maxQueued/(blockSize-MaxFrame-framePrefix)+2 {
				t.Fatalf("%d blocks are held", n)
			}
		}
		dropped := int(count.Load())
		got := drainQueue(t, &q)
		if len(got)+dropped != rounds*batch {
			t.Errorf("size %d: %d frames left and %d dropped of %d", size, len(got), dropped, rounds*batch)
		}
		if least := min(rounds*batch, maxQueued/(size+framePrefix)); len(got) != least {
			t.Errorf("size %d: %d frames are left, not %d", size, len(got), least)
		}
		for i, n := range got {
			if n != dropped+i {
				t.Fatalf("size %d: frame %d is number %d, after %d dropped", size, i, n, dropped)
			}
		}
	}
}

func TestQueueCutsTrains(t *testing.T) {
	for _, last := range []int{0, 1, 50, 100} {
		q := queue{lender: new(blocks)}
		var train, want []byte
		for i := range 200 {
			d := bytes.Repeat([]byte{byte(i)}, 100)
			if i == 199 {
				d = d[:last]
			}
			if train = append(train, d...); len(d) > 0 {
				want = appendFrame(want, d)
			}
		}
		q.putTrain(train, 100)
		var got []byte
		for b := q.take(); b != nil; b = q.take() {
			got = append(got, b.bytes()...)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("last of %d: the train became %d bytes of frames, not %d", last, len(got), len(want))
		}
	}
	q := queue{lender: new(blocks)}
	q.putTrain(make([]byte, 3*MaxFrame), MaxFrame+1)
	q.putTrain(make([]byte, 10), 0)
	if q.take() != nil {
		t.Error("datagrams that are no frame were queued")
	}
}

func TestQueueStopsAtDamage(t *testing.T) {
	whole := numbered(7, 40)
	for name, tail := range map[string][]byte{
		"half a prefix": {0},
		"half a frame":  numbered(8, 40)[:20],
		"empty":         {0, 0, 1, 2},
		"too long":      appendFrame(nil, make([]byte, MaxFrame+1)),
	} {
		q := queue{lender: new(blocks)}
		q.put(append(bytes.Clone(whole), tail...))
		if got := drainQueue(t, &q); len(got) != 1 || got[0] != 7 {
			t.Errorf("%s: frames %v are queued, not the whole one", name, got)
		}
	}
}

func TestQueueAllocatesNothing(t *testing.T) {
	q := queue{lender: new(blocks)}
	var run []byte
	for i := range 40 {
		run = append(run, numbered(i, 1440)...)
	}
	pass := func() {
		q.put(run)
		for b := q.take(); b != nil; b = q.take() {
			q.lender.giveBack(b)
		}
	}
	pass()
	if n := testing.AllocsPerRun(100, pass); n > 1 { // the list of blocks, once it was empty
		t.Errorf("%.1f allocations a run", n)
	}
}
