package natlab

import (
	"context"
	"crypto/ecdh"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/crypto/chacha20poly1305"
	"golang.org/x/sync/errgroup"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"overlay/coord"
	"overlay/coord/trust"
	"overlay/punch"
)

// The kinds of signals, and the header before their candidates; see punch.
const (
	kindCall, kindPropose, kindAgree, kindGo, kindMessage = 1, 3, 4, 5, 20

	signalVersion = 1
	typeHost      = byte(punch.Host)
)

// impostor is a member whose program is not ours: it has the keys of a node that is
// down, and tells the others whatever it likes.
type impostor struct {
	host    *Host
	device  ed25519.PrivateKey
	private [32]byte
	self    punch.Key
	mesh    [32]byte

	conn    *coord.Conn
	stream  *coord.Stream
	welcome *coord.Welcome
	// refusals and messages are what came from the server, and from peers by signals
	// of kindMessage.
	refusals chan *coord.Error
	messages chan []byte
	group    errgroup.Group

	peers   map[punch.Key]trust.Key
	counter uint64
}

// mustImpostor takes a member down and its place.
func mustImpostor(t *testing.T, m *mesh, n *member) *impostor {
	t.Helper()
	if err := n.down(t.Context()); err != nil {
		t.Fatal(err)
	}
	var keys struct {
		Device    ed25519.PrivateKey `json:"device"`
		WireGuard wgtypes.Key        `json:"wireguard"`
	}
	var membership struct {
		TrustHash trust.Hash `json:"trustHash"`
	}
	for name, into := range map[string]any{"keys.json": &keys, "mesh.json": &membership} {
		text, err := os.ReadFile(filepath.Join(n.state(), name))
		if err == nil {
			err = json.Unmarshal(text, into)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	i := &impostor{
		host: n.Host, device: keys.Device, private: keys.WireGuard, mesh: membership.TrustHash,
		self: punch.Key(keys.WireGuard.PublicKey()), peers: map[punch.Key]trust.Key{},
		refusals: make(chan *coord.Error, 64), messages: make(chan []byte, 64),
	}
	i.connect(t, m.server.Addr())
	return i
}

func (i *impostor) connect(t *testing.T, server netip.Addr) {
	t.Helper()
	d := &coord.Dialer{Servers: []string{net.JoinHostPort(server.String(), "443")}, Device: i.device}
	d.Connect = func(_ context.Context, to netip.AddrPort) (c net.Conn, err error) {
		err = i.host.inside(func() error {
			c, err = net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(to))
			return err
		})
		return c, err
	}
	var err error
	if i.conn, err = d.Dial(t.Context()); err != nil {
		t.Fatal(err)
	}
	nodes, err := i.conn.Nodes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes.Nodes {
		i.peers[punch.Key(n.WireGuard)] = n.Device
	}
	if i.stream, err = i.conn.Stream(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	first, err := i.stream.Next()
	if err != nil || first.Welcome == nil {
		t.Fatalf("%+v, %v", first, err)
	}
	i.welcome = first.Welcome
	i.group.Go(func() error { i.listen(); return nil })
	t.Cleanup(func() {
		_ = i.stream.Close()
		_ = i.group.Wait()
	})
}

// listen takes what comes until the stream ends.
func (i *impostor) listen() {
	for {
		e, err := i.stream.Next()
		if err != nil {
			return
		}
		switch {
		case e.Refusal != nil:
			offer(i.refusals, e.Refusal)
		case e.Signal != nil:
			if b := i.open(e.Signal); b != nil {
				offer(i.messages, b)
			}
		}
	}
}

func offer[T any](to chan<- T, what T) {
	select {
	case to <- what:
	default:
	}
}

// secret is the key of signals from one key to another, of which one is ours.
func (i *impostor) secret(from, to, peer punch.Key) []byte {
	private, err := ecdh.X25519().NewPrivateKey(i.private[:])
	if err != nil {
		panic(err)
	}
	public, err := ecdh.X25519().NewPublicKey(peer[:])
	if err != nil {
		panic(err)
	}
	root, err := private.ECDH(public)
	if err != nil {
		panic(err)
	}
	key, err := hkdf.Key(sha256.New, root, i.mesh[:], "overlay/v1/signal"+string(from[:])+string(to[:]), 32)
	if err != nil {
		panic(err)
	}
	return key
}

// signalled is what a signal of the impostor says.
type signalled struct {
	kind       byte
	candidates []netip.AddrPort
	side       []byte // of signals about hard rounds
	message    []byte // of kindMessage
}

// tell sends a signal to a peer.
func (i *impostor) tell(t *testing.T, peer punch.Key, s signalled) {
	t.Helper()
	i.counter++
	b := []byte{signalVersion, s.kind}
	// Higher than that of the node whose keys these are.
	b = binary.BigEndian.AppendUint64(b, uint64(time.Now().Add(time.Hour).Truncate(time.Hour).UnixNano()))
	b = binary.BigEndian.AppendUint64(b, i.counter)
	b = append(b, make([]byte, len(punch.Nonce{}))...)
	b = append(b, byte(len(s.candidates)))
	for _, c := range s.candidates {
		ip := c.Addr().As4()
		b = append(append(b, 4<<4|typeHost), ip[:]...)
		b = binary.BigEndian.AppendUint16(b, c.Port())
	}
	b = append(append(b, 0), s.side...) // opened towards nobody
	if s.kind == kindMessage {
		b = binary.BigEndian.AppendUint16(b, uint16(len(s.message)))
		b = append(b, s.message...)
	}
	sealed := sealed(i.secret(i.self, peer, peer), b, nil)
	if err := i.stream.Signal(coord.Signal{Peer: i.peers[peer], Data: sealed}); err != nil {
		t.Error(err)
	}
}

// sealed is XChaCha20-Poly1305 behind a random nonce.
func sealed(key, plaintext, additional []byte) []byte {
	aead, err := chacha20poly1305.NewX(key)
	if err != nil {
		panic(err)
	}
	nonce := make([]byte, chacha20poly1305.NonceSizeX)
	rand.Read(nonce)
	return aead.Seal(nonce, nonce, plaintext, additional)
}

func opened(key, box, additional []byte) []byte {
	aead, err := chacha20poly1305.NewX(key)
	if err != nil || len(box) < chacha20poly1305.NonceSizeX {
		return nil
	}
	b, err := aead.Open(nil, box[:chacha20poly1305.NonceSizeX], box[chacha20poly1305.NonceSizeX:], additional)
	if err != nil {
		return nil
	}
	return b
}

// open gives the message in a signal of kindMessage.
func (i *impostor) open(s *coord.Signal) []byte {
	for peer, device := range i.peers {
		if device != s.Peer {
			continue
		}
		b := opened(i.secret(peer, i.self, peer), s.Data, nil)
		const header = 2 + 8 + 8 + 16
		if len(b) < header+1 || b[1] != kindMessage {
			return nil
		}
		b = b[header:]
		for range 2 { // candidates, and where the NAT is open to; IPv4 only
			size := 1 + 7*int(b[0])
			if len(b) < size+1 {
				return nil
			}
			b = b[size:]
		}
		return b[2:]
	}
	return nil
}

// refusalWait is how long a busy server may take to refuse a record.
const refusalWait = 5 * time.Second

// publish hands a record to the server, and returns its refusal; nil: there is none.
func (i *impostor) publish(t *testing.T, candidates []trust.Endpoint, tokens ...[]byte) *coord.Error {
	t.Helper()
	rec := trust.Record{
		Device: trust.Key(i.device.Public().(ed25519.PublicKey)), Serial: uint64(time.Now().UnixMilli()), Candidates: candidates,
	}
	doc, err := trust.SignRecord(rec, i.device)
	if err != nil {
		t.Fatal(err)
	}
	for len(i.refusals) > 0 { // of what came before
		<-i.refusals
	}
	if err := i.stream.Publish(coord.Publish{Record: doc, Tokens: tokens}); err != nil {
		t.Fatal(err)
	}
	select {
	case e := <-i.refusals:
		return e
	case <-time.After(refusalWait):
		return nil
	}
}

// randomNAT says of a NAT that any port of the address may be the one.
func randomNAT(at netip.AddrPort) []byte {
	b := []byte{byte(punch.AddressAndPortDependent), byte(punch.Random), 0, 0, 0, 0, 0, 0, 0, 0}
	ip := at.Addr().As4()
	return binary.BigEndian.AppendUint16(append(b, ip[:]...), at.Port())
}
