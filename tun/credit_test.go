package tun

import (
	"testing"
	"testing/synctest"
	"time"
)

// waited is how long wait blocked and the room it found.
func waited(c *credit) (time.Duration, int) {
	timer := time.NewTimer(time.Hour)
	timer.Stop()
	begin := time.Now()
	room, _ := c.wait(timer, nil)
	return time.Since(begin), room
}

func TestCreditBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, a := newCredit(), &account{}
		if !c.take(a, creditLimit-1, 0) {
			t.Fatal("refused")
		}
		if d, room := waited(c); d != 0 || room != 1 {
			t.Fatalf("waited %v, room %d", d, room)
		}
		c.take(a, 1, 0)
		go func() {
			time.Sleep(2 * time.Millisecond)
			c.settle(a, 10)
		}()
		if d, room := waited(c); d != 2*time.Millisecond || room != 10 {
			t.Fatalf("waited %v, room %d", d, room)
		}
		c.settle(a, creditLimit) // more than there are
		if c.held != 0 || a.held != 0 {
			t.Fatalf("held %d, account %d", c.held, a.held)
		}
	})
}

func TestCreditClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, a, done := newCredit(), &account{}, make(chan struct{})
		c.take(a, creditLimit, 0)
		go func() {
			time.Sleep(time.Millisecond)
			close(done)
		}()
		timer := time.NewTimer(time.Hour)
		if room, _ := c.wait(timer, done); room != 0 {
			t.Fatalf("room %d", room)
		}
	})
}

// A peer without a session must not stall the others, and wireguard-go must
// not collect its packets without bound.
func TestCreditParked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, live, stuck := newCredit(), &account{}, &account{}
		c.take(live, 1, 0)
		c.settle(live, 1)
		c.take(stuck, creditLimit, 0)
		if d, room := waited(c); d != creditStall || room != creditLimit {
			t.Fatalf("waited %v, room %d", d, room)
		}
		if c.take(stuck, 1, 0) {
			t.Fatal("more for a peer that has its share")
		}
		if !c.take(live, 5, 0) || live.held != 5 {
			t.Fatal("the other peer is refused")
		}
		time.Sleep(parkedTrickle)
		if !c.take(stuck, 1, 0) || c.take(stuck, 1, 0) {
			t.Fatal("want one more after a while")
		}
		c.settle(stuck, 1) // there is a session now
		if !c.take(stuck, 7, 0) || stuck.held != 7 {
			t.Fatal("still parked")
		}
	})
}

// A peer with a session whose messages got lost inside is only written off.
func TestCreditLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, a := newCredit(), &account{}
		c.take(a, 1, 0)
		c.settle(a, 1)
		c.take(a, creditLimit, 0)
		if d, room := waited(c); d != creditStall || room != creditLimit {
			t.Fatalf("waited %v, room %d", d, room)
		}
		if !c.take(a, 3, 0) || a.held != 3 {
			t.Fatal("parked although live")
		}
		if len(c.busy) != 1 {
			t.Fatalf("%d accounts listed", len(c.busy))
		}
	})
}

// While one peer moves, another's progress does not count as its own.
func TestCreditStallIsPerPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, live, stuck := newCredit(), &account{}, &account{}
		c.take(stuck, creditLimit-1, 0)
		c.take(live, 1, 0)
		time.Sleep(creditStall)
		c.settle(live, 1)
		c.take(live, 1, 0)
		if d, room := waited(c); d != creditStall || room < creditLimit-1 {
			t.Fatalf("waited %v, room %d", d, room)
		}
		if stuck.held != 0 || !stuck.parked {
			t.Fatal("stuck peer not written off")
		}
	})
}
