package tun

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// soon is time enough for a trial on a busy machine.
func soon() time.Time { return time.Now().Add(5 * time.Second) }

// This kernel is not one of the damaged.
func TestTrial(t *testing.T) {
	if found, err := tryTrains(soon()); found != (trial{}) || err != nil {
		t.Fatalf("%+v, %v", found, err)
	}
}

// Without loopback nothing is known, and nothing is switched off.
func TestTrialWithoutLoopback(t *testing.T) {
	needRoot(t)
	onOwnThread(t, func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		if found, err := tryTrains(soon()); found != (trial{}) || err != nil {
			t.Errorf("%+v, %v", found, err)
		}
		return nil
	})
}

func trialPair(t *testing.T, wait time.Duration) (from, to *socket) {
	from, to, err := trialSockets()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { from.close(); to.close() })
	if err := to.conn.SetReadDeadline(time.Now().Add(wait)); err != nil {
		t.Fatal(err)
	}
	return from, to
}

func TestTrialRefused(t *testing.T) {
	from, to := trialPair(t, 5*time.Second)
	if err := from.set(unix.SOL_SOCKET, unix.SO_NO_CHECK, 1); err != nil { // with it UDP_SEGMENT fails
		t.Fatal(err)
	}
	if err := tryBoth(from, to); !errors.Is(err, unix.EINVAL) {
		t.Fatalf("%v", err)
	}
}

func TestTrialCompares(t *testing.T) {
	const n = defaultDatagram
	sent := trialBytes(4 * n)
	wrong := bytes.Clone(sent)
	wrong[3*n+7]++
	mark := trialBytes(trialMark)
	for name, c := range map[string]struct {
		arrived [][]byte
		want    error
	}{
		"right":            {[][]byte{sent[:n], sent[n : 2*n], sent[2*n : 3*n], sent[3*n:], mark}, nil},
		"mark overtakes":   {[][]byte{mark, sent[:n], sent[n : 2*n], sent[2*n : 3*n], sent[3*n:]}, nil},
		"nothing":          {nil, nil}, // too busy to tell
		"part, no mark":    {[][]byte{sent[:n]}, nil},
		"damaged":          {[][]byte{sent[:n], sent[n : 2*n], sent[2*n : 3*n], wrong[3*n:], mark}, errMangled},
		"short":            {[][]byte{sent[:n-1], mark}, errMangled},
		"two in one":       {[][]byte{sent[:2*n], sent[2*n:], mark}, errMangled},
		"out of order":     {[][]byte{sent[n : 2*n], sent[:n], sent[2*n : 3*n], sent[3*n:], mark}, errMangled},
		"last one missing": {[][]byte{sent[:n], sent[n : 2*n], sent[2*n : 3*n], mark}, errMangled},
		"more":             {[][]byte{sent[:n], sent[n : 2*n], sent[2*n : 3*n], sent[3*n:], sent[:n], mark}, errMangled},
	} {
		from, to := trialPair(t, 100*time.Millisecond)
		for _, b := range c.arrived {
			if _, err := from.conn.WriteToUDPAddrPort(b, to.local()); err != nil {
				t.Fatal(err)
			}
		}
		if err := compare(to, sent); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What the trial finds is obeyed, unless forced, and it is made once.
func TestTrialIsObeyed(t *testing.T) {
	for _, c := range []struct {
		off      string
		found    trial
		gso, gro bool
	}{
		{"", trial{}, true, true},
		{"", trial{gso: true}, false, true},
		{"", trial{gro: true}, true, false},
		{"+gso", trial{gso: true}, true, true},
		{"-gso", trial{}, false, true},
		{"-gro", trial{}, true, false},
	} {
		b := newBind(Config{Offloads: c.off}, newPeers())
		b.tried.Do(func() { b.found = c.found })
		o := &opened{bind: b}
		o.start(t, 0)
		s := o.open.Load().v4
		gro := 0
		if err := s.raw.Control(func(fd uintptr) { gro, _ = unix.GetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_GRO) }); err != nil {
			t.Fatal(err)
		}
		if manglesTrains(release()) {
			c.gso = c.gso && c.off == "+gso"
		}
		if s.gso != c.gso || gro == 1 != c.gro {
			t.Errorf("%+v: gso %v, gro %d", c, s.gso, gro)
		}
	}
}

// A bind opens after its trial, with nothing said when all is well.
func TestTrialSaysNothing(t *testing.T) {
	var log strings.Builder
	b := newBind(Config{Log: slog.New(slog.NewTextHandler(&log, nil))}, newPeers())
	o := &opened{bind: b}
	o.start(t, 0)
	if log.Len() > 0 {
		t.Error(log.String())
	}
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	o.found.gso = true // a second trial would find nothing
	o.start(t, 0)
	if o.open.Load().v4.gso {
		t.Error("tried again")
	}
}
