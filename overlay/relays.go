package overlay

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"overlay/coord/trust"
	"overlay/punch"
	"overlay/punch/relay"
	"overlay/tun"
)

const (
	// linkTick is how often the choice of relays is looked at when nothing
	// happens.
	linkTick = 5 * time.Second
	// demandFor is how long a demanded peer has its flows open at the relays.
	demandFor = time.Minute
	// The shortest time between two records for the relays' sake; it doubles while
	// there are many, and is the first one again after a pause.
	firstPublishGap = 100 * time.Millisecond
	lastPublishGap  = time.Second
	publishPause    = 10 * time.Second
	// askEverywhere is how many peers are looked for at all relays, whatever their
	// records say: as many as fit into three messages.
	askEverywhere = 84
	// judgeEvery is how often a link is measured: as often as it is kept alive.
	judgeEvery = 20 * time.Second
	// reopenRelay is how long a relay is left alone whose client cannot be made.
	reopenRelay = time.Minute
	// maxLinkID is the highest number of a link; see tun.Device.SetLink.
	maxLinkID = 1<<15 - 1
)

var errNoRelay = errors.New("no relay where the peer is, is reached")

// relayClient is what links need of a relay.Client.
type relayClient interface {
	Run(ctx context.Context) error
	SetAddrs(list []netip.AddrPort)
	SetPeers(list []punch.Key)
	Receive(b []byte, from netip.AddrPort) (mine bool)
	Offer(run []byte)
	NetworkChanged()
	Doubt()
	STUN() (user, key []byte)
}

// linkDevice is what they need of a tun.Device.
type linkDevice interface {
	SetLink(id uint16, l tun.Link)
	SetWays(k tun.Key, ways []tun.Way) []netip.AddrPort
}

// linksConfig is what the links need of the session.
type linksConfig struct {
	own    punch.Key
	device func() linkDevice
	relays func(k punch.Key, list []punch.Relay)                // to the agent
	open   func(k *relayLink, boot uint64) (relayClient, error) // boot: another one each time
	send   func(b []byte, to netip.AddrPort) error
	// servers is told the STUN servers among the relays when they change,
	// publish that the record is another one, arrived that a peer came to a
	// relay, changed that what status shows is different, and mapped that a relay
	// sees us at another address than before.
	servers func([]punch.Server)
	publish func()
	arrived func(punch.Key)
	changed func()
	mapped  func()
	// offers lists the nodes that relay for others, and path tells the path to a peer
	// and how many packets went each way; nil: no peer relays are used.
	offers func() []peerOffer
	path   func(punch.Key) (punch.Path, punch.Activity)
	log    *slog.Logger
}

// relayInfo is a relay as the netmap, the Welcome or the cache describe it.
type relayInfo struct {
	key     punch.Key // X25519
	name    string
	addrs   []netip.AddrPort       // UDP
	servers []string               // host:port of its TLS
	verify  func(trust.Hash) error // of its TLS key
	own     bool                   // in the own server
	online  bool                   // as far as the server knows
	peer    bool                   // in a node of the mesh
}

// linkPeer is a peer as the links see it.
type linkPeer struct {
	key    punch.Key
	online bool
	relays []trust.RelayTrip // as it published them
}

// relayLink is the connection to one relay. What changes of it is guarded by the mutex
// of links.
type relayLink struct {
	id     uint16
	boot   uint64
	client relayClient
	cancel func()
	info   relayInfo
	state  relay.State
	began  time.Time // of the state's transport
	mute   time.Time // since when it is not over UDP; of use while it is not
	judged time.Time // when the home was last compared with it
	stun   netip.AddrPort
	here   map[punch.Key]bool
}

func (k *relayLink) up() bool { return k.state.Transport != relay.None }

// way is what a handle stands for.
type way struct {
	peer punch.Key
	link uint16
}

