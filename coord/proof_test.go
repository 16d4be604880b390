package coord

import (
	"bytes"
	"crypto/ecdh"
	"crypto/ed25519"
	"encoding/hex"
	"net/http"
	"testing"

	"overlay/coord/trust"
)

// testWireGuard is a fixed X25519 private key for each name.
func testWireGuard(name string) [32]byte { return [32]byte(testKey("wg " + name).Seed()) }

func x25519(t *testing.T, private [32]byte) *ecdh.PrivateKey {
	t.Helper()
	k, err := ecdh.X25519().NewPrivateKey(private[:])
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func sequence(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i)
	}
	return b
}

func TestProofVectors(t *testing.T) {
	challenge := x25519(t, testWireGuard("server"))
	w := x25519(t, testWireGuard("anna"))
	p, err := prove(sequence(32), challenge.PublicKey().Bytes(), keys{testKey("invite"), testKey("anna"), testWireGuard("anna")})
	if err != nil {
		t.Fatal(err)
	}
	for name, v := range map[string]struct {
		got  []byte
		want string
	}{
		"invite":    {p.Invite, vectorInvite},
		"wireguard": {p.WireGuard, vectorWireGuard},
		"message":   {InviteProofMessage([]byte{1, 2}, trust.Key{3}, trust.Key{4})[:18], "6f7665726c61792f76312f6a6f696e000102"},
	} {
		if got := hex.EncodeToString(v.got); got != v.want {
			t.Errorf("%s: %s, want %s", name, got, v.want)
		}
	}
	// The server knows the challenge's private key and W.
	shared, err := challenge.ECDH(w.PublicKey())
	if err != nil {
		t.Fatal(err)
	}
	far := WireGuardProof(shared, sequence(32), [32]byte(challenge.PublicKey().Bytes()), publicKey(testKey("anna")), trust.Key(w.PublicKey().Bytes()))
	if !bytes.Equal(far, p.WireGuard) {
		t.Error("the server computes another proof")
	}
}

const (
	// Ed25519 of the message above is deterministic (RFC 8032 section 5.1.6).
	vectorInvite = "2dc771ee3f712726cc7c349a26b72748a01802534df4a0e9fe9bb3bc658a033255e1b0a0558a636075b0288160c5d6eede0942e138df3b9ca5b46d1b920d0905"
	// Computed by another implementation of X25519, HKDF and HMAC.
	vectorWireGuard = "2aa59b48f66561c22edddcf0f9450a37e38ef7d2aa6ae221c214c8e2bdd1a26f"
)

// Every input changes the proof.
func TestWireGuardProofBindsAll(t *testing.T) {
	seen := map[string]string{}
	for name, p := range map[string][]byte{
		"base":      WireGuardProof([]byte{1}, []byte{2}, [32]byte{3}, trust.Key{4}, trust.Key{5}),
		"shared":    WireGuardProof([]byte{9}, []byte{2}, [32]byte{3}, trust.Key{4}, trust.Key{5}),
		"exporter":  WireGuardProof([]byte{1}, []byte{9}, [32]byte{3}, trust.Key{4}, trust.Key{5}),
		"challenge": WireGuardProof([]byte{1}, []byte{2}, [32]byte{9}, trust.Key{4}, trust.Key{5}),
		"device":    WireGuardProof([]byte{1}, []byte{2}, [32]byte{3}, trust.Key{9}, trust.Key{5}),
		"wireguard": WireGuardProof([]byte{1}, []byte{2}, [32]byte{3}, trust.Key{4}, trust.Key{9}),
	} {
		if other, ok := seen[string(p)]; ok {
			t.Errorf("%s and %s give the same proof", name, other)
		}
		seen[string(p)] = name
	}
}

func TestProveRefusesBadChallenges(t *testing.T) {
	for name, challenge := range map[string][]byte{"short": sequence(31), "long": sequence(33), "low order": make([]byte, 32), "none": nil} {
		if _, err := prove(sequence(32), challenge, keys{testKey("invite"), testKey("anna"), testWireGuard("anna")}); err == nil {
			t.Errorf("%s: proved", name)
		}
	}
}

// A proof that somebody passes on is worth nothing on their own connection.
func TestProofIsBoundToTheConnection(t *testing.T) {
	exporters := make(chan []byte, 2)
	addr := serve(t, testKey("server"), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		x, err := r.TLS.ExportKeyingMaterial(ExporterJoin, nil, exporterSize)
		if err != nil {
			t.Error(err)
		}
		exporters <- x
		reply(w, http.StatusOK, Hello{Challenge: x25519(t, testWireGuard("server")).PublicKey().Bytes()})
	}))
	one, two := dial(t, addr), dial(t, addr)
	hello, err := one.Hello(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := two.Hello(t.Context()); err != nil {
		t.Fatal(err)
	}
	p, err := one.Prove(hello, testKey("invite"), testKey("anna"), testWireGuard("anna"))
	if err != nil {
		t.Fatal(err)
	}
	d, w := publicKey(testKey("anna")), trust.Key(x25519(t, testWireGuard("anna")).PublicKey().Bytes())
	shared, err := x25519(t, testWireGuard("server")).ECDH(x25519(t, testWireGuard("anna")).PublicKey())
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []bool{true, false} {
		x := <-exporters
		invite := ed25519.Verify(testKey("invite").Public().(ed25519.PublicKey), InviteProofMessage(x, d, w), p.Invite)
		wireguard := bytes.Equal(WireGuardProof(shared, x, [32]byte(hello.Challenge), d, w), p.WireGuard)
		if invite != want || wireguard != want {
			t.Errorf("connection %d: invite proof %t, WireGuard proof %t, want %t", i, invite, wireguard, want)
		}
	}
}
