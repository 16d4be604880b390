package tun

import (
	"bytes"
	"errors"
	"net"
	"os"
	"sync"
	"testing"
)

// rung waits a moment for a bell and tells whether it rang.
func rung(c *net.UDPConn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	return errors.Is(raw.Read(func(uintptr) bool { return true }), os.ErrDeadlineExceeded)
}

// A look rings for who waits and has something, and for nobody else.
func TestBellsRing(t *testing.T) {
	var l bells
	var conns []*net.UDPConn
	var hung []*bell
	for range 3 {
		c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		raw, err := c.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		conns, hung = append(conns, c), append(hung, l.hang(raw, c.SetReadDeadline))
	}
	for _, c := range conns[:2] {
		if _, err := conns[2].WriteTo([]byte("x"), c.LocalAddr()); err != nil {
			t.Fatal(err)
		}
	}
	hung[0].waiting.Store(true)
	hung[2].waiting.Store(true)
	now := int64(lookEvery)
	l.look(now)
	for i, want := range []bool{true, false, false} {
		if got := rung(conns[i]); got != want {
			t.Errorf("bell %d rang: %v, want %v", i, got, want)
		}
	}
	if hung[0].waiting.Load() || !hung[2].waiting.Load() {
		t.Error("who was rung for still waits, or who was not does not")
	}

	hung[1].waiting.Store(true)
	if l.look(now + int64(lookEvery) - 1); rung(conns[1]) {
		t.Error("looked twice at once")
	}
	l.take(hung[1])
	if l.look(now + 2*int64(lookEvery)); rung(conns[1]) {
		t.Error("a bell rang that was taken down")
	}
	_ = conns[2].Close()
	l.look(now + 4*int64(lookEvery)) // a closed file harms nobody
}

// However often a bell rings beside what it rings for, nothing is lost.
func TestBellsAgainstReceiving(t *testing.T) {
	o := openBind(t, Config{})
	c, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(o.at(false)))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	stop := make(chan struct{})
	var ringing sync.WaitGroup
	ringing.Go(func() {
		for now := int64(1); ; now += int64(lookEvery) {
			select {
			case <-stop:
				return
			default:
				o.bells.last.Store(0)
				o.bells.look(now)
			}
		}
	})
	for i := range 2000 {
		want := wireGuard(typeData, uint32(i+1), 100)
		if _, err := c.Write(want); err != nil {
			t.Fatal(err)
		}
		if got := o.next(t); !bytes.Equal(got.data, want) {
			t.Fatalf("message %d is another", i)
		}
	}
	close(stop)
	ringing.Wait()
}
