package tun

import "math/bits"

// Bounds of messages of which not all fragments are here.
const (
	maxSlots     = 32                       // of one receiver; the bits of slots.open
	maxPeerSlots = 8                        // for what comes by one of the peer's paths
	maxElseSlots = 2                        // and for what comes from elsewhere
	slotSize     = maxPacket + maxFragments // with padding

	// A message so many messages behind the newest is given up, before its id
	// comes again.
	staleAfter  = fragmentIDs / 4
	staleBefore = fragmentIDs - staleAfter
)

// slot is a message in the making.
type slot struct {
	of    fragment // header of the fragment that came first
	from  source
	have  uint64 // which fragments are here
	begun uint64 // when, in slots begun
	data  *[slotSize]byte
}

// source is who a fragment is from. What comes by no known path of the peer is
// kept apart: it may be the peer's by a path that this side does not use, and it
// may be anybody's who saw the index of the session.
type source struct {
	peer *peer
	path bool // a known one
}

// slots puts messages together whose fragments do not come in one piece. Their
// number and that of one peer is bounded; the one begun first makes room. Memory
// is allocated at first use and kept. The zero value needs drops. One goroutine
// uses it.
type slots struct {
	list  [maxSlots]slot
	open  uint32 // which of list are in use
	begun uint64 // how many ever
	drops *drops
}

// put adds a fragment. It returns the size of the message that is complete
// with it, in dst, or 0.
func (s *slots) put(dst []byte, from source, f fragment, part []byte) int {
	i := s.find(from, f)
	if i < 0 {
		i = s.begin(from, f)
	}
	one := &s.list[i]
	if bit := uint64(1) << f.index; one.have&bit == 0 && one.of.padding == f.padding && len(dst) >= f.length() {
		one.have |= bit
		copy(one.data[f.index*f.size:], part)
	} else {
		s.drops.fragments.Add(1)
	}
	if bits.OnesCount64(one.have) < f.count {
		return 0
	}
	s.close(i)
	return copy(dst, one.data[:f.length()])
}

// find is the slot of f's message, -1 when there is none.
func (s *slots) find(from source, f fragment) int {
	for open := s.open; open != 0; open &= open - 1 {
		i := bits.TrailingZeros32(open)
		if of := &s.list[i].of; s.list[i].from == from && of.session == f.session && of.id == f.id && of.count == f.count && of.size == f.size {
			return i
		}
	}
	return -1
}

// begin takes a slot for the message of f: a free one, or the oldest of the same
// source when that has its share, or the oldest of all.
func (s *slots) begin(from source, f fragment) int {
	i, count := s.oldest(func(one *slot) bool { return one.from == from })
	if count < from.share() {
		if i = bits.TrailingZeros32(^s.open); i == maxSlots {
			i, _ = s.oldest(func(*slot) bool { return true })
		}
	}
	if s.open&(1<<i) != 0 {
		s.lose(i)
	}
	one := &s.list[i]
	if one.data == nil {
		one.data = new([slotSize]byte)
	}
	s.begun++
	s.open |= 1 << i
	one.of, one.from, one.have, one.begun = f, from, 0, s.begun
	return i
}

// share is how many slots a source may have.
func (f source) share() int {
	if f.path {
		return maxPeerSlots
	}
	return maxElseSlots
}

// oldest is the slot begun first of those that match, and how many do.
func (s *slots) oldest(match func(*slot) bool) (first, count int) {
	first = -1
	for open := s.open; open != 0; open &= open - 1 {
		i := bits.TrailingZeros32(open)
		if !match(&s.list[i]) {
			continue
		}
		count++
		if first < 0 || s.list[i].begun < s.list[first].begun {
			first = i
		}
	}
	return first, count
}

// pass notes that a message of a session has arrived. Those far behind it will
// not.
func (s *slots) pass(session uint32, counter uint64) {
	for open := s.open; open != 0; open &= open - 1 {
		i := bits.TrailingZeros32(open)
		of := &s.list[i].of
		behind := (counter - uint64(of.id)) % fragmentIDs
		if of.session == session && behind >= staleAfter && behind < staleBefore {
			s.lose(i)
		}
	}
}

// lose gives a message up.
func (s *slots) lose(i int) {
	s.drops.incomplete.Add(1)
	s.close(i)
}

func (s *slots) close(i int) {
	s.open &^= 1 << i
	s.list[i].from = source{}
}
