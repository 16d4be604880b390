package trust

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"net/netip"
	"testing"
	"time"
)

// The seeds of the fixed keys.
const (
	rootSeed = iota + 1
	signerSeed
	inviteSeed
	deviceSeed
	serverSeed
	otherSeed // the first one that names nobody
)

// start is when the fixed documents were signed.
const start = 1_700_000_000

func privateKey(seed byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{seed}, ed25519.SeedSize))
}

func key(seed byte) Key { return Key(privateKey(seed).Public().(ed25519.PublicKey)) }

func at(offset time.Duration) time.Time { return time.Unix(start, 0).UTC().Add(offset) }

func pinOf(t testing.TB, seed byte) Hash {
	t.Helper()
	spki, err := x509.MarshalPKIXPublicKey(privateKey(seed).Public())
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(spki)
}

// must unwraps what cannot fail in a test.
func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func testGenesis(t testing.TB) Genesis {
	return Genesis{
		MeshID: [16]byte{1, 2, 3},
		Root:   key(rootSeed),
		Signer: key(signerSeed),
		ULA:    netip.MustParsePrefix("fd12:3456:789a::/48"),
		Pin:    pinOf(t, serverSeed),
	}
}

func testState(t testing.TB) State {
	return State{
		Epoch:   1,
		Name:    "home",
		Prefix4: netip.MustParsePrefix("100.64.0.0/16"),
		Servers: []string{"vpn.example.org:443", "[2001:db8::1]:8443"},
		Pins:    []Pin{{pinOf(t, serverSeed), PinCurrent}, {Hash{1}, PinNext}, {Hash{2}, PinRetired}},
		Signers: []Key{key(signerSeed)},
	}
}

func testInviteCap() InviteCap {
	return InviteCap{
		Invite:    key(inviteSeed),
		Signer:    key(signerSeed),
		NotBefore: at(0),
		NotAfter:  at(24 * time.Hour),
		Uses:      2,
		Tags:      []string{"db", "web"},
	}
}

func testNodeCert(t testing.TB) NodeCert {
	genesis := must(SignGenesis(testGenesis(t), privateKey(rootSeed)))(t)
	return NodeCert{
		Invite:    key(inviteSeed),
		Device:    key(deviceSeed),
		WireGuard: Key{9},
		Name:      "anna-laptop",
		IP4:       netip.MustParseAddr("100.64.0.7"),
		IP6:       DeriveIP6(testGenesis(t).ULA, genesis.Hash(), key(deviceSeed)),
		Tags:      []string{"web"},
		Role:      RoleNode,
		Serial:    1,
		IssuedAt:  at(time.Minute),
	}
}

func testRecord() Record {
	return Record{
		Device:       key(deviceSeed),
		Serial:       start * 1000,
		Nonce:        [16]byte{7, 7},
		RelayPort:    0x8000,
		Capabilities: 1,
		Candidates: []Endpoint{
			{netip.MustParseAddrPort("192.0.2.1:41000"), 2},
			{netip.MustParseAddrPort("[2001:db8::2]:41000"), 1},
		},
	}
}

// document is one of the fixed documents, with the function that opens its
// kind.
type document struct {
	name string
	doc  Document
	open func(Document) (any, error)
}

// opener forgets the type of what open returns.
func opener[T any](open func(Document) (T, error)) func(Document) (any, error) {
	return func(d Document) (any, error) {
		v, err := open(d)
		return v, err
	}
}

func openState(d Document) (State, error) { return OpenState(d, key(rootSeed)) }

func openCertOfCountersigned(d Document) (Document, error) {
	cert, _, _, err := OpenCountersigned(d)
	return cert, err
}

// documents returns one of each kind.
func documents(t testing.TB) []document {
	revocation := Revocation{Target: key(inviteSeed), By: key(signerSeed), From: at(time.Hour)}
	cert := must(SignNodeCert(testNodeCert(t), privateKey(inviteSeed), privateKey(deviceSeed)))(t)
	return []document{
		{"genesis", must(SignGenesis(testGenesis(t), privateKey(rootSeed)))(t), opener(OpenGenesis)},
		{"state", must(SignState(testState(t), privateKey(rootSeed)))(t), opener(openState)},
		{"invite-cap", must(SignInviteCap(testInviteCap(), privateKey(signerSeed)))(t), opener(OpenInviteCap)},
		{"node-cert", cert, opener(OpenNodeCert)},
		{"countersigned", must(Countersign(cert, at(2*time.Minute), privateKey(serverSeed)))(t), opener(openCertOfCountersigned)},
		{"record", must(SignRecord(testRecord(), privateKey(deviceSeed)))(t), opener(OpenRecord)},
		{"revocation", must(SignRevocation(revocation, privateKey(signerSeed)))(t), opener(OpenRevocation)},
	}
}
