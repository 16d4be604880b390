package relay

import (
	"bytes"
	"net/netip"
	"slices"
	"testing"
	"time"
	"unsafe"

	"overlay/punch"
)

// forge is what somebody on the way can make of an answer without the keys.
func forge(answer []byte) (all [][]byte) {
	seq := sequence(answer[headSize:])
	var other session
	return [][]byte{
		(&challenge{seq, cookie{1, 2, 3}}).build(),
		(&challenge{newSequence(7, 1<<40), cookie{1}}).build(),
		(&refused{refusedStranger, seq}).build(&other),
		(&refused{refusedFull, seq}).build(&other)[:refusedSize-1],
		(&pong{seq, netip.MustParseAddrPort("203.0.113.66:1")}).build(&other),
		(&opened{seq, 1, 0}).build(&other),
	}
}

// TestForged: somebody sees all datagrams, and answers faster than the relay.
func TestForged(t *testing.T) {
	synced(t, func(w *world) {
		w.mangle = func(b []byte) [][]byte { return append(forge(b), b) }
		w.client.SetPeers([]punch.Key{{5}})
		w.after(time.Second)
		w.wantStates("udp")
		w.after(10 * time.Minute)
		w.wantStates("udp")
		w.carries()
		if w.last.Observed != w.node || w.last.Err != nil || w.dials != 0 {
			t.Errorf("after %d connections: %+v", w.dials, w.last)
		}
		if len(w.peers) != 1 {
			t.Errorf("peers %q", w.peers)
		}
		if n := w.count(kindAdmit); n > 240 {
			t.Errorf("%d ADMITs in ten minutes", n)
		}
	})
}

// TestReplayed: every answer comes again and again, later.
func TestReplayed(t *testing.T) {
	synced(t, func(w *world) {
		var old [][]byte
		w.mangle = func(b []byte) [][]byte {
			old = append(old, b)
			return append([][]byte{b}, old...)
		}
		w.after(time.Second)
		w.mangle = nil
		w.udp = false
		w.client.Doubt()
		for range 400 {
			w.after(10 * time.Millisecond)
			for _, b := range old {
				if kindOf(b) != kindChallenge && w.client.Receive(b, w.addrs[0]) {
					t.Fatal("an old answer was taken")
				}
			}
		}
		w.wantStates("udp", "tls")
	})
}

// TestOthersAnswers: what is not an answer of our relay is not ours.
func TestOthersAnswers(t *testing.T) {
	synced(t, func(w *world) {
		var answers [][]byte
		w.mangle = func(b []byte) [][]byte { answers = append(answers, slices.Clone(b)); return nil }
		w.after(400 * time.Millisecond)
		if len(answers) == 0 {
			t.Fatal("no answers")
		}
		before := len(w.sent)
		for _, b := range answers {
			if w.client.Receive(b, netip.MustParseAddrPort("192.0.2.66:3478")) {
				t.Error("an answer from elsewhere was taken")
			}
			if b[headSize+15]++; w.client.Receive(b[:len(b)-1], w.addrs[0]) {
				t.Error("half an answer was taken")
			}
		}
		w.after(time.Millisecond)
		if len(w.sent) != before {
			t.Error("it was answered")
		}
	})
}

// FuzzReceive: without the keys nobody gets the client up or down.
func FuzzReceive(f *testing.F) {
	for _, b := range forge(make([]byte, challengeSize)) {
		f.Add(b)
	}
	private, public, device := relayKey(1), punch.Key{}, make([]byte, 64)
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := NewClient(ClientConfig{
			Relay: relayKey(99), PrivateKey: private, Device: device, Credentials: credentialsOf(public, device), Boot: 7,
		})
		if err != nil {
			t.Fatal(err)
		}
		relay := netip.MustParseAddrPort("192.0.2.1:3478")
		c.addrs, c.now = []netip.AddrPort{relay}, time.Now()
		c.hello()
		if len(b) >= headSize+sequenceSize { // it has seen the request
			seq := newSequence(7, 1)
			b = slices.Clone(b)
			copy(b[headSize:], seq[:])
		}
		before := bytes.Clone(b)
		c.answer(b, relay, nil)
		if c.active != None || c.udp.admitted || c.udp.observed.IsValid() || c.udp.refusals > 0 {
			t.Fatal("it was believed")
		}
		if len(c.actions) > 2 {
			t.Fatalf("%d datagrams for one", len(c.actions)-1)
		}
		if !bytes.Equal(b, before) {
			t.Fatal("the datagram was changed")
		}
	})
}

// TestClockSetBack: a node goes on asking to be admitted when the clock is set
// back.
func TestClockSetBack(t *testing.T) {
	private, public, device := nodeKeys(t, 1)
	c, err := NewClient(ClientConfig{
		Relay: punch.Key{9}, PrivateKey: private, Device: device, Credentials: credentialsOf(public, device), Boot: 1,
	})
	if err != nil {
		t.Fatal(err)
	}
	c.now = time.Now()
	for i := range 2 {
		r := request{kind: kindHello, at: c.now, to: netip.MustParseAddrPort("192.0.2.1:1")}
		c.actions = nil
		c.challenged(&r, cookie{byte(i + 1)})
		if len(c.actions) != 1 {
			t.Fatalf("%d messages in answer to challenge %d", len(c.actions), i)
		}
		c.now = c.now.Add(time.Second)
		setBack(&c.now, time.Hour)
	}
}

// setBack changes what the clock on the wall says of a time, and not its place
// in the order of times: see time.Time.
func setBack(t *time.Time, d time.Duration) {
	const secondsAt = 30 // bits of nanoseconds below
	wall := (*uint64)(unsafe.Pointer(t))
	*wall -= uint64(d/time.Second) << secondsAt
}
