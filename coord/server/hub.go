package server

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"overlay/coord"
	"overlay/coord/store"
	"overlay/coord/trust"
)

const (
	coalesce     = 15 * time.Millisecond // at least so long between two deltas
	grace        = 3 * time.Second       // before a node without a stream is offline
	tick         = 500 * time.Millisecond
	ringCount    = 1024    // frames kept for nodes that come back
	ringBytes    = 4 << 20 // of nodes in them
	signalRate   = 50      // signals a second of one device
	signalBurst  = 100
	resumeMaxLen = 64
)

// hub is the mesh as the streams see it: the members of the store, their
// records and who is connected. Only the store survives a restart; nodes come
// back and publish again. It is safe for concurrent use.
type hub struct {
	log    *slog.Logger
	store  store.Store
	now    func() time.Time
	tokens *tokens
	open   *streams
	boot   string // makes a resume of another run void
	wake   chan struct{}
	left   chan struct{} // holds a token after a member left

	mu          sync.Mutex
	group       *errgroup.Group // nil: not running
	state       trust.Document
	revocations []trust.Document
	members     map[trust.Key]*member
	credentials map[trust.Hash]trust.Key // by hash of trust.Credentials
	storeRev    uint64
	applied     chan struct{} // closed when storeRev grows
	pending     pending
	revision    uint64   // of the netmap's history
	ring        []*frame // the newest part of it
	ringSize    int
	ringFrom    uint64   // what the ring can be resumed from
	snapshot    []*frame // the whole netmap; nil: has changed
}

// member is a node and what is known of its present.
type member struct {
	node      coord.Node
	raw       []byte // node, encoded; nil: has changed
	wireguard trust.Key
	role      trust.Role
	serial    uint64 // of its record
	stream    *stream
	silent    time.Time // since when there is no stream
	lastSeen  time.Time
	signals   *rate.Limiter
}

// pending is what changed since the last delta.
type pending struct {
	nodes       map[trust.Key]struct{}
	removed     []trust.Key
	revocations []trust.Document
	state       bool
}

func (p pending) any() bool {
	return len(p.nodes) > 0 || len(p.removed) > 0 || len(p.revocations) > 0 || p.state
}

// resumePoint names a point of the netmap's history as "boot-revision".
type resumePoint struct {
	boot     string
	revision uint64
}

func (r resumePoint) String() string { return r.boot + "-" + strconv.FormatUint(r.revision, 10) }

func parseResume(s string) (resumePoint, error) {
	boot, number, found := strings.Cut(s, "-")
	if len(s) > resumeMaxLen || !found {
		return resumePoint{}, errors.New("not BOOT-REVISION")
	}
	revision, err := strconv.ParseUint(number, 10, 64)
	return resumePoint{boot, revision}, err
}

func newHub(s store.Store, log *slog.Logger, now func() time.Time) *hub {
	boot := make([]byte, 8)
	_, _ = rand.Read(boot) // fills it or ends the program
	return &hub{
		log: log, store: s, now: now, tokens: newTokens(now),
		boot:        hex.EncodeToString(boot),
		wake:        make(chan struct{}, 1),
		left:        make(chan struct{}, 1),
		open:        &streams{sessions: map[sessionID]*stream{}},
		members:     map[trust.Key]*member{},
		credentials: map[trust.Hash]trust.Key{},
		applied:     make(chan struct{}),
		pending:     pending{nodes: map[trust.Key]struct{}{}},
	}
}

// run keeps the hub up to date and its streams served until ctx ends.
func (h *hub) run(ctx context.Context, group *errgroup.Group) {
	h.mu.Lock()
	h.group = group
	h.mu.Unlock()
	group.Go(func() error { return h.follow(ctx) })
	group.Go(func() error { h.deliver(ctx); return nil })
	group.Go(func() error { h.watchClocks(ctx); return nil })
	group.Go(func() error {
		<-ctx.Done()
		h.stop()
		return nil
	})
}

func (h *hub) stop() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.group = nil
	h.open.close()
}

