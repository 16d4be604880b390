package tun

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// setHosts makes hosts the peers, by their addresses, that have routes of their
// own into the interface, with an MTU each: the kernel then makes no larger
// packets for them, and tells those who do. Only what is routed into the interface
// anyway gets one.
func (l *link) setHosts(hosts map[netip.Prefix]int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || maps.Equal(hosts, l.hosts) {
		return nil
	}
	before := l.hosts
	l.hosts = hosts
	var errs []error
	for p, mtu := range before {
		if hosts[p] == mtu || !l.routed(p) {
			continue
		}
		switch err := l.handle.RouteDel(l.routeTo(p)); {
		case err == nil:
			l.noteEnd(p)
		case !errors.Is(err, unix.ESRCH):
			errs = append(errs, fmt.Errorf("remove route of %s: %w", p, err))
		}
	}
	return errors.Join(append(errs, l.ensureHosts())...)
}

// ensureHosts puts the routes of hosts where they are missing; l.mu is held.
func (l *link) ensureHosts() error {
	for p, mtu := range l.hosts {
		if !l.routed(p) {
			continue
		}
		r := l.routeTo(p)
		r.MTU, r.MTULock = mtu, true
		if err := l.handle.RouteAppend(r); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("route %s with mtu %d: %w", p, mtu, err)
		}
	}
	return nil
}

// routed reports whether an address is routed into the interface.
func (l *link) routed(p netip.Prefix) bool {
	return p.IsSingleIP() && (p.Addr().Is4() || l.ipv6) &&
		slices.ContainsFunc(l.routes, func(r netip.Prefix) bool { return r.Contains(p.Addr()) })
}

// noteEnd remembers that we removed a route; l.mu is held.
func (l *link) noteEnd(p netip.Prefix) {
	if l.ended == nil {
		l.ended = make(map[netip.Prefix]int)
	}
	l.ended[p]++
}

// misses reports whether a route that was removed is one of ours, and by somebody
// else.
func (l *link) misses(p netip.Prefix) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended[p] > 0 {
		if l.ended[p]--; l.ended[p] == 0 {
			delete(l.ended, p)
		}
		return false
	}
	_, host := l.hosts[p]
	return host || slices.ContainsFunc(l.routes, func(r netip.Prefix) bool { return r.Masked() == p.Masked() })
}
