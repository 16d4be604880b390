package overlay

import (
	"log/slog"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"overlay/coord"
	"overlay/coord/trust"
	"overlay/punch"
	"overlay/tun"
)

func newTestControl(t *testing.T) *control {
	return &control{
		device:     newKey(t),
		candidates: func() []punch.Candidate { return nil },
		takes:      func() tun.Capabilities { return tun.Large },
		log:        slog.New(slog.DiscardHandler),
		stale:      make(chan struct{}, 1),
		outbox:     make(chan coord.Report, outboxSize),
	}
}

func serialOf(t *testing.T, c *control) uint64 {
	t.Helper()
	p := must[*coord.Publish](t)(c.record())
	return must[trust.Record](t)(trust.OpenRecord(p.Record)).Serial
}

// Peers keep the record with the highest serial, so one from a clock that was
// years ahead must not silence the device once the clock is right.
func TestRecordSerialSurvivesAClockSetBack(t *testing.T) {
	m := newTestMesh(t)
	self := m.node("alice", m.signer)
	ahead := uint64(time.Now().AddDate(10, 0, 0).UnixMilli())
	open := func(dir string) *session {
		return &session{
			store: store{dir}, roster: m.roster(self), control: newTestControl(t),
			endpoints: newEndpoints(nil, nil, nil, slog.Default()), log: slog.New(slog.DiscardHandler),
		}
	}
	dir := t.TempDir()
	before := open(dir)
	before.control.resumeSerial(ahead)
	last := serialOf(t, before.control)
	if last <= ahead {
		t.Fatalf("serial %d after %d", last, ahead)
	}
	before.saveCache()

	after := open(dir)
	if _, ok := after.readCache(); !ok {
		t.Fatal("the serial alone was not worth a cache")
	}
	got := []uint64{serialOf(t, after.control), serialOf(t, after.control)}
	if got[0] <= last || got[1] <= got[0] {
		t.Fatalf("serials %v after %d, want rising ones", got, last)
	}
}

// A cache that could not be written is written when there is space again.
func TestCacheIsTriedAgain(t *testing.T) {
	m := newTestMesh(t)
	s := &session{
		store: store{filepath.Join(t.TempDir(), "state")}, roster: m.roster(m.node("alice", m.signer)), control: newTestControl(t),
		endpoints: newEndpoints(nil, nil, nil, slog.Default()), log: slog.New(slog.DiscardHandler), dirty: true,
	}
	s.saveCache()
	if err := s.store.open(); err != nil {
		t.Fatal(err)
	}
	s.saveCache()
	if _, ok := s.readCache(); !ok {
		t.Fatal("nothing was written")
	}
}

func TestRecordSerialIsTheTime(t *testing.T) {
	c := newTestControl(t)
	start := uint64(time.Now().UnixMilli())
	if got := serialOf(t, c); got < start || got > uint64(time.Now().UnixMilli()) {
		t.Fatalf("serial %d is not the time, %d", got, start)
	}
}

func TestRecordSaysWhatTheNodeTakes(t *testing.T) {
	c := newTestControl(t)
	for _, takes := range []tun.Capabilities{tun.Large, 0} {
		c.takes = func() tun.Capabilities { return takes }
		p := must[*coord.Publish](t)(c.record())
		if got := must[trust.Record](t)(trust.OpenRecord(p.Record)).Capabilities; got != uint16(takes) {
			t.Fatalf("capabilities %b, want %b", got, takes)
		}
	}
}

// Signals are dropped when the connection is slow; the record never is.
func TestFullOutboxKeepsTheRecord(t *testing.T) {
	c := newTestControl(t)
	c.stream = new(coord.Stream)
	var refused []int
	for i := range outboxSize + 2 {
		if c.signal(trust.Key{1}, nil) != nil {
			refused = append(refused, i)
		}
	}
	if want := []int{outboxSize, outboxSize + 1}; !slices.Equal(refused, want) {
		t.Fatalf("refused %v, want %v", refused, want)
	}
	c.publish()
	c.publish()
	if len(c.stale) != 1 {
		t.Fatal("the record is not to be published")
	}
}
