package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"overlay/coord"
	"overlay/coord/trust"
)

func (s *Server) hello(c call) (any, error) {
	t := &txn{ctx: c.r.Context(), store: s.store}
	mesh, founded := get[meshRecord](t, keyMesh)
	if t.err != nil {
		return nil, t.err
	}
	h := coord.Hello{
		Genesis: mesh.Genesis, State: mesh.State,
		Challenge: c.challenge.PublicKey().Bytes(), Time: time.Now().UTC(),
	}
	if !founded {
		h.Plan = &coord.Plan{Name: s.mesh, Prefix4: s.registry.prefix, Servers: []string{s.public}}
	}
	return h, nil
}

func (s *Server) own(c call) (any, error) {
	q, err := decodeBody[coord.OwnRequest](c)
	if err != nil {
		return nil, err
	}
	cert, err := trust.OpenNodeCert(q.Cert)
	if err != nil {
		return nil, refuse(coord.CodeBadRequest, "the certificate is not acceptable: %v", err)
	}
	invite, err := s.registry.ownerInvite(c.r.Context())
	if err != nil {
		return nil, err
	}
	err = c.prove(invite, cert.WireGuard, q.Proofs)
	if errors.Is(err, errInviteProof) {
		err = voidOwnerInvite() // the likely reason
	}
	if err != nil {
		return nil, err
	}
	a := applicant{device: c.device, invite: invite, wireguard: cert.WireGuard}
	doc, err := s.registry.found(c.r.Context(), a, q)
	if err != nil {
		return nil, err
	}
	s.log.Info("mesh founded", "owner", cert.Name, "address", cert.IP4)
	return coord.CertReply{Cert: doc}, s.ready(c)
}

func (s *Server) join(c call) (any, error) {
	q, err := decodeBody[coord.JoinRequest](c)
	if err != nil {
		return nil, err
	}
	relay := q.Role == trust.RoleRelay.String()
	if !relay && q.Role != "" {
		return nil, refuse(coord.CodeBadRequest, "there is no role %.20q", q.Role)
	}
	err = c.prove(q.Invite, q.WireGuard, q.Proofs)
	if errors.Is(err, errInviteProof) {
		err = refuse(coord.CodeBadProof, "%v", err)
	}
	if err != nil {
		return nil, err
	}
	a := applicant{device: c.device, invite: q.Invite, wireguard: q.WireGuard, name: q.Name, exact: q.Exact, relay: relay}
	reply, err := s.registry.reserve(c.r.Context(), a)
	if err != nil {
		return nil, err
	}
	s.log.Info("reserved", "name", reply.Name, "address", reply.IP4)
	return reply, nil
}

func (s *Server) cert(c call) (any, error) {
	q, err := decodeBody[coord.CertRequest](c)
	if err != nil {
		return nil, err
	}
	doc, err := s.registry.commit(c.r.Context(), c.device, q.Cert)
	if err != nil {
		return nil, err
	}
	s.log.Info("joined", "device", c.device)
	return coord.CertReply{Cert: doc}, s.ready(c)
}

func (s *Server) revoke(c call) (any, error) {
	q, err := decodeBody[coord.RevokeRequest](c)
	if err != nil {
		return nil, err
	}
	if err := s.registry.revoke(c.r.Context(), c.device, q.Revocation); err != nil {
		return nil, err
	}
	s.log.Info("revocation taken", "from", c.device)
	return struct{}{}, nil
}

func (s *Server) addInvite(c call) (any, error) {
	q, err := decodeBody[coord.InviteRequest](c)
	if err != nil {
		return nil, err
	}
	return struct{}{}, s.registry.invite(c.r.Context(), c.device, q.Cap)
}

func (s *Server) listInvites(c call) (any, error) {
	infos, err := s.registry.invites(c.r.Context(), c.device)
	return coord.InviteList{Invites: infos}, err
}

func (s *Server) listNodes(c call) (any, error) {
	infos, err := s.registry.nodes(c.r.Context(), c.device)
	for i := range infos {
		infos[i].Online, infos[i].LastSeen = s.hub.presence(infos[i].Device)
	}
	return coord.NodeList{Nodes: infos}, err
}

// address tells a member the address its connection comes from. A node asks from
// the port that it wants a peer to connect to.
func (s *Server) address(c call) (any, error) {
	if !s.hub.knows(c.device) {
		return nil, refuse(coord.CodeNotMember, "only members are told their address")
	}
	from, err := netip.ParseAddrPort(c.r.RemoteAddr)
	if err != nil {
		return nil, fmt.Errorf("read address of the connection: %w", err)
	}
	return coord.Seen{Address: netip.AddrPortFrom(from.Addr().Unmap(), from.Port())}, nil
}

// upgrade turns the connection into a stream.
func (s *Server) upgrade(w http.ResponseWriter, c call) error {
	conn, key, err := s.takeOver(w, c, protocol{"overlay", coord.ExporterSTUN})
	if conn == nil {
		return err
	}
	st := &stream{device: c.device, key: key, conn: conn}
	welcome := coord.Welcome{STUN: s.stunPorts, Time: time.Now().UTC(), Relay: s.relay.welcome(s.stunPorts)}
	if !s.hub.attach(st, welcome, c.r.Header.Get(coord.HeaderResume)) {
		_ = conn.Close()
	}
	return nil
}

// upgradeRelay turns the connection into one to the relay.
func (s *Server) upgradeRelay(w http.ResponseWriter, c call) error {
	conn, key, err := s.takeOver(w, c, protocol{coord.RelayProtocol, coord.ExporterRelay})
	if conn == nil {
		return err
	}
	s.relay.accept(conn, key)
	return nil
}

// protocol is what a connection can be upgraded to, and the label of the key
// that both ends derive for it.
type protocol struct{ name, label string }

// takeOver answers a member's request for another protocol and takes the
// connection away from HTTP. conn is nil when that was refused, or when nobody
// is there any more.
func (s *Server) takeOver(w http.ResponseWriter, c call, p protocol) (conn net.Conn, key []byte, err error) {
	if !strings.EqualFold(c.r.Header.Get("Upgrade"), p.name) {
		return nil, nil, refuse(coord.CodeBadRequest, "this is only for Upgrade: %s", p.name)
	}
	if err := s.ready(c); err != nil {
		return nil, nil, err
	}
	if key, err = c.exporter(p.label); err != nil {
		return nil, nil, fmt.Errorf("export key of the connection: %w", err)
	}
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, nil, fmt.Errorf("take over the connection: %w", err)
	}
	// From here on there is nobody to answer an error to.
	_, err = fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n%s: %d\r\n\r\n",
		p.name, coord.HeaderVersion, coord.Version)
	if err != nil || rw.Reader.Buffered() > 0 || conn.SetDeadline(time.Time{}) != nil {
		_ = conn.Close()
		return nil, nil, nil
	}
	return conn, key, nil
}

// ready waits until the hub knows the member that the store knows, so that the
// next thing the device does is a member's.
func (s *Server) ready(c call) error {
	revision, err := s.registry.member(c.r.Context(), c.device)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(c.r.Context(), writeDeadline)
	defer cancel()
	if err := s.hub.await(ctx, revision); err != nil {
		return fmt.Errorf("wait for the netmap: %w", err)
	}
	c.release()
	return nil
}
