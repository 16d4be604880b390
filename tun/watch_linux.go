package tun

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// burst is how long changes that arrive together are collected into one
	// call. A DHCP renewal is some five messages within a millisecond. The first
	// loss does not wait; those that come with it are collected.
	burst = 10 * time.Millisecond
	// wideRoute is the longest prefix, in bits, whose route can move the path
	// to hosts somewhere on the Internet: default routes, their halves (which
	// VPNs install over a default route) and the like.
	wideRoute = 8
	// defaultRoute is the longest prefix that counts as a default route.
	defaultRoute = 1
)

// A verdict says what an event means for the paths of this host.
type verdict int

const (
	ignored verdict = iota
	moved           // an address or a link changed: tell when the burst is over
	routed          // a route did, which the addresses do not show
	lost            // paths are gone: tell at once
)

// Watch calls changed after every change of the host's addresses, links or wide
// routes that can move paths, until ctx ends. Changes within 10 ms are one
// call; the loss of a default route or of a link with addresses is told at
// once, and what follows it within 10 ms in a second call. routes says that
// paths may have moved although all addresses are as before. Links made by this
// process (TUN) do not count, nor do link-local addresses. changed is called
// from one goroutine, the caller's, and must not block. Watch looks at the
// network namespace of the calling thread and returns nil when ctx ends.
func Watch(ctx context.Context, changed func(routes bool)) error {
	s, err := newEventSocket()
	if err != nil {
		return err
	}
	defer s.close()
	stop := context.AfterFunc(ctx, s.close)
	defer stop()
	w := watcher{sock: s, changed: changed}
	if err := w.seed(); err != nil {
		return err
	}
	return w.run(ctx)
}

// A watcher knows what was last seen of links and addresses: the kernel repeats
// itself (each router advertisement renews the addresses it gave), and only
// differences count.
type watcher struct {
	sock    *eventSocket
	changed func(routes bool)
	due     time.Time // when a collected burst is told; zero: nothing collected
	routes  bool      // what is collected is more than addresses
	told    time.Time // when a loss was, last
	links   map[int]linkState
	addrs   map[addrKey]uint32 // address flags
}

type linkState struct {
	running bool // up and with a carrier
	own     bool // a TUN of this process
}

type addrKey struct {
	link   int
	prefix netip.Prefix
}

func (w *watcher) seed() error {
	w.links, w.addrs = map[int]linkState{}, map[addrKey]uint32{}
	links, err := dump(netlink.LinkList)
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	for _, l := range links {
		a := l.Attrs()
		w.links[a.Index] = linkState{running: running(a.RawFlags), own: isTUN(l) && ownTUN(a.Name)}
	}
	addrs, err := dump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		if p, ok := netipPrefix(a.IPNet); ok && pathAddr(p.Addr()) {
			w.addrs[addrKey{a.LinkIndex, p}] = uint32(a.Flags) & addrStates
		}
	}
	return nil
}

func (w *watcher) run(ctx context.Context) error {
	for {
		if !w.due.IsZero() && !time.Now().Before(w.due) {
			w.tell()
		}
		events, err := w.sock.receive(w.due)
		v := ignored
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.EAGAIN):
			continue // the burst is over
		case errors.Is(err, unix.ENOBUFS):
			if err := w.seed(); err != nil {
				return err
			}
			v = lost // whatever was dropped may have been that
		case err != nil:
			return fmt.Errorf("watch the network: %w", err)
		}
		for _, e := range events {
			v = max(v, w.judge(e))
		}
		w.note(v, time.Now())
	}
}

// note tells of the first loss of a burst, and collects all else.
func (w *watcher) note(v verdict, now time.Time) {
	w.routes = w.routes || v >= routed
	switch {
	case v == lost && now.Sub(w.told) >= burst:
		w.told = now
		w.tell()
	case v != ignored && w.due.IsZero():
		w.due = now.Add(burst)
	}
}

func (w *watcher) tell() {
	routes := w.routes
	w.due, w.routes = time.Time{}, false
	w.changed(routes)
}

func (w *watcher) judge(e event) verdict {
	switch e.kind {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		return w.judgeLink(e)
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		return w.judgeAddr(e)
	}
	switch {
	case w.links[e.link].own || e.prefix.Bits() > wideRoute:
		return ignored
	case e.kind == unix.RTM_DELROUTE && e.prefix.Bits() <= defaultRoute:
		return lost
	}
	return routed
}

// judgeLink tells of a link that starts or stops to work, when it has addresses.
// IPv4 routes vanish with the link without a message of their own.
func (w *watcher) judgeLink(e event) verdict {
	before := w.links[e.link]
	now := linkState{running: e.kind == unix.RTM_NEWLINK && running(e.flags), own: before.own}
	if e.tun && !now.own {
		now.own = ownTUN(e.name)
	}
	if e.kind == unix.RTM_DELLINK {
		delete(w.links, e.link)
	} else {
		w.links[e.link] = now
	}
	switch {
	case now.own || now.running == before.running || !w.addressed(e.link):
		return ignored
	case !now.running:
		return lost
	}
	return moved
}

func (w *watcher) addressed(link int) bool {
	for k := range w.addrs {
		if k.link == link {
			return true
		}
	}
	return false
}

func (w *watcher) judgeAddr(e event) verdict {
	if w.links[e.link].own || !pathAddr(e.prefix.Addr()) {
		return ignored
	}
	k := addrKey{e.link, e.prefix}
	before, known := w.addrs[k]
	if e.kind == unix.RTM_DELADDR {
		delete(w.addrs, k)
		return moved
	}
	now := e.flags & addrStates
	w.addrs[k] = now
	if known && before == now {
		return ignored
	}
	return moved
}
