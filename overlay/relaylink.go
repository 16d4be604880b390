package overlay

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"net"
	"net/netip"
	"slices"

	"overlay/coord"
	"overlay/coord/trust"
	"overlay/punch"
	"overlay/punch/relay"
	"overlay/tun"
)

// maxRelayPorts bounds the ports of the relay that a server tells of, and
// maxRelayDials the addresses at which TLS to a standalone one is tried.
const (
	maxRelayPorts = 4
	maxRelayDials = 3
)

// newLinks connects the links with the rest of the session.
func (s *session) newLinks() *links {
	return newLinks(linksConfig{
		own:    s.own,
		device: func() linkDevice { return s.dev.Load() },
		relays: s.agent.SetRelays,
		open:   s.openLink,
		send: func(b []byte, to netip.AddrPort) error {
			return s.sendUDP(b, to, netip.AddrPort{}, 0)
		},
		servers: s.relayServers,
		publish: s.control.publish,
		arrived: func(k punch.Key) { s.endpoints.renew(k) },
		changed: s.ring,
		mapped:  s.agent.Remapped,
		offers:  s.offers,
		path:    s.pathTo,
		log:     s.log,
	})
}

// openLink makes the client of a link.
func (s *session) openLink(k *relayLink, boot uint64) (relayClient, error) {
	return relay.NewClient(s.linkConfig(k, boot))
}

// linkConfig is how a link is held: those of peers have UDP alone, and are given up
// after some tries.
func (s *session) linkConfig(k *relayLink, boot uint64) relay.ClientConfig {
	dial, tries := func(ctx context.Context) (net.Conn, [16]byte, error) { return s.dialRelay(ctx, k) }, 0
	if k.info.peer {
		dial, tries = nil, peerHellos
	}
	return relay.ClientConfig{
		Relay:       k.info.key,
		PrivateKey:  s.keys.WireGuard,
		Device:      s.keys.Device,
		Credentials: s.credentials,
		Boot:        s.settings.Boot + boot,
		Send:        func(b []byte, to netip.AddrPort) error { return s.sendUDP(b, to, netip.AddrPort{}, 0) },
		Dial:        dial,
		Tries:       tries,
		Deliver:     func(run []byte) { s.dev.Load().Deliver(k.id, run) },
		OnState:     func(st relay.State) { s.links.onState(k, st) },
		OnPeer:      func(p punch.Key, here bool) { s.links.onPeer(k, p, here) },
		Log:         s.log.With("relay", k.info.name),
	}
}

// dialRelay opens a TLS connection to a relay, upgraded to frames, with what
// binds the admission to it.
func (s *session) dialRelay(ctx context.Context, k *relayLink) (net.Conn, [16]byte, error) {
	r := s.links.infoOf(k)
	d := coord.Dialer{Servers: r.servers, Device: s.keys.Device, Verify: r.verify, Proxy: s.control.proxy, Log: s.log}
	conn, err := d.Dial(ctx)
	if err != nil {
		return nil, [16]byte{}, err
	}
	key, err := conn.Export(coord.ExporterRelay)
	if err != nil {
		return nil, [16]byte{}, errors.Join(err, conn.Close())
	}
	frames, err := conn.Upgrade(ctx, coord.RelayPath, coord.RelayProtocol)
	if err != nil {
		return nil, [16]byte{}, errors.Join(err, conn.Close())
	}
	return frames, [16]byte(key), nil
}

// infoOf is what is known now of a link's relay.
func (l *links) infoOf(k *relayLink) relayInfo {
	l.mu.Lock()
	defer l.mu.Unlock()
	return k.info
}

// serverRelay takes in what the server says of the relay inside it.
func (s *session) serverRelay(w *coord.Welcome, conn *coord.Conn) {
	if w.Relay == nil || len(w.Relay.Key) != len(punch.Key{}) {
		return
	}
	c := &cachedRelay{Server: conn.Server(), Key: w.Relay.Key}
	for _, host := range conn.Hosts() {
		for _, port := range w.Relay.Ports[:min(len(w.Relay.Ports), maxRelayPorts)] {
			c.Addrs = append(c.Addrs, netip.AddrPortFrom(host, port))
		}
	}
	s.mu.Lock()
	if old := s.relay; len(c.Addrs) == 0 && old != nil && old.Server == c.Server {
		c.Addrs = old.Addrs // a proxy does not tell them
	}
	s.relay, s.dirty = c, true
	s.mu.Unlock()
	s.links.setOwn(c.info(s.control.verify))
}

// info is the relay as the links take it.
func (c *cachedRelay) info(verify func(trust.Hash) error) relayInfo {
	host, _, err := net.SplitHostPort(c.Server)
	if err != nil {
		host = c.Server
	}
	return relayInfo{key: punch.Key(c.Key), name: host, addrs: c.Addrs, servers: []string{c.Server}, verify: verify}
}

