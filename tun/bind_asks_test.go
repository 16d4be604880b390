package tun

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// A peer that answers no initiations is asked to begin, and is then left in peace
// for a while.
func TestUnansweredInitiations(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked []Key
		a := newAssembly(Config{SessionUnknown: func(k Key) { asked = append(asked, k) }})
		p := a.b.peers.byKey(keyA)
		a.b.peers.learn(0x77, p)
		response := wireGuard(typeResponse, 0x9999, responseSize)
		binary.LittleEndian.PutUint32(response[receiverAt:], 0x77)
		stranger := slices.Clone(response)
		binary.LittleEndian.PutUint32(stranger[receiverAt:], 0x78)
		from := netip.MustParseAddrPort("203.0.113.1:1")
		for i, c := range []struct {
			wait   time.Duration
			before []byte // arrives before the initiation
			leave  bool
			asks   bool
		}{
			{},
			{},
			{},
			{leave: true, asks: true},
			{leave: true},
			{wait: askPause - 1, leave: true},
			{wait: 1},
			{},
			{},
			{before: stranger, leave: true, asks: true},
			{before: response},
			{},
			{},
			{before: response},
			{},
			{},
			{leave: true, asks: true},
		} {
			time.Sleep(c.wait)
			if c.before != nil {
				a.arrive(from, c.before, len(c.before))
			}
			asked = nil
			if got := a.b.leave(p); got != c.leave || c.asks != slices.Equal(asked, []Key{keyA}) {
				t.Errorf("%d: left: %v, asked: %v", i, got, asked)
			}
		}
		a.b.book(response, p, 0) // ours: the peer began
		if a.b.leave(p) {
			t.Error("left although the peer began")
		}
		p.answers()
		p.trip.Store(int64(time.Second))
		for range askAfter {
			a.b.leave(p)
		}
		for _, leave := range []bool{true, true, false} {
			if got := a.b.leave(p); got != leave {
				t.Errorf("far away: left: %v", got)
			}
			time.Sleep(time.Second + askPause/2)
		}
	})
}