// links are the connections to relays. Its run chooses the relays, keeps a
// client for each, and tells the device and the agent what leads where; all else
// only notes things and wakes it.
type links struct {
	cfg  linksConfig
	wake chan struct{}
	// tried are the addresses of all known relays, and answered those at which one
	// is: never probed as peers. Not under mu, because the agent asks while it
	// holds its own lock.
	tried, answered atomic.Pointer[map[netip.AddrPort]bool]

	mu        sync.Mutex
	ownRelay  *relayInfo
	relays    map[punch.Key]relayInfo // standalone ones
	peers     map[punch.Key]linkPeer
	demands   map[punch.Key]time.Time
	open      map[punch.Key]*relayLink // by relay
	ids       map[punch.Key]uint16
	broken    map[punch.Key]time.Time     // relays whose client could not be made: not until then
	opened    uint64                      // links ever
	trips     map[punch.Key]time.Duration // as measured last
	home      home
	handles   map[punch.Key]map[uint16]netip.AddrPort
	ways      map[netip.AddrPort]way
	tcp       map[punch.Key]tcpWay
	via       peerRelays
	published []trust.RelayTrip
	publishAt time.Time // not before
	gap       time.Duration
}

func newLinks(c linksConfig) *links {
	return &links{
		cfg: c, wake: make(chan struct{}, 1),
		relays: map[punch.Key]relayInfo{}, peers: map[punch.Key]linkPeer{}, demands: map[punch.Key]time.Time{},
		open: map[punch.Key]*relayLink{}, ids: map[punch.Key]uint16{}, trips: map[punch.Key]time.Duration{},
		broken: map[punch.Key]time.Time{}, handles: map[punch.Key]map[uint16]netip.AddrPort{}, ways: map[netip.AddrPort]way{},
		tcp: map[punch.Key]tcpWay{}, via: newPeerRelays(),
	}
}

func (l *links) poke() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// setMembers replaces the standalone relays and the peers. Whom the server calls
// offline now is wanted for a while: it may only have lost the server.
func (l *links) setMembers(relays []relayInfo, peers []linkPeer) {
	l.mu.Lock()
	clear(l.relays)
	for _, r := range relays {
		l.relays[r.key] = r
	}
	old := l.peers
	l.peers = make(map[punch.Key]linkPeer, len(peers))
	for _, p := range peers {
		if old[p.key].online && !p.online {
			l.demands[p.key] = time.Now().Add(demandFor)
		}
		l.peers[p.key] = p
	}
	left := func(p punch.Key) bool { _, member := l.peers[p]; return !member }
	for _, k := range l.open {
		maps.DeleteFunc(k.here, func(p punch.Key, _ bool) bool { return left(p) })
	}
	maps.DeleteFunc(l.demands, func(p punch.Key, _ time.Time) bool { return left(p) })
	l.collectAddrs()
	l.mu.Unlock()
	l.poke()
}

// setOwn says which relay is in the own server.
func (l *links) setOwn(r relayInfo) {
	r.own, r.online = true, true
	l.mu.Lock()
	l.ownRelay = &r
	l.collectAddrs()
	l.mu.Unlock()
	l.poke()
}

// collectAddrs notes where relays are, or say they are; mu is held.
func (l *links) collectAddrs() {
	tried, answered := map[netip.AddrPort]bool{}, map[netip.AddrPort]bool{}
	for _, r := range l.known() {
		for _, a := range r.addrs {
			tried[a] = true
			answered[a] = answered[a] || r.own // the server said so over TLS
		}
	}
	for _, k := range l.open {
		if k.stun.IsValid() {
			tried[k.stun], answered[k.stun] = true, true
		}
	}
	l.tried.Store(&tried)
	l.answered.Store(&answered)
}

// isRelay reports whether a relay has that address. It takes no lock.
func (l *links) isRelay(a netip.AddrPort) bool {
	all := l.answered.Load()
	return all != nil && (*all)[a]
}