// load reads the whole mesh from the store. What is no longer there was removed
// since.
func (h *hub) load(ctx context.Context) error {
	entries, revision, err := h.store.List(ctx, "")
	if err != nil {
		return fmt.Errorf("load the mesh: %w", err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	first := h.storeRev == 0
	gone := make(map[trust.Key]bool, len(h.members))
	for device := range h.members {
		gone[device] = true
	}
	h.revocations = nil
	for _, e := range entries {
		device, err := h.apply(store.Change{Entry: e})
		if err != nil {
			return err
		}
		delete(gone, device)
	}
	for device := range gone {
		h.remove(device)
	}
	if first {
		h.pending = pending{nodes: map[trust.Key]struct{}{}} // nobody knows an older mesh
	}
	h.advance(revision)
	return nil
}

// follow applies what the store commits.
func (h *hub) follow(ctx context.Context) error {
	for {
		h.mu.Lock()
		from := h.storeRev
		h.mu.Unlock()
		err := h.watch(ctx, from)
		if ctx.Err() != nil {
			return nil
		}
		if !errors.Is(err, store.ErrCompacted) {
			return fmt.Errorf("follow the store: %w", err)
		}
		if err := h.load(ctx); err != nil {
			return err
		}
	}
}

func (h *hub) watch(ctx context.Context, from uint64) error {
	for change, err := range h.store.Watch(ctx, "", from) {
		if err != nil {
			return err
		}
		h.mu.Lock()
		_, err = h.apply(change)
		h.advance(change.Revision)
		h.mu.Unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

// apply takes in one entry of the store and gives the device it is about, if
// any. The caller holds mu.
func (h *hub) apply(c store.Change) (trust.Key, error) {
	switch {
	case c.Deleted:
		return trust.Key{}, nil // only reservations and claims are ever deleted
	case c.Key == keyMesh:
		mesh, err := decodeValue[meshRecord](c.Entry)
		h.state, h.pending.state = mesh.State, true
		h.changed()
		return trust.Key{}, err
	case strings.HasPrefix(c.Key, keyRevocation):
		doc, err := decodeValue[trust.Document](c.Entry)
		h.revocations = append(h.revocations, doc)
		h.pending.revocations = append(h.pending.revocations, doc)
		h.changed()
		return trust.Key{}, err
	case strings.HasPrefix(c.Key, keyNode):
		n, err := decodeValue[nodeRecord](c.Entry)
		if err != nil || !n.member() {
			h.remove(n.Device)
			return trust.Key{}, err
		}
		h.put(n)
		return n.Device, nil
	}
	return trust.Key{}, nil
}

func (h *hub) put(n nodeRecord) {
	m := h.members[n.Device]
	if m == nil {
		m = &member{signals: rate.NewLimiter(signalRate, signalBurst)}
		h.members[n.Device] = m
	}
	delete(h.credentials, m.credentials())
	m.node.Device, m.node.Cap, m.node.Cert = n.Device, n.Cap, n.Cert
	m.wireguard, m.role = n.WireGuard, n.role()
	h.credentials[m.credentials()] = n.Device
	h.touch(m)
}

// credentials is the hash of what the member shows a relay.
func (m *member) credentials() trust.Hash {
	return sha256.Sum256(trust.Credentials(m.node.Cap, m.node.Cert))
}

func (h *hub) remove(device trust.Key) {
	m := h.members[device]
	if m == nil {
		return
	}
	delete(h.members, device)
	delete(h.credentials, m.credentials())
	delete(h.pending.nodes, device)
	h.pending.removed = append(h.pending.removed, device)
	if m.stream != nil {
		m.stream.close()
	}
	select {
	case h.left <- struct{}{}:
	default:
	}
	h.changed()
}

// touch marks a member for the next delta.
func (h *hub) touch(m *member) {
	m.raw = nil
	h.pending.nodes[m.node.Device] = struct{}{}
	h.changed()
}

func (h *hub) changed() {
	h.snapshot = nil
	select {
	case h.wake <- struct{}{}:
	default:
	}
}

func (h *hub) advance(revision uint64) {
	h.storeRev = max(h.storeRev, revision)
	close(h.applied)
	h.applied = make(chan struct{})
}

// await waits until the hub knows what the store had at a revision.
func (h *hub) await(ctx context.Context, revision uint64) error {
	for {
		h.mu.Lock()
		have, applied := h.storeRev, h.applied
		h.mu.Unlock()
		if have >= revision {
			return nil
		}
		select {
		case <-applied:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// deliver sends what changed. The first change goes at once, those that follow
// closely go together.
func (h *hub) deliver(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-h.wake:
		}
		h.flush()
		select {
		case <-ctx.Done():
			return
		case <-time.After(coalesce):
		}
	}
}

// flush encodes what changed once and queues it for every stream.
func (h *hub) flush() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.pending.any() {
		return
	}
	rest := coord.Netmap{Revocations: h.pending.revocations, Removed: h.pending.removed}
	if h.pending.state {
		rest.State = h.state
	}
	parts := make([]part, 0, len(h.pending.nodes))
	for device := range h.pending.nodes {
		if m := h.members[device]; m != nil {
			parts = append(parts, m.encoded())
		}
	}
	h.pending = pending{nodes: map[trust.Key]struct{}{}}
	h.revision++
	frames := netmapFrames(false, rest, parts, resumePoint{h.boot, h.revision})
	h.remember(frames)
	for _, m := range h.members {
		if m.stream != nil {
			m.stream.send(frames...)
		}
	}
}

func (m *member) encoded() part {
	if m.raw == nil {
		m.raw = single(m.node).head
	}
	return part{m.node.Device, m.raw}
}

// remember keeps frames for nodes that come back soon.
func (h *hub) remember(frames []*frame) {
	for _, f := range frames {
		h.ring = append(h.ring, f)
		h.ringSize += f.partBytes
	}
	for len(h.ring) > ringCount || h.ringSize > ringBytes && len(h.ring) > 0 {
		h.ringSize -= h.ring[0].partBytes
		h.ringFrom = h.ring[0].revision
		h.ring[0] = nil
		h.ring = h.ring[1:]
	}
}

// whole is the netmap as it is now. The caller holds mu.
func (h *hub) whole() []*frame {
	if h.snapshot == nil {
		parts := make([]part, 0, len(h.members))
		for _, m := range h.members {
			parts = append(parts, m.encoded())
		}
		rest := coord.Netmap{State: h.state, Revocations: h.revocations}
		h.snapshot = netmapFrames(true, rest, parts, resumePoint{h.boot, h.revision})
	}
	return h.snapshot
}

// since is what happened after a resume point, or the whole netmap when the
// ring does not reach back to it. It is never empty, so that a node knows when
// it is up to date.
func (h *hub) since(resume string) []*frame {
	at, err := parseResume(resume)
	if err != nil || at.boot != h.boot || at.revision < h.ringFrom || at.revision > h.revision {
		return h.whole()
	}
	first := len(h.ring)
	for first > 0 && h.ring[first-1].revision > at.revision {
		first--
	}
	if len(h.ring)-first > maxQueue/2 {
		return h.whole()
	}
	if first == len(h.ring) {
		return netmapFrames(false, coord.Netmap{}, nil, resumePoint{h.boot, h.revision})
	}
	return h.ring[first:len(h.ring):len(h.ring)]
}
