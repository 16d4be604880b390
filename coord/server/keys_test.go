package server

import (
	"crypto/ecdh"
	"testing"
	"time"

	"overlay/coord"
	"overlay/coord/trust"
)

func wireguardOf(n *node) trust.Key {
	k, err := ecdh.X25519().NewPrivateKey(n.wireguard[:])
	if err != nil {
		panic(err)
	}
	return trust.Key(k.PublicKey().Bytes())
}

// nodeCert is what a joining device says of itself.
func nodeCert(t testing.TB, s *Server, n *node, i coord.Invite, reply coord.JoinReply) trust.NodeCert {
	t.Helper()
	look := &txn{ctx: t.Context(), store: s.store}
	mesh, _ := get[meshRecord](look, keyMesh)
	g, err := trust.OpenGenesis(mesh.Genesis)
	if err != nil {
		t.Fatal(err)
	}
	return trust.NodeCert{
		Invite: public(i.Key()), Device: public(n.device), WireGuard: wireguardOf(n), Name: reply.Name, IP4: reply.IP4,
		IP6: trust.DeriveIP6(g.ULA, mesh.Genesis.Hash(), public(n.device)), Role: trust.RoleNode, Serial: 1, IssuedAt: time.Now(),
	}
}

func certFor(t testing.TB, s *Server, n *node, i coord.Invite, reply coord.JoinReply) trust.Document {
	t.Helper()
	doc, err := trust.SignNodeCert(nodeCert(t, s, n, i, reply), i.Key(), n.device)
	if err != nil {
		t.Fatal(err)
	}
	return doc
}