// known lists all relays; mu is held.
func (l *links) known() []relayInfo {
	list := make([]relayInfo, 0, len(l.relays)+len(l.via.infos)+1)
	if l.ownRelay != nil {
		list = append(list, *l.ownRelay)
	}
	for _, r := range l.relays {
		list = append(list, r)
	}
	for _, r := range l.via.infos {
		list = append(list, r)
	}
	return list
}

// demand has a peer's flows opened, online or not. It never blocks.
func (l *links) demand(k punch.Key, now time.Time) {
	l.mu.Lock()
	fresh := now.Before(l.demands[k])
	l.demands[k] = now.Add(demandFor)
	wanted := l.peers[k].online
	l.mu.Unlock()
	if !fresh && !wanted {
		l.poke()
	}
}

// receive hands a control datagram to whoever asked for it.
func (l *links) receive(b []byte, from netip.AddrPort) {
	if all := l.tried.Load(); all == nil || !(*all)[from] {
		return
	}
	l.mu.Lock()
	clients := make([]relayClient, 0, maxLinks)
	for _, k := range l.open {
		clients = append(clients, k.client)
	}
	l.mu.Unlock()
	for _, c := range clients {
		if c.Receive(b, from) {
			return
		}
	}
}

// networkChanged has every relay asked at once, and distances measured anew.
func (l *links) networkChanged() {
	l.mu.Lock()
	l.home.settle(time.Now())
	var clients []relayClient
	for r := range l.trips {
		if l.open[r] == nil {
			delete(l.trips, r)
		}
	}
	for _, k := range l.open {
		clients = append(clients, k.client)
	}
	l.mu.Unlock()
	for _, c := range clients {
		c.NetworkChanged()
	}
	l.poke()
}

// doubt says that an answer is missing over a handle.
func (l *links) doubt(handle netip.AddrPort) {
	l.mu.Lock()
	var c relayClient
	if k := l.byID(l.ways[handle].link); k != nil {
		c = k.client
	}
	l.mu.Unlock()
	if c != nil {
		c.Doubt()
	}
}

// byID finds a link in use; mu is held.
func (l *links) byID(id uint16) *relayLink {
	for _, k := range l.open {
		if k.id == id {
			return k
		}
	}
	return nil
}

// peerOf tells whose handle an address is.
func (l *links) peerOf(handle netip.AddrPort) (punch.Key, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	w, ok := l.ways[handle]
	return w.peer, ok
}

// signal sends a sealed message to a peer through the best relay at which it is. To
// a peer not seen at any it is sent all the same, but that is an error.
func (l *links) signal(to punch.Key, sealed []byte) error {
	l.mu.Lock()
	handle, here := l.bestHandle(to)
	l.mu.Unlock()
	if !handle.IsValid() {
		return errNoRelay
	}
	b := append(make([]byte, 0, 1+len(sealed)), relay.SignalByte)
	if err := l.cfg.send(append(b, sealed...), handle); err != nil {
		return err
	}
	if !here {
		return errNoRelay
	}
	return nil
}

// bestHandle is the handle of a peer at the best relay; mu is held.
func (l *links) bestHandle(to punch.Key) (handle netip.AddrPort, here bool) {
	var best *relayLink
	for _, k := range l.open {
		if !k.up() || !l.worth(k, l.peers[to]) && !k.here[to] || !l.handles[to][k.id].IsValid() {
			continue
		}
		if best == nil || k.better(best, to) {
			best = k
		}
	}
	if best == nil {
		return netip.AddrPort{}, false
	}
	return l.handles[to][best.id], best.here[to]
}

// run keeps the links until ctx ends.
func (l *links) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	l.mu.Lock()
	l.home.settle(time.Now())
	l.mu.Unlock()
	g.Go(func() error {
		timer := time.NewTimer(linkTick)
		defer timer.Stop()
		told := newSpread(l)
		for ctx.Err() == nil {
			survey := l.survey(time.Now())
			l.judgeAll(time.Now())
			l.choose(ctx, g, time.Now())
			told.update()
			timer.Reset(min(survey, l.tellRecord(time.Now())))
			select {
			case <-ctx.Done():
			case <-timer.C:
			case <-l.wake:
			}
		}
		return nil
	})
	return g.Wait()
}

