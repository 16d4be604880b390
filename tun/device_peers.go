package tun

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// peersPerSet bounds one set operation: wireguard-go takes some 85 µs for each
// new peer, and does nothing else meanwhile.
const peersPerSet = 256

// SetPeers makes list the peers of the device. New ones begin with a handle for
// an endpoint: packets to them wait for SetEndpoint. Those that stay keep
// endpoint, session and counters. When it fails it can be repeated.
func (d *Device) SetPeers(list []Peer) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, p := range list {
		if !p.Handle.IsValid() {
			return fmt.Errorf("set peers of %s: a peer without handle address", d.config.Name)
		}
	}
	d.peers.set(list)
	changes := d.diff(list)
	for part := range slices.Chunk(changes, peersPerSet) {
		if err := d.apply(part); err != nil {
			return fmt.Errorf("set peers of %s: %w", d.config.Name, err)
		}
	}
	d.narrow()
	return nil
}

// A peerChange is what to do with one peer: want nil removes it.
type peerChange struct {
	key  Key
	want *Peer
}

func (d *Device) diff(list []Peer) []peerChange {
	var changes []peerChange
	wanted := make(map[Key]bool, len(list))
	for i, p := range list {
		wanted[p.Key] = true
		if before, ok := d.known[p.Key]; !ok || d.failed[p.Key] || !samePeer(before, p) {
			changes = append(changes, peerChange{p.Key, &list[i]})
		}
	}
	for k := range d.known {
		if !wanted[k] {
			changes = append(changes, peerChange{k, nil})
		}
	}
	for k := range d.failed {
		if _, known := d.known[k]; !known && !wanted[k] {
			changes = append(changes, peerChange{k, nil})
		}
	}
	return changes
}

// samePeer compares what wireguard-go knows of a peer.
func samePeer(a, b Peer) bool {
	return a.Keepalive == b.Keepalive && slices.Equal(a.AllowedIPs, b.AllowedIPs)
}

// apply does the changes in one set operation. wireguard-go stops in the middle
// of one that fails: a peer may then exist without an endpoint, and would take
// over that of any packet. So such peers are removed before they are made again.
func (d *Device) apply(changes []peerChange) error {
	var set []wgtypes.PeerConfig
	for _, c := range changes {
		_, known := d.known[c.key]
		if c.want == nil || d.failed[c.key] {
			set = append(set, wgtypes.PeerConfig{PublicKey: c.key, Remove: true, UpdateOnly: true})
			d.starts.forget(c.key)
			known = false
		}
		if c.want != nil {
			set = append(set, d.peerConfig(*c.want, known))
		}
	}
	err := d.configure(set)
	for _, c := range changes {
		switch {
		case err != nil:
			d.failed[c.key] = true
			continue
		case c.want == nil:
			delete(d.known, c.key)
		default:
			d.known[c.key] = *c.want
		}
		delete(d.failed, c.key)
	}
	return err
}

func (d *Device) peerConfig(p Peer, known bool) wgtypes.PeerConfig {
	c := wgtypes.PeerConfig{
		PublicKey:                   p.Key,
		UpdateOnly:                  known,
		PersistentKeepaliveInterval: new(time.Duration),
		ReplaceAllowedIPs:           true,
	}
	if old := d.peers.byKey(p.Key); known && old != nil && old.direct.Load() {
		c.PersistentKeepaliveInterval = &p.Keepalive
	}
	if !known {
		c.Endpoint = net.UDPAddrFromAddrPort(d.bind.handle(p.Key, p.Handle))
	}
	for _, a := range p.AllowedIPs {
		c.AllowedIPs = append(c.AllowedIPs, *ipNet(a))
	}
	return c
}

// SetEndpoint makes to the address to which the peer's packets are sent, from the
// local address of from when that is valid, through the spare socket of its port
// when that is not 0, and sends what waited for it. Inside
// Config.Mesh it takes only the handles of SetWays; with one the peer has no
// persistent keepalive: the link to the relay has its own.
func (d *Device) SetEndpoint(k Key, to, from netip.AddrPort) error {
	to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	relayed := d.config.meshed(to.Addr())
	if !to.IsValid() || relayed && !d.peers.follow(k, to) {
		return fmt.Errorf("set endpoint on %s: neither an address outside the mesh nor a way of the peer", d.config.Name)
	}
	return d.setEndpoint(k, func(p Peer) (netip.AddrPort, time.Duration, error) {
		if relayed {
			d.starts.move(k, to, 0)
			return to, 0, nil
		}
		d.starts.move(k, to, from.Port())
		// Before the write, which looks the path up by address.
		return to, p.Keepalive, d.bind.setPath(k, to, from)
	})
}

// SetRoundTrip says how long a round trip on the path of a peer takes. A flow to
// a peer of whom it is not known is never told that its packets wait.
func (d *Device) SetRoundTrip(k Key, trip time.Duration) {
	if p := d.peers.byKey(k); p != nil {
		p.trip.Store(int64(trip))
	}
}

// ClearEndpoint gives the peer a handle for an endpoint: its packets are dropped
// until SetEndpoint, and nothing is sent to keep it open.
func (d *Device) ClearEndpoint(k Key) error {
	return d.setEndpoint(k, func(p Peer) (netip.AddrPort, time.Duration, error) {
		d.starts.move(k, netip.AddrPort{}, 0)
		return d.bind.handle(k, p.Handle), 0, nil
	})
}

func (d *Device) setEndpoint(k Key, endpoint func(Peer) (netip.AddrPort, time.Duration, error)) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	p, ok := d.known[k]
	if !ok || d.failed[k] {
		return fmt.Errorf("set endpoint on %s: %w", d.config.Name, ErrUnknownPeer)
	}
	to, keepalive, err := endpoint(p)
	if err != nil {
		return fmt.Errorf("set endpoint on %s: %w", d.config.Name, err)
	}
	err = d.configure([]wgtypes.PeerConfig{{
		PublicKey:                   k,
		UpdateOnly:                  true,
		Endpoint:                    net.UDPAddrFromAddrPort(to),
		PersistentKeepaliveInterval: &keepalive,
	}})
	if err != nil {
		return fmt.Errorf("set endpoint on %s: %w", d.config.Name, err)
	}
	return nil
}

// configure writes through the UAPI socket; d.mu is held.
func (d *Device) configure(set []wgtypes.PeerConfig) error {
	if d.closed {
		return ErrClosed
	}
	c := wgtypes.Config{Peers: set}
	err := d.ctl.ConfigureDevice(d.config.Name, c)
	if errors.Is(err, os.ErrNotExist) {
		// Somebody removed the socket's file.
		if err := d.uapi.restore(); err != nil {
			return err
		}
		err = d.ctl.ConfigureDevice(d.config.Name, c)
	}
	return err
}

// Stats asks wireguard-go for the endpoint and counters of all peers. It costs
// some microseconds for each: for status, not for polling.
func (d *Device) Stats() (map[Key]Stats, error) {
	dev, err := d.ctl.Device(d.config.Name)
	if err != nil {
		return nil, fmt.Errorf("read peers of %s: %w", d.config.Name, err)
	}
	list := make(map[Key]Stats, len(dev.Peers))
	for _, p := range dev.Peers {
		s := Stats{RxBytes: p.ReceiveBytes, TxBytes: p.TransmitBytes, LastHandshake: p.LastHandshakeTime}
		if p.Endpoint != nil {
			e := p.Endpoint.AddrPort()
			s.Endpoint = netip.AddrPortFrom(e.Addr().Unmap(), e.Port())
		}
		list[p.PublicKey] = s
	}
	return list, nil
}
