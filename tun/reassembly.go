package tun

import "math/bits"

// Bounds of messages of which not all fragments are here.
const (
	maxSlots     = 32 // of one receiver; the bits of slots.open
	maxPeerSlots = 8
	slotSize     = maxPacket + maxFragments // with padding

	// A message so many messages behind the newest is given up, before its id
	// comes again.
	staleAfter  = fragmentIDs / 4
	staleBefore = fragmentIDs - staleAfter
)

// slot is a message in the making.
type slot struct {
	of    fragment // header of the fragment that came first
	peer  *peer
	have  uint64 // which fragments are here
	begun uint64 // when, in slots begun
	data  *[slotSize]byte
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

// put adds a fragment of p. It returns the size of the message that is complete
// with it, in dst, or 0.
func (s *slots) put(dst []byte, p *peer, f fragment, part []byte) int {
	i := s.find(f)
	if i < 0 {
		i = s.begin(p, f)
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
func (s *slots) find(f fragment) int {
	for open := s.open; open != 0; open &= open - 1 {
		i := bits.TrailingZeros32(open)
		if of := &s.list[i].of; of.session == f.session && of.id == f.id && of.count == f.count && of.size == f.size {
			return i
		}
	}
	return -1
}

// begin takes a slot for the message of f: a free one, or the oldest of p when
// it has its share, or the oldest of all.
func (s *slots) begin(p *peer, f fragment) int {
	i := s.oldest(p)
	if i < 0 {
		if i = bits.TrailingZeros32(^s.open); i == maxSlots {
			i = s.oldest(nil)
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
	one.of, one.peer, one.have, one.begun = f, p, 0, s.begun
	return i
}

// oldest is the slot of p begun first, -1 when it has fewer than its share; for
// nil it is that of all peers.
func (s *slots) oldest(p *peer) int {
	first, count := -1, 0
	for open := s.open; open != 0; open &= open - 1 {
		i := bits.TrailingZeros32(open)
		if p != nil && s.list[i].peer != p {
			continue
		}
		count++
		if first < 0 || s.list[i].begun < s.list[first].begun {
			first = i
		}
	}
	if p != nil && count < maxPeerSlots {
		return -1
	}
	return first
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
	s.list[i].peer = nil
}
