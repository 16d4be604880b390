package tun

import (
	"errors"
	"fmt"
	"time"

	"golang.zx2c4.com/wireguard/device"
)

// Rebind closes all sockets and opens them again on the same ports, those of
// OpenSockets too; sessions and endpoints stay. What waited in them is dropped:
// after a sleep that is old initiations, of which wireguard-go would answer the
// first and take the newest for a flood. Where the WireGuard port is taken by then,
// a free one is used. While it fails nothing is sent or received, and it can be
// repeated. It must not be called from Config.Receive or Config.Demand. The sockets
// are made in the network namespace of the calling thread.
func (d *Device) Rebind() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return ErrClosed
	}
	if port := d.bind.port(); port != 0 {
		d.port = port
	}
	return d.rebind(d.port)
}

// rebind opens the sockets on a port, or on a free one. Call with mu held.
func (d *Device) rebind(port uint16) error {
	err := d.wg.IpcSet(fmt.Sprintf("listen_port=%d\n", port))
	if err == nil {
		return nil
	}
	if again := d.wg.IpcSet("listen_port=0\n"); again != nil {
		return fmt.Errorf("open udp port %d of %s again: %w", port, d.config.Name, errors.Join(err, again))
	}
	d.log.Warn("udp port changed", "was", port, "now", d.bind.port(), "err", err)
	return nil
}

// ExpireSessions ends all sessions for sending, because they may be older than
// they seem: the clock that wireguard-go measures them with stands still while
// the machine sleeps. Peers that start handshakes are asked for one through
// Config.SessionUnknown; to the others StartHandshake sends one. What peers send in
// old sessions is still taken, as far as their keys allow.
func (d *Device) ExpireSessions() {
	d.starts.expire(d.sessions())
	for _, p := range d.peers.all() {
		wg := d.wg.LookupPeer(device.NoisePublicKey(p.key))
		if wg == nil {
			continue
		}
		wg.ExpireCurrentKeypairs()
		if !p.initiate.Load() && p.pathed.Load() && d.config.SessionUnknown != nil {
			d.config.SessionUnknown(p.key)
		}
	}
}

// all lists the peers.
func (t *peers) all() []*peer {
	t.mu.RLock()
	defer t.mu.RUnlock()
	list := make([]*peer, 0, len(t.keys))
	for _, p := range t.keys {
		list = append(list, p)
	}
	return list
}

// expire has the sessions there are count no more.
func (h *handshakes) expire(sessions map[Key]time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.read, h.sessions = time.Now(), sessions
	for k, at := range sessions {
		h.of(k).dead = at
	}
}
