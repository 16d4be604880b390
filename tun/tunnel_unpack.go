package tun

import (
	"encoding/binary"
	"net/netip"
	"time"
)

// sources tells whether inner source addresses belong to the peer of a call,
// which wireguard-go sees of containers alone. Peers have two, and the call
// remembers two, so that the table is rarely asked.
type sources struct {
	peer   *peer // nil: a stranger, who owns nothing
	first  netip.Addr
	second netip.Addr // the last other one asked for
	owned  bool       // whether that is the peer's
}

// own reports whether an address is the peer's.
func (s *sources) own(a netip.Addr, t *peers) bool {
	if s.peer == nil {
		return false
	}
	if a == s.first {
		return true
	}
	if a != s.second {
		s.second, s.owned = a, t.byAddr(a) == s.peer
	}
	return s.owned
}

// unpack places what a container holds. A record that is not valid ends it.
func (w *writer) unpack(b []byte) {
	src, _ := innerAddrs(b)
	if !w.from.own(src, w.n.peers) {
		w.n.dropped.forged.Add(1)
		return
	}
	r, ok := recordsOf(b)
	for ok && len(r.rest) > 0 {
		var kind uint8
		var p piece
		if kind, p, ok = r.next(); !ok {
			break
		}
		w.record(kind, &p)
	}
	if !ok {
		w.n.dropped.broken.Add(1)
	}
}

// record takes one valid record.
func (w *writer) record(kind uint8, p *piece) {
	if kind == recordReport {
		received := binary.BigEndian.Uint32(p.data)
		missing := binary.BigEndian.Uint32(p.data[reportMissing:])
		w.from.peer.level.report(received, missing, time.Duration(w.n.bind.now()))
		w.from.peer.misses(missing)
		return
	}
	if src, _ := innerAddrs(p.data); !w.from.own(src, w.n.peers) {
		w.n.dropped.forged.Add(1)
		return
	}
	w.place(p)
}
