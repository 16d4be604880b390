package overlay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"overlay/coord/trust"
	"overlay/punch"
	"overlay/punch/relay"
	"overlay/tun"
)

// fakeRelay is the client of one link. It notes what it is told; the test says
// what its relay does.
type fakeRelay struct {
	link *relayLink
	boot uint64

	mu       sync.Mutex
	addrs    []netip.AddrPort
	peers    []punch.Key
	received []string
	changed  int
	doubts   int
	ended    bool
}

func (f *fakeRelay) Run(ctx context.Context) error {
	<-ctx.Done()
	f.note(func() { f.ended = true })
	return nil
}

func (f *fakeRelay) note(do func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	do()
}

// over says that the link was ended.
func (f *fakeRelay) over() (ended bool) {
	f.note(func() { ended = f.ended })
	return ended
}

// flows are the peers it is to open flows to.
func (f *fakeRelay) flows() (list []punch.Key) {
	f.note(func() { list = f.peers })
	return list
}

func (f *fakeRelay) SetAddrs(l []netip.AddrPort) { f.note(func() { f.addrs = slices.Clone(l) }) }
func (f *fakeRelay) SetPeers(l []punch.Key)      { f.note(func() { f.peers = slices.Clone(l) }) }
func (f *fakeRelay) Receive(b []byte, from netip.AddrPort) bool {
	f.note(func() { f.received = append(f.received, string(b)) })
	return slices.Contains(f.addrs, from)
}
func (f *fakeRelay) Offer([]byte)               {}
func (f *fakeRelay) NetworkChanged()            { f.note(func() { f.changed++ }) }
func (f *fakeRelay) Doubt()                     { f.note(func() { f.doubts++ }) }
func (f *fakeRelay) STUN() (user, token []byte) { return []byte{byte(f.link.id)}, []byte("key") }

// linksWorld is a links with everything around it in memory.
type linksWorld struct {
	t     *testing.T
	links *links
	end   func()
	fakes map[string]*fakeRelay // by name of the relay
	log   bytes.Buffer

	mu        sync.Mutex
	device    map[uint16]string // how each link goes
	known     map[punch.Key]bool
	relays    map[punch.Key][]punch.Relay
	servers   []punch.Server
	published []time.Time
	arrived   []punch.Key
	sent      []string
	broken    string // the relay whose client cannot be made
}

func newLinksWorld(t *testing.T) *linksWorld { return newLinksWorldWith(t, func(*linksConfig) {}) }

func newLinksWorldWith(t *testing.T, change func(*linksConfig)) *linksWorld {
	w := &linksWorld{
		t: t, fakes: map[string]*fakeRelay{}, device: map[uint16]string{},
		known: map[punch.Key]bool{}, relays: map[punch.Key][]punch.Relay{},
	}
	c := linksConfig{
		own: punch.Key{255}, device: func() linkDevice { return w }, relays: w.setRelays, open: w.open,
		send: func(b []byte, to netip.AddrPort) error {
			w.note(func() { w.sent = append(w.sent, fmt.Sprintf("%x to %s", b, to)) })
			return nil
		},
		servers: func(l []punch.Server) { w.note(func() { w.servers = l }) },
		publish: func() {
			w.note(func() { w.published = append(w.published, time.Now()) })
			go w.links.record()
		},
		arrived: func(k punch.Key) { w.note(func() { w.arrived = append(w.arrived, k) }) },
		changed: func() {},
		log:     slog.New(slog.NewTextHandler(&w.log, nil)),
	}
	change(&c)
	w.links = newLinks(c)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.links.run(ctx) }()
	w.end = func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	return w
}

func (w *linksWorld) note(do func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	do()
}

func (w *linksWorld) open(k *relayLink, boot uint64) (relayClient, error) {
	f := &fakeRelay{link: k, boot: boot}
	var err error
	w.note(func() {
		if w.broken == k.info.name {
			err = errors.New("credentials of 999 bytes")
			return
		}
		w.fakes[k.info.name] = f
	})
	return f, err
}

// fake is the client last made for a relay, nil when there is none.
func (w *linksWorld) fake(name string) (f *fakeRelay) {
	w.note(func() { f = w.fakes[name] })
	return f
}

func (w *linksWorld) setRelays(k punch.Key, list []punch.Relay) {
	w.note(func() { w.relays[k] = slices.Clone(list) })
}

func (w *linksWorld) SetLink(id uint16, l tun.Link) {
	w.note(func() {
		w.device[id] = l.Addr.String()
		switch {
		case l.Send != nil && l.Addr.IsValid():
			w.device[id] = "tls, takes " + l.Addr.String()
		case l.Send != nil:
			w.device[id] = "tls"
		case !l.Addr.IsValid():
			delete(w.device, id)
		}
	})
}

func (w *linksWorld) SetWays(k tun.Key, ways []tun.Way) []netip.AddrPort {
	w.mu.Lock()
	defer w.mu.Unlock()
	list := make([]netip.AddrPort, len(ways))
	for i, way := range ways {
		if way.Header != relay.FlowOf(punch.Key{255}, punch.Key(k)) {
			w.t.Errorf("way %x of peer %v", way.Header, k)
		}
		if w.known[punch.Key(k)] {
			list[i] = handle(punch.Key(k), way.Link)
		}
	}
	return list
}

func handle(k punch.Key, link uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16([16]byte{0xfd, 15: k[0]}), 0x8000|link)
}

// members makes standalone relays and peers known, to the device as well.
func (w *linksWorld) members(relays []relayInfo, peers ...linkPeer) {
	w.note(func() {
		for _, p := range peers {
			w.known[p.key] = true
		}
	})
	w.links.setMembers(relays, peers)
	synctest.Wait()
}

func (w *linksWorld) state(name string, st relay.State) {
	w.t.Helper()
	f := w.fake(name)
	if f == nil {
		w.t.Fatalf("no link to %s", name)
	}
	w.links.onState(f.link, st)
	synctest.Wait()
}

func (w *linksWorld) up(name string, rtt time.Duration) {
	w.t.Helper()
	w.state(name, relay.State{Transport: relay.UDP, Addr: relayAddr(name), RTT: rtt})
}

func relayAddr(name string) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, name[len(name)-1]}), 443)
}

func standalone(names ...string) (list []relayInfo) {
	for _, n := range names {
		list = append(list, relayInfo{key: relayKey(n[len(n)-1]), name: n, addrs: []netip.AddrPort{relayAddr(n)}, online: true})
	}
	return list
}

func (w *linksWorld) server() {
	info := standalone("server0")[0]
	w.links.setOwn(info)
	synctest.Wait()
}

func tripsOf(names ...string) (list []trust.RelayTrip) {
	for _, n := range names {
		list = append(list, trust.RelayTrip{Relay: trust.Key(relayKey(n[len(n)-1])), Trip: 20})
	}
	return list
}

func (w *linksWorld) wantRelays(k punch.Key, want ...punch.Relay) {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if got := w.relays[k]; !slices.Equal(got, want) {
		w.t.Fatalf("relays of %d: %+v, want %+v", k[0], got, want)
	}
}