// usable says whether what was read from disk can be a relay.
func (c *cachedRelay) usable() bool {
	return c != nil && len(c.Key) == len(punch.Key{}) && trust.ValidServer(c.Server) == nil
}

// relayServers notes the STUN servers among the relays.
func (s *session) relayServers(list []punch.Server) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.relaySTUN = list
	s.agent.SetServers(stunServers(s.serverSTUN, list))
}

// stunServers joins both lists. The server's relay has the addresses of its STUN,
// which knows us by the connection as soon as there is one.
func stunServers(server, relays []punch.Server) []punch.Server {
	all := slices.Clone(server)
	for _, r := range relays {
		if !slices.ContainsFunc(server, func(s punch.Server) bool { return s.Addr == r.Addr }) {
			all = append(all, r)
		}
	}
	return all
}

// relays lists the standalone relays of the mesh.
func (r *roster) relays() []relayInfo {
	var list []relayInfo
	prefixes := []netip.Prefix{r.mesh.Genesis().ULA, r.mesh.State().Prefix4}
	for _, m := range r.members {
		if m.cert.Role == trust.RoleRelay {
			list = append(list, m.relayInfo(prefixes))
		}
	}
	return list
}

// relayInfo is a member as a relay: its TLS has the port of its UDP, and shows
// the key of the device.
func (m *member) relayInfo(mesh []netip.Prefix) relayInfo {
	info := relayInfo{key: punch.Key(m.cert.WireGuard), name: m.cert.Name, online: m.node.Online, verify: onlyDevice(m.cert.Device)}
	for _, e := range m.record.Candidates[:min(len(m.record.Candidates), relay.MaxAddrs)] {
		if !outside(e.Addr.Addr(), mesh) {
			continue
		}
		info.addrs = append(info.addrs, e.Addr)
		if len(info.servers) < maxRelayDials {
			info.servers = append(info.servers, e.Addr.String())
		}
	}
	return info
}

// outside says whether an address that somebody named may be sent to: it leads
// neither to this machine, nor to all on its link, nor into the mesh.
func outside(a netip.Addr, mesh []netip.Prefix) bool {
	return a.Unmap().IsGlobalUnicast() && !inside(a, mesh)
}

// inside reports whether an address is in one of the prefixes.
func inside(a netip.Addr, list []netip.Prefix) bool {
	return slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Contains(a.Unmap()) })
}

// onlyDevice accepts the key of one device.
func onlyDevice(d trust.Key) func(trust.Hash) error {
	return func(pin trust.Hash) error {
		spki, err := x509.MarshalPKIXPublicKey(ed25519.PublicKey(d[:]))
		if err != nil || pin != sha256.Sum256(spki) {
			return errors.New("this key is not the relay's")
		}
		return nil
	}
}

// linkPeers lists the peers as the links see them.
func (r *roster) linkPeers() []linkPeer {
	list := make([]linkPeer, 0, len(r.members))
	for _, m := range r.members {
		if m.peer() {
			list = append(list, linkPeer{key: punch.Key(m.cert.WireGuard), online: m.node.Online, relays: m.record.Relays})
		}
	}
	return list
}

// receive takes what comes to the UDP port, or out of a flow, and is not for
// wireguard-go.
func (s *session) receive(b []byte, from, at netip.AddrPort) {
	switch {
	case len(b) == 0:
	case b[0] == relay.ControlByte:
		s.links.receive(b, from)
	case b[0] == relay.SignalByte:
		s.relayedSignal(b[1:], from)
	default:
		s.agent.Receive(b, from, at)
	}
}

// relayedSignal takes a signal out of the flow whose handle it came from.
func (s *session) relayedSignal(sealed []byte, from netip.AddrPort) {
	k, ok := s.links.peerOf(from)
	if !ok {
		return
	}
	if err := s.agent.HandleSignal(k, sealed); err != nil {
		s.log.Debug("signal dropped", "peer", tun.Key(k), "err", err)
	}
}

// sendSignal takes both ways: the relay may be the only one that works, or the
// one where the peer is not.
func (s *session) sendSignal(to punch.Key, sealed []byte) error {
	relayed := s.links.signal(to, sealed)
	if err := s.serverSignal(to, sealed); err != nil && relayed != nil {
		return errors.Join(err, relayed)
	}
	return nil
}

func (s *session) serverSignal(to punch.Key, sealed []byte) error {
	s.mu.Lock()
	m, ok := s.roster.device(to)
	s.mu.Unlock()
	if !ok || !m.node.Online {
		return errNoServer
	}
	return s.control.signal(m.node.Device, sealed)
}