// choose starts and ends links so that they are the wanted ones.
func (l *links) choose(ctx context.Context, g *errgroup.Group, now time.Time) {
	l.mu.Lock()
	infos := map[punch.Key]relayInfo{}
	for _, r := range l.known() {
		infos[r.key] = r
	}
	use := chooseRelays(l.candidates(now))
	var gone []*relayLink
	for r, k := range l.open {
		if !slices.Contains(use, r) {
			gone = append(gone, k)
			delete(l.open, r)
		}
	}
	var fresh []*relayLink
	for _, r := range use {
		if k := l.open[r]; k != nil {
			k.info = infos[r]
			continue
		}
		if now.Before(l.broken[r]) || l.ids[r] == 0 && len(l.ids) == maxLinkID {
			continue
		}
		if l.ids[r] == 0 {
			l.ids[r] = uint16(len(l.ids) + 1)
		}
		l.opened++
		fresh = append(fresh, &relayLink{id: l.ids[r], boot: l.opened, info: infos[r], began: now, mute: now, here: map[punch.Key]bool{}})
	}
	if len(gone) > 0 {
		l.collectAddrs()
	}
	l.mu.Unlock()
	for _, k := range gone {
		k.cancel()
	}
	for _, k := range fresh {
		l.start(ctx, g, k)
	}
}

// candidates describes all known relays to chooseRelays; mu is held.
func (l *links) candidates(now time.Time) []candidate {
	homes := map[punch.Key]bool{}
	for _, p := range l.peers {
		if (p.online || now.Before(l.demands[p.key])) && len(p.relays) > 0 {
			first := punch.Key(p.relays[0].Relay)
			homes[first] = homes[first] || l.open[first] != nil || !l.shares(p)
		}
	}
	var list []candidate
	for _, r := range l.known() {
		c := candidate{key: r.key, own: r.own, online: r.online, peer: r.peer, trip: l.trips[r.key], home: homes[r.key]}
		if k := l.open[r.key]; k != nil {
			c.linked, c.up = true, k.up()
			c.failed = !c.up && now.Sub(k.began) >= giveUpRelay
		}
		c.failed = c.failed || now.Before(l.broken[r.key])
		if r.own || c.up || len(r.addrs) > 0 {
			list = append(list, c)
		}
	}
	return list
}

// shares reports whether a relay with a link that is up, or may come up, is one
// of the peer's, not counting nodes; mu is held.
func (l *links) shares(p linkPeer) bool {
	return slices.ContainsFunc(p.relays, func(r trust.RelayTrip) bool {
		k := l.open[punch.Key(r.Relay)]
		return k != nil && !k.info.peer && (k.up() || time.Since(k.began) < giveUpRelay)
	})
}

func (l *links) start(ctx context.Context, g *errgroup.Group, k *relayLink) {
	client, err := l.cfg.open(k, k.boot)
	if err != nil {
		l.mu.Lock()
		_, told := l.broken[k.info.key]
		l.broken[k.info.key] = time.Now().Add(reopenRelay)
		l.mu.Unlock()
		if !told {
			l.cfg.log.Warn("relay not used", "relay", k.info.name, "err", err)
		}
		return
	}
	ctx, k.cancel = context.WithCancel(ctx)
	k.client = client
	l.mu.Lock()
	l.open[k.info.key] = k
	l.mu.Unlock()
	g.Go(func() error {
		if err := client.Run(ctx); err != nil && ctx.Err() == nil {
			l.cfg.log.Warn("relay link ended", "relay", l.infoOf(k).name, "err", err)
		}
		return nil
	})
}
