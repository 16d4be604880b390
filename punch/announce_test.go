package punch

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// inLAN puts a node, and its one address, into a LAN.
func (w *world) inLAN(b byte, addr string) *node {
	at := netip.MustParseAddrPort(addr)
	n := w.join(b, addr)
	n.SetLocal([]netip.Prefix{netip.PrefixFrom(at.Addr(), 24)}, at.Port())
	return n
}

// stranger is what the netmap says of n when it is offline and was never seen.
func (n *node) stranger() Peer { return Peer{Key: n.key, Nonce: n.nonce} }

// Two nodes of one LAN meet without a server, a signal or a known address.
func TestMeetInLAN(t *testing.T) {
	inWorld(t, func(w *world) {
		w.carry = func(_, _ *node) error { return errNoCarrier }
		a, b := w.inLAN(1, "192.168.1.2:4001"), w.inLAN(2, "192.168.1.3:4002")
		a.SetPeer(b.stranger())
		b.SetPeer(a.stranger())
		rest(time.Second)
		a.wantPath(b, netip.AddrPort{})
		if err := b.HandleAnnouncement(a.Announcement()); err != nil {
			t.Fatal(err)
		}
		rest(6 * oneWay)
		a.wantPath(b, b.outer)
		b.wantPath(a, a.outer)
		if first := w.between(b.outer, a.outer, time.Time{})[0]; first.ttl != 0 {
			t.Error("an opener inside the LAN")
		}
		sent := len(w.all())
		if err := b.HandleAnnouncement(a.Announcement()); err != nil {
			t.Fatal(err)
		}
		rest(time.Second)
		if more := len(w.all()) - sent; more != 0 {
			t.Errorf("%d packets for an announcement of a peer that is reached", more)
		}
	})
}

// What an announcement names elsewhere is not probed, and what it named is
// forgotten with the network.
func TestAnnouncedElsewhere(t *testing.T) {
	inWorld(t, func(w *world) {
		a := w.inLAN(1, "192.168.1.2:4001")
		b := w.inLAN(2, "192.168.2.3:4002")
		b.SetPeer(a.stranger())
		victim := netip.MustParseAddrPort("203.0.113.9:53")
		forged := announcement{key: a.key, candidates: []Candidate{{Addr: victim, Type: Host}, {Addr: a.outer, Type: Host}}}
		if err := b.HandleAnnouncement(forged.seal(b.announcer)); err != nil {
			t.Fatal(err)
		}
		rest(time.Second)
		if sent := w.all(); len(sent) != 0 {
			t.Errorf("sent %d packets, first to %v", len(sent), sent[0].to)
		}
		here := netip.MustParseAddrPort("192.168.2.77:1")
		forged.candidates = []Candidate{{Addr: here, Type: Host}}
		if err := b.HandleAnnouncement(forged.seal(b.announcer)); err != nil {
			t.Fatal(err)
		}
		rest(5 * time.Second)
		if n := len(w.between(b.outer, here, time.Time{})); n != roundChecks {
			t.Errorf("%d checks on an address that does not answer", n)
		}
		b.NetworkChanged()
		b.Demand(a.key)
		gone := time.Now()
		rest(time.Minute)
		if n := len(w.between(b.outer, here, gone)); n != 0 {
			t.Errorf("%d checks in another network", n)
		}
	})
}

func TestAnnouncementsRefused(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := w.inLAN(1, "192.168.1.2:4001"), w.inLAN(2, "192.168.1.3:4002")
		good := a.Announcement()
		refuse := func(name string, b []byte, to *node, want error) {
			if err := to.HandleAnnouncement(b); !errors.Is(err, want) {
				t.Errorf("%s: %v", name, err)
			}
		}
		refuse("no member", good, b, errUnknownPeer)
		b.SetPeer(a.stranger())
		refuse("good", good, b, nil)
		refuse("own", good, a, nil)
		refuse("cut", good[:20], b, errAnnounceFormat)
		refuse("long", make([]byte, MaxAnnouncement+1), b, errAnnounceFormat)
		other, err := announcer([32]byte{9})
		if err != nil {
			t.Fatal(err)
		}
		refuse("another mesh", (&announcement{key: a.key}).seal(other), b, errAnnounceOpen)
		refuse("relayed", (&announcement{key: a.key, candidates: []Candidate{{Addr: a.outer, Type: ServerReflexive}}}).seal(b.announcer), b, errAnnounceFormat)
		for range announceRate {
			_ = b.HandleAnnouncement(good)
		}
		refuse("a flood", good, b, errAnnounceRate)
		if n := w.join(3, "203.0.113.1:1").Announcement(); n != nil {
			t.Errorf("announced without an address: % x", n)
		}
	})
}

// Whoever has an invite can announce a peer anywhere in the LAN. That must not keep
// the peer's own candidates out.
func TestAnnouncementsLeaveRoom(t *testing.T) {
	a, p := crashAgent(t)
	a.SetLocal([]netip.Prefix{netip.MustParsePrefix("192.168.1.2/24")}, 41641)
	n := announcement{key: p.key}
	for i := range MaxCandidates {
		n.candidates = append(n.candidates, Candidate{Addr: netip.MustParseAddrPort(fmt.Sprintf("192.168.1.%d:9", 100+i)), Type: Host})
	}
	if err := a.HandleAnnouncement(n.seal(a.announcer)); err != nil {
		t.Fatal(err)
	}
	a.SetPeer(Peer{Key: p.key, Online: true, Candidates: []Candidate{{Addr: netip.MustParseAddrPort("203.0.113.9:4000"), Type: ServerReflexive}}})
	if p.find(netip.MustParseAddrPort("203.0.113.9:4000"), 0) == nil {
		t.Error("the published candidate has no pair")
	}
}

func TestAnnouncementFits(t *testing.T) {
	aead, err := announcer([32]byte{})
	if err != nil {
		t.Fatal(err)
	}
	n := announcement{key: Key{1}}
	for i := range MaxCandidates {
		n.candidates = append(n.candidates, Candidate{Addr: netip.AddrPortFrom(netip.AddrFrom16([16]byte{0x20, 15: byte(i)}), 1), Type: Host})
	}
	sealed := n.seal(aead)
	if len(sealed) > MaxAnnouncement {
		t.Errorf("%d bytes", len(sealed))
	}
	got, err := openAnnouncement(aead, sealed)
	if err != nil || got.key != n.key || !cmp.Equal(got.candidates, n.candidates, cmpopts.EquateComparable(netip.AddrPort{})) {
		t.Errorf("opened %+v, %v", got, err)
	}
}

func FuzzParseAnnouncement(f *testing.F) {
	f.Add(append([]byte{announceVersion}, make([]byte, 33)...))
	f.Add(append(append([]byte{announceVersion}, make([]byte, 32)...), 1, 4<<4|1, 192, 0, 2, 1, 0, 1))
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := parseAnnouncement(b)
		if err != nil {
			return
		}
		if len(n.candidates) > MaxCandidates {
			t.Errorf("%d candidates", len(n.candidates))
		}
		for _, c := range n.candidates {
			if c.Type != Host || !c.Addr.IsValid() {
				t.Errorf("candidate %+v", c)
			}
		}
	})
}
