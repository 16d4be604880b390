package tun

import (
	"math/rand/v2"
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
		if d, room := waited(c); d != 0 || room < creditLimit-1 {
			t.Fatalf("waited %v, room %d", d, room)
		}
		if stuck.held != 0 || !stuck.parked {
			t.Fatal("stuck peer not written off")
		}
	})
}

// Room for one wakes all who wait.
func TestCreditWakesAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, a := newCredit(), &account{}
		c.take(a, creditLimit, 0)
		var spent [3]time.Duration
		for i := range spent {
			go func() { spent[i], _ = waited(c) }()
		}
		time.Sleep(time.Millisecond)
		c.settle(a, 1)
		synctest.Wait()
		for _, d := range spent {
			if d != time.Millisecond {
				t.Fatalf("waited %v", spent)
			}
		}
	})
}

// What a peer lost once does not narrow it for ever, and does not park it.
func TestCreditForgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, a := newCredit(), &account{}
		c.take(a, 100, 1000)
		c.settle(a, 50)
		time.Sleep(creditLive - 1)
		c.take(a, 1, 10)
		if a.held != 51 || a.bytes != 510 {
			t.Fatalf("%d messages, %d bytes held", a.held, a.bytes)
		}
		time.Sleep(time.Nanosecond)
		if !c.take(a, 1, 10) || c.held != 1 || a.held != 1 || c.bytes != 10 || a.bytes != 10 {
			t.Fatalf("%d messages, %d bytes held", a.held, a.bytes)
		}
		time.Sleep(creditLive - 1) // the new one has its own time
		if c.take(a, 1, 10); a.held != 2 {
			t.Fatalf("%d messages held", a.held)
		}
	})
}

// check finds what must never be.
func (c *credit) check(t *testing.T, accounts []*account) {
	t.Helper()
	held, bytes := 0, 0
	for _, a := range accounts {
		if a.held < 0 || a.bytes < 0 || a.held == 0 && a.bytes != 0 || a.held > 0 && !a.listed {
			t.Fatalf("account of %+v", *a)
		}
		held, bytes = held+a.held, bytes+a.bytes
	}
	if c.held != held || c.bytes != bytes {
		t.Fatalf("%d messages of %d bytes held, the accounts have %d of %d", c.held, c.bytes, held, bytes)
	}
	if len(c.busy) > len(accounts) {
		t.Fatalf("%d accounts listed", len(c.busy))
	}
}

// Whatever is taken, settled, lost and too much settled, the sums hold and
// nobody waits longer than for a stall.
func TestCreditSums(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for seed := range uint64(100) {
			random := rand.New(rand.NewPCG(seed, 1))
			c, accounts := newCredit(), []*account{{}, {}, {}}
			for range 500 {
				a := accounts[random.IntN(len(accounts))]
				switch random.IntN(6) {
				case 0, 1:
					if d, room := waited(c); d > creditStall || room <= 0 {
						t.Fatalf("waited %v, room %d", d, room)
					}
					n := 1 + random.IntN(batchSize)
					c.take(a, n, n*random.IntN(1<<random.IntN(17)))
				case 2, 3:
					c.settle(a, random.IntN(2*batchSize))
				case 4:
					c.settle(a, 1)
				default:
					time.Sleep(time.Duration(random.Int64N(int64(time.Second) >> random.IntN(20))))
				}
				c.check(t, accounts)
			}
			for _, a := range accounts {
				c.settle(a, a.held)
			}
			if c.held != 0 || c.bytes != 0 {
				t.Fatalf("%d messages, %d bytes left", c.held, c.bytes)
			}
		}
	})
}

// A peer that moves gets on although another loses everything it is given.
func TestCreditProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, live, stuck := newCredit(), &account{}, &account{}
		done := 0
		for begin := time.Now(); time.Since(begin) < time.Second; done++ {
			waited(c)
			c.take(stuck, 1, 60_000)
			waited(c)
			c.take(live, 1, 60_000)
			time.Sleep(100 * time.Microsecond)
			c.settle(live, 1)
		}
		if done < 9000 {
			t.Fatalf("%d messages passed in a second", done)
		}
	})
}

func BenchmarkCredit(b *testing.B) {
	c, a := newCredit(), &account{}
	timer := time.NewTimer(time.Hour)
	timer.Stop()
	b.ReportAllocs()
	for b.Loop() {
		c.wait(timer, nil)
		c.take(a, 8, 8*1400)
		c.settle(a, 8)
	}
}

// What comes out takes back all before it that did not: a peer's junk does not
// fill the room of others.
func TestCreditByName(t *testing.T) {
	c, a := newCredit(), &account{}
	for i := range uint64(10_000) {
		if c.held >= creditLimit {
			t.Fatalf("full after %d messages", i)
		}
		c.takeNamed(a, []uint64{2*i + 1, 2*i + 2}, 3000) // one of them is junk
		if i%20 == 19 {
			c.settleTo(a, 2*i+1, 1)
			if a.held != 1 || c.held != 1 || a.names.count != 1 {
				t.Fatalf("%d held of %d, %d names", a.held, c.held, a.names.count)
			}
		}
	}
	c.settleTo(a, 20_000, 1)
	if c.held != 0 || c.bytes != 0 {
		t.Fatalf("%d messages, %d bytes left", c.held, c.bytes)
	}
	c.takeNamed(a, []uint64{1, 2, 3}, 100)
	c.settleTo(a, 99, 2)
	if a.held != 1 {
		t.Fatal("an unknown name does not count")
	}
}
