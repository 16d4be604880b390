package tun

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/device"
)

// never is what due says when no handshake should start.
const never = time.Duration(-1)

// A clock asks handshakes whether one with peer 1 is due.
type clock struct {
	h         handshakes
	initiate  bool
	sent      time.Time
	completed time.Time
	reads     int // of the sessions
}

func (c *clock) expect(t *testing.T, what string, k Key, want time.Duration) {
	t.Helper()
	got := c.h.due(k, c.sent, c.initiate, func() map[Key]time.Time {
		c.reads++
		return map[Key]time.Time{{1}: c.completed}
	})
	if got != want {
		t.Errorf("%s: due in %v, want %v", what, got, want)
	}
}

func TestHandshakesDue(t *testing.T) {
	k, path, other := Key{1}, netip.MustParseAddrPort("192.0.2.1:1"), netip.MustParseAddrPort("192.0.2.2:1")
	synctest.Test(t, func(t *testing.T) {
		c := clock{initiate: true}
		c.h.move(k, path, 0)
		c.expect(t, "no session", k, 0)
		c.expect(t, "at once again", k, never)
		c.expect(t, "another peer", Key{2}, 0)
		if c.reads != 1 {
			t.Errorf("sessions were read %d times within 20 ms, want once", c.reads)
		}
		time.Sleep(10 * time.Millisecond)
		c.h.move(k, path, 0)
		c.expect(t, "on the same path", k, never)
		c.h.move(k, other, 0)
		c.expect(t, "on another path", k, startInterval-10*time.Millisecond)
		c.expect(t, "while one is put off", k, never)
		time.Sleep(startInterval)
		c.h.resume(k)
		c.expect(t, "when its time has come", k, 0)
		time.Sleep(time.Second)
		c.sent = time.Now()
		c.expect(t, "when wireguard-go just sent one", k, never)
		time.Sleep(startInterval)
		c.expect(t, "50 ms later", k, 0)
		c.h.forget(k)
		c.sent = time.Time{}
		c.expect(t, "after the peer was made anew", k, 0)
	})
}

func TestHandshakesDueWithSession(t *testing.T) {
	k := Key{1}
	synctest.Test(t, func(t *testing.T) {
		c := clock{initiate: true, completed: time.Now()}
		time.Sleep(startInterval)
		c.expect(t, "with a session", k, never)
		c.reads = 0
		time.Sleep(device.RejectAfterTime - startInterval - time.Nanosecond)
		c.expect(t, "with an old session", k, never)
		if c.reads != 0 {
			t.Error("sessions were read for a peer known to have one")
		}
		time.Sleep(time.Nanosecond)
		c.expect(t, "with a session too old", k, 0)
		c.completed = time.Now().Add(time.Hour)
		time.Sleep(startInterval)
		c.expect(t, "after the clock was set back", k, 0)
	})
}

func TestHandshakesDueOnYieldingSide(t *testing.T) {
	k := Key{1}
	synctest.Test(t, func(t *testing.T) {
		var c clock
		c.expect(t, "first", k, yieldTime)
		time.Sleep(yieldTime)
		c.expect(t, "before its time has come", k, never)
		c.h.resume(k)
		c.expect(t, "when the other did not begin", k, 0)
		c.expect(t, "and then", k, yieldTime)
		time.Sleep(yieldTime)
		c.h.resume(k)
		c.completed = time.Now()
		c.expect(t, "when the other did", k, never)
	})
}

func TestHandshakesRestart(t *testing.T) {
	k := Key{1}
	synctest.Test(t, func(t *testing.T) {
		var h handshakes
		var completed time.Time
		for i, c := range []struct {
			wait      time.Duration
			completed bool
			want      bool
		}{
			{0, false, true},
			{restartInterval - 1, false, false},
			{1, false, true},
			{restartInterval, true, false},
			{restartInterval - 1, false, false},
			{1, false, true},
		} {
			time.Sleep(c.wait)
			if c.completed {
				completed = time.Now()
			}
			if got := h.restart(k, func() map[Key]time.Time { return map[Key]time.Time{k: completed} }); got != c.want {
				t.Errorf("%d: restarts: %v", i, got)
			}
		}
	})
}

func TestParseSessions(t *testing.T) {
	a, b := strings.Repeat("ab", 32), strings.Repeat("cd", 32)
	text := "private_key=" + a + "\nlisten_port=1\npublic_key=" + a + "\nlast_handshake_time_sec=1700000000\n" +
		"last_handshake_time_nsec=5\nendpoint=[fd99::1]:1\npublic_key=" + b + "\nlast_handshake_time_sec=0\nlast_handshake_time_nsec=0\n"
	got := parseSessions(bytes.NewBufferString(text))
	want := map[Key]time.Time{Key(bytes.Repeat([]byte{0xab}, 32)): time.Unix(1700000000, 5)}
	if !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	for _, bad := range []string{"public_key=zz\nlast_handshake_time_sec=1\nlast_handshake_time_nsec=1\n", "public_key=abcd\nlast_handshake_time_sec=1\nlast_handshake_time_nsec=1\n"} {
		if got := parseSessions(bytes.NewBufferString(bad)); len(got) != 0 {
			t.Errorf("%q: got %v, want nothing", bad, got)
		}
	}
}

func TestUDPInodes(t *testing.T) {
	table := "   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops\n" +
		"  123: 00000000:0D96 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 4711 2 0000000000000000 0\n" +
		"  124: 0100007F:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 4712 2 0000000000000000 0\n" +
		"  125: 00000000000000000000000000000000:0D96 00000000000000000000000000000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 4713 2 0 0\n" +
		"broken line\n"
	got := slices.Sorted(maps.Keys(udpInodes([]byte(table), 3478)))
	if want := []string{"4711", "4713"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestLogTellsNoSecrets(t *testing.T) {
	var out bytes.Buffer
	log := newLogger(slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug})))
	send := fmt.Errorf("write: %w", &net.OpError{Op: "write", Addr: net.UDPAddrFromAddrPort(netip.MustParseAddrPort("192.0.2.7:1")), Err: unix.ENETUNREACH})
	log.Verbosef("%v - Retrying handshake (try %d) with %s", new(device.Peer), 3, "192.0.2.8")
	log.Errorf("failed to send: %v", send)
	log.Errorf("odd: %v", errors.New("key 192.0.2.9"))
	if got := out.String(); strings.Contains(got, "192.0.2") || strings.Contains(got, "AAA") {
		t.Errorf("the log tells an address or a key: %s", got)
	}
	for _, want := range []string{"try 3", "network is unreachable", "level=WARN", "level=DEBUG"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the log lacks %q: %s", want, &out)
		}
	}
	out.Reset()
	for range 100 {
		log.Errorf("again")
	}
	if n := strings.Count(out.String(), "again"); n > warnBurst {
		t.Errorf("%d warnings at once, want at most %d", n, warnBurst)
	}
}
