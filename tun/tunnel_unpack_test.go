package tun

import (
	"bytes"
	"net/netip"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// from changes the source of an IPv4 packet, whose checksums stay right.
func from(host byte, p []byte) []byte {
	p = bytes.Clone(p)
	p[18] += p[15] - host
	p[15] = host
	return p
}

// Sources that are not the peer's are dropped and counted, whatever is around
// them; wireguard-go saw the container's alone.
func TestForgedSources(t *testing.T) {
	n, f := largeTunnel(t, everything)
	ours := segments{udp: true, size: 100, payload: pattern(100, 1)}.packets()[0]
	ours6 := segments{v6: true, udp: true, size: 100, payload: pattern(100, 1)}.packets()[0]
	other6 := bytes.Clone(ours6)
	copy(other6[8:24], ours6[24:40]) // keyB's
	other := from(2, ours)
	nobody := from(77, ours)
	super, _ := segments{size: 1000, payload: pattern(9000, 1)}.super()
	deliver(t, n, [][]byte{
		boxed(recordOf(recordFull, ours, 0), recordOf(recordFull, other, 0), recordOf(recordPartial, nobody, 0),
			recordOf(recordFull, other6, 0), recordOf(recordFull, ours6, 0), recordOf(recordTCP4, from(2, super), 1000)),
		boxed(recordOf(recordPartial, from(2, other), 0), recordOf(recordTCP4, super, 1000)),
	})
	var got [][]byte
	for _, p := range first(f.drain(t, true)) {
		got = append(got, bytes.Clone(p))
	}
	mustEqual(t, got, [][]byte{ours, ours6, super})
	if forged := n.dropped.forged.Load(); forged != 5 {
		t.Errorf("%d forged counted, want 5", forged)
	}
	if received := n.peers.byKey(keyA).received.Load(); received != 3 {
		t.Errorf("%d received, want 3", received)
	}
}

func first(packets [][]byte, _ []virtio) [][]byte { return packets }

// A container of nobody, or of a peer that left, brings nothing in.
func TestContainerOfAStranger(t *testing.T) {
	n, f := largeTunnel(t, everything)
	ours := segments{udp: true, size: 100, payload: pattern(100, 1)}.packets()[0]
	n.peers.set([]Peer{capable(keyB)})
	deliver(t, n, [][]byte{boxed(recordOf(recordFull, ours, 0), recordOf(recordFull, from(2, ours), 0))})
	if p := first(f.drain(t, true)); len(p) > 0 || n.dropped.forged.Load() != 1 {
		t.Errorf("%d packets written, %d containers counted", len(p), n.dropped.forged.Load())
	}
}

// An address that changes hands counts for its new peer at once.
func TestSourcesFollowTheList(t *testing.T) {
	n, f := largeTunnel(t, everything)
	ours := segments{udp: true, size: 100, payload: pattern(100, 1)}.packets()[0]
	alien := from(9, ours)
	a := capable(keyA)
	for _, has := range []bool{false, true, false} {
		list := []Peer{a, capable(keyB)}
		if has {
			list[0].AllowedIPs = append(list[0].AllowedIPs, netip.MustParsePrefix("100.64.0.9/32"))
		}
		n.peers.set(list)
		deliver(t, n, [][]byte{boxed(recordOf(recordFull, ours, 0), recordOf(recordFull, alien, 0))})
		if got := first(f.drain(t, true)); len(got) == 2 != has {
			t.Errorf("peer has the address: %v, packets written: %d", has, len(got))
		}
	}
}

// What comes before a broken record is written, what comes after it not.
func TestBrokenContainer(t *testing.T) {
	n, f := largeTunnel(t, everything)
	p := segments{udp: true, size: 100, payload: pattern(300, 1)}.packets()
	deliver(t, n, [][]byte{
		boxed(recordOf(recordFull, p[0], 0), recordOf(99, p[0], 0), recordOf(recordFull, p[1], 0)),
		p[1],
		boxed(recordOf(recordFull, p[2], 0), []byte{recordFull}),
	})
	packets, heads := f.drain(t, true)
	mustEqual(t, arrived(t, packets, heads), p)
	if broken := n.dropped.broken.Load(); broken != 2 {
		t.Errorf("%d broken counted, want 2", broken)
	}
}

// Packets with the protocol of containers pass in neither direction unless they
// are containers.
func TestProtocolOfContainers(t *testing.T) {
	inside := segments{udp: true, size: 100, payload: pattern(100, 1)}.packets()[0]
	box := boxed(recordOf(recordFull, inside, 0))
	options := append([]byte{0x46}, box[1:]...)

	n, f := largeTunnel(t, everything)
	f.put(t, virtio{}, box)
	f.put(t, virtio{}, options)
	f.put(t, virtio{}, inside)
	mustEqual(t, readAll(t, n, f), [][]byte{inside})
	if got := n.dropped.contained.Load(); got != 2 {
		t.Errorf("%d packets of the kernel dropped, want 2", got)
	}
	deliver(t, n, [][]byte{options})
	if got := first(f.drain(t, true)); len(got) > 0 {
		t.Error("a container with options was taken")
	}

	// Who has switched them off still takes those that are under way.
	off, f := largeTunnel(t, everything, func(c *Config) { c.Offloads = offLarge })
	deliver(t, off, [][]byte{box})
	mustEqual(t, first(f.drain(t, true)), [][]byte{inside})
}

// Partial checksums are joined without a look, but never with full ones, and a
// damaged packet that nobody vouched for stays damaged.
func TestVouchedIsNotMixed(t *testing.T) {
	for _, udp := range []bool{false, true} {
		n, f := largeTunnel(t, everything)
		p := segments{udp: udp, size: 100, payload: pattern(600, 1)}.packets()
		var records [][]byte
		for i, b := range p {
			if i < 4 {
				b, _ = withoutSum(b)
				records = append(records, recordOf(recordPartial, b, 0))
				continue
			}
			records = append(records, recordOf(recordFull, b, 0))
		}
		damaged := len(records) - 1
		records[damaged][recordHeaderSize+60] ^= 1
		p[damaged] = records[damaged][recordHeaderSize:]
		deliver(t, n, [][]byte{boxed(records...)})
		packets, heads := f.drain(t, true)
		if len(packets) != 3 {
			t.Errorf("udp=%v: %d packets written, want 3", udp, len(packets))
		}
		mustEqual(t, arrived(t, packets, heads), p)
	}
}

// A super-packet of a peer that the kernel refuses is split. It proves nothing
// about those made here, so they go on.
func TestRefusedSuperPacketIsSplit(t *testing.T) {
	n, f := largeTunnel(t, everything)
	s := segments{size: 1000, payload: pattern(9500, 1), flags: flagPSH}
	super, _ := s.super()
	p := pieceOf(super)
	p.partial = true
	if !p.is(recordTCP4, s.size) {
		t.Fatal("not a super-packet")
	}
	w := &n.writer
	w.place(&p)
	var errno syscall.Errno
	if err := w.raw.Write(func(fd uintptr) bool { errno = w.apart(fd, &w.groups[0], unix.EINVAL); return true }); err != nil || errno != 0 {
		t.Fatal(err, errno)
	}
	w.clear()
	packets, heads := f.drain(t, true)
	for i := range heads {
		if heads[i] != (virtio{}) {
			t.Errorf("packet %d: %+v", i, heads[i])
		}
	}
	mustEqual(t, packets, s.packets())
	if !w.tcp || !w.udp {
		t.Error("joining was switched off")
	}
}

// Nobody vouches for the header of an IPv4 packet, not even who does so for its
// transport checksum.
func TestVouchedWithDamagedHeaderIsNotJoined(t *testing.T) {
	n, f := largeTunnel(t, everything)
	p := segments{size: 100, payload: pattern(300, 1)}.packets()
	var records [][]byte
	for i := range p {
		b, _ := withoutSum(p[i])
		if i == 1 {
			b[10] ^= 1
			p[i][10] ^= 1
		}
		records = append(records, recordOf(recordPartial, b, 0))
	}
	deliver(t, n, [][]byte{boxed(records...)})
	packets, heads := f.drain(t, true)
	mustEqual(t, arrived(t, packets, heads), p)
}

// wireguard-go takes an IPv6 packet whose length passes 2^16 with its header for
// a short one. The kernel would refuse what is left of it with an error, which is
// logged, as often as the peer likes.
func TestStumpIsDropped(t *testing.T) {
	n, f := largeTunnel(t, everything)
	p := segments{udp: true, size: 100, payload: pattern(200, 1)}.packets()
	stump := segments{v6: true, udp: true, size: 100, payload: pattern(100, 1)}.packets()[0][:4]
	deliver(t, n, [][]byte{p[0], {}, stump, p[1]})
	packets, heads := f.drain(t, true)
	mustEqual(t, arrived(t, packets, heads), p)
}
