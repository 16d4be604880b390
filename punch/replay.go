package punch

import "time"

// replayWindow is how far behind the newest counter a message may come.
const replayWindow = 2048

// window remembers which counters of one boot of a peer were seen.
type window struct {
	boot uint64
	top  uint64 // highest counter seen; counters begin at 1
	bits [replayWindow / 64]uint64
}

// accept reports whether counter is new, and remembers it.
func (w *window) accept(counter uint64) bool {
	if counter == 0 || counter+replayWindow <= w.top {
		return false
	}
	if counter > w.top {
		for c := max(w.top+1, counter-min(counter, replayWindow-1)); ; c++ {
			w.bits[c/64%uint64(len(w.bits))] &^= 1 << (c % 64)
			if c == counter {
				break
			}
		}
		w.top = counter
	}
	word, bit := &w.bits[counter/64%uint64(len(w.bits))], uint64(1)<<(counter%64)
	if *word&bit != 0 {
		return false
	}
	*word |= bit
	return true
}

// replay decides which messages of a peer are fresh, over its restarts. A boot
// id grows with every start, so a later boot is always believed, and a message
// recorded from an earlier one never while the later one lives. Only when the
// later one was silent for a consent time may an earlier boot id speak (a clock
// set back); it gets a window of its own, so that recorded messages of either
// boot stay dead.
type replay struct {
	newest, older window
	heard         time.Time // last fresh message of the newest boot
}

// accept reports whether a message is fresh and whether it is the first one of a
// boot.
func (r *replay) accept(boot, counter uint64, now time.Time) (fresh, restarted bool) {
	switch {
	case boot > r.newest.boot:
		restarted = r.newest.boot != 0
		r.newest = window{boot: boot}
	case boot == r.newest.boot:
	case now.Sub(r.heard) < consentExpiry:
		return false, false
	default:
		if boot > r.older.boot {
			r.older = window{boot: boot}
			restarted = true
		}
		return boot == r.older.boot && r.older.accept(counter), restarted
	}
	fresh = r.newest.accept(counter)
	if fresh {
		r.heard = now
	}
	return fresh, restarted && fresh
}

// inOrder is accept for messages of which only the latest counts.
func (r *replay) inOrder(boot, counter uint64, now time.Time) (fresh, restarted bool) {
	if fresh, restarted = r.accept(boot, counter, now); !fresh {
		return false, false
	}
	w := &r.newest
	if boot != w.boot {
		w = &r.older
	}
	return counter == w.top, restarted
}
