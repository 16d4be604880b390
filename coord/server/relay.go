package server

import (
	"context"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sync/errgroup"

	"overlay/coord"
	"overlay/coord/trust"
	"overlay/punch"
	"overlay/punch/relay"
)

const (
	relayKeyPurpose = "overlay/v1/relay-key"
	retainEvery     = time.Minute // besides at once when somebody leaves
	maxRelayRate    = 1_000_000   // Mbit/s
	bytesPerMegabit = 1e6 / 8
)

var errNoNode = errors.New("the credentials are not those of a node of the mesh")

// relayHost is the relay inside the server. Its nodes are the hub's members; it
// has their UDP sockets in common with STUN.
type relayHost struct {
	*relay.Server
	hub   *hub
	log   *slog.Logger
	conns chan relayConn
	done  chan struct{} // closed when nobody takes conns any more
}

// relayConn is a connection that was upgraded, with what binds it to its TLS.
type relayConn struct {
	net.Conn
	binding [16]byte
}

// relaySettings is what a relayHost is made of.
type relaySettings struct {
	key    ed25519.PrivateKey // the server's
	answer func(b []byte, from, at netip.AddrPort) []byte
	rate   int // Mbit/s of one flow; 0: as fast as it goes
}

func newRelayHost(h *hub, log *slog.Logger, c relaySettings) (*relayHost, error) {
	private, err := relayKey(c.key)
	if err != nil {
		return nil, err
	}
	r := &relayHost{hub: h, log: log, conns: make(chan relayConn), done: make(chan struct{})}
	r.Server, err = relay.NewServer(relay.ServerConfig{
		PrivateKey: private, Verify: h.verify, Answer: c.answer,
		FlowRate: uint64(c.rate) * bytesPerMegabit, Log: log,
	})
	return r, err
}

// relayKey is the relay's X25519 key. It follows from the server's, so that
// nodes know the relay again after a restart.
func relayKey(server ed25519.PrivateKey) ([32]byte, error) {
	key, err := hkdf.Key(sha256.New, server.Seed(), nil, relayKeyPurpose, 32)
	if err != nil {
		return [32]byte{}, fmt.Errorf("derive relay key: %w", err)
	}
	return [32]byte(key), nil
}

// welcome tells a node where the relay is.
func (r *relayHost) welcome(ports []uint16) *coord.Relay {
	key := r.PublicKey()
	return &coord.Relay{Key: key[:], Ports: ports}
}

// run serves until ctx ends.
func (r *relayHost) run(ctx context.Context, group *errgroup.Group, sockets []*net.UDPConn) {
	group.Go(func() error { return r.Server.Run(ctx) })
	for _, c := range sockets {
		group.Go(func() error {
			if err := r.ServeUDP(ctx, c); ctx.Err() == nil {
				return err
			}
			return nil // the socket may be closed before it was served at all
		})
	}
	group.Go(func() error {
		defer close(r.done)
		r.take(ctx, group)
		return nil
	})
}

// take serves connections, and drops the nodes of members that left.
func (r *relayHost) take(ctx context.Context, group *errgroup.Group) {
	t := time.NewTicker(retainEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case c := <-r.conns:
			group.Go(func() error {
				err := r.ServeConn(ctx, c.Conn, c.binding)
				r.log.Debug("relay connection ended", "from", c.RemoteAddr(), "err", err)
				return nil
			})
		case <-r.hub.left:
			r.Retain(r.hub.relayed)
		case <-t.C:
			r.Retain(r.hub.relayed)
		}
	}
}

// accept hands an upgraded connection over.
func (r *relayHost) accept(c net.Conn, binding []byte) {
	select {
	case r.conns <- relayConn{c, [16]byte(binding)}:
	case <-r.done:
		_ = c.Close()
	}
}

// verify says whose credentials are. They are compared with those that the
// members have, so their signatures need no second look.
func (h *hub) verify(credentials []byte) (relay.Identity, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	m := h.members[h.credentials[sha256.Sum256(credentials)]]
	if m == nil || m.role != trust.RoleNode {
		return relay.Identity{}, errNoNode
	}
	return relay.Identity{Device: m.node.Device, WireGuard: punch.Key(m.wireguard)}, nil
}

// relayed says whether a device is a node that the relay serves.
func (h *hub) relayed(device [32]byte) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	m := h.members[device]
	return m != nil && m.role == trust.RoleNode
}
