package overlay

import (
	"fmt"
	"math"
	"time"

	"overlay/punch"
	"overlay/tun"
)

// sameWay reports whether a path is the one that was written last, of which only
// something measured is new.
func sameWay(old, now punch.Path) bool {
	return now.Addr.IsValid() && old.Addr == now.Addr && old.Local == now.Local && old.Also == now.Also && old.AlsoLocal == now.AlsoLocal && old.MTU != now.MTU
}

// resize hands on how large the datagrams of a path may be.
func (e *endpoints) resize(old, now punch.Path) (moved bool) {
	e.dev.SetPathMTU(tun.Key(now.Peer), now.Addr, now.MTU)
	e.log.Info("path mtu", "peer", tun.Key(now.Peer), "datagram", now.MTU, "was", old.MTU)
	e.mu.Lock()
	defer e.mu.Unlock()
	if _, ok := e.current[now.Peer]; ok {
		e.current[now.Peer] = now
	}
	return false
}

// badPath says why a direct path that works is not used; empty: nothing is wrong.
func badPath(p punch.Path) string {
	switch {
	case p.Left.Loss > 0:
		return fmt.Sprintf("the direct path loses %.0f %% of packets", math.Round(100*p.Left.Loss))
	case p.Left.RTT > 0:
		return fmt.Sprintf("the direct path is slow: %v there and back", p.Left.RTT.Round(time.Millisecond))
	}
	return ""
}

// Bytes of the IP and UDP headers of a datagram.
const (
	headers4 = 20 + 8
	headers6 = 40 + 8
)

// packetMTU is the largest IP packet of a direct path, 0 when it is not known.
func packetMTU(p punch.Path) int {
	switch {
	case p.MTU == 0 || p.Type == punch.Relayed:
		return 0
	case p.Addr.Addr().Is4():
		return p.MTU + headers4
	}
	return p.MTU + headers6
}
