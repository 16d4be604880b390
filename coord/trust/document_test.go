package trust

import (
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// forge signs whatever body it is given, as a hostile holder of the keys could.
func forge(k kind, body []byte, keys ...ed25519.PrivateKey) Document {
	d := binary.BigEndian.AppendUint32([]byte{uint8(k), version}, uint32(len(body)))
	d = append(d, body...)
	text := signedText(k, d)
	for _, key := range keys {
		d = append(d, ed25519.Sign(key, text)...)
	}
	return d
}

// TestValuesOutOfBounds tries each rule on the contents of documents twice: the
// honest signer refuses to sign, and whoever signs all the same is not heard.
func TestValuesOutOfBounds(t *testing.T) {
	root, signer, device := privateKey(rootSeed), privateKey(signerSeed), privateKey(deviceSeed)
	for _, table := range []map[string]message{
		badGenesis(t), badStates(t), badInvites(), badCerts(t), badCountersigned(), badRecords(),
		{"revocation: before 1970": Revocation{Target: key(inviteSeed), By: key(signerSeed), From: time.Unix(-1, 0)}},
	} {
		for name, m := range table {
			t.Run(name, func(t *testing.T) {
				if d, err := seal(m, nil); err == nil {
					t.Errorf("signed as %x", d)
				}
				body := m.appendTo(nil)
				var err error
				switch m.(type) {
				case Genesis:
					_, err = OpenGenesis(forge(m.kind(), body, root))
				case State:
					_, err = openState(forge(m.kind(), body, root))
				case InviteCap:
					_, err = OpenInviteCap(forge(m.kind(), body, signer))
				case NodeCert:
					_, err = OpenNodeCert(forge(m.kind(), body, privateKey(inviteSeed), device))
				case countersigned:
					_, err = openCertOfCountersigned(forge(m.kind(), body, signer))
				case Record:
					_, err = OpenRecord(forge(m.kind(), body, device))
				case Revocation:
					_, err = OpenRevocation(forge(m.kind(), body, signer))
				}
				if !errors.Is(err, ErrEncoding) {
					t.Errorf("opened: %v, want %v", err, ErrEncoding)
				}
			})
		}
	}
}

// weakKey is a point of order 8 on edwards25519.
func weakKey() Key { return littleEndian(order8Y()[0]) }

func badGenesis(t testing.TB) map[string]message {
	genesis := func(change func(*Genesis)) message { g := testGenesis(t); change(&g); return g }
	return map[string]message{
		"genesis: no pin":           genesis(func(g *Genesis) { g.Pin = Hash{} }),
		"genesis: weak signer":      genesis(func(g *Genesis) { g.Signer = weakKey() }),
		"genesis: ULA outside fc00": genesis(func(g *Genesis) { g.ULA = netip.MustParsePrefix("2001:db8::/48") }),
	}
}

func badStates(t testing.TB) map[string]message {
	state := func(change func(*State)) message { s := testState(t); change(&s); return s }
	prefix := netip.MustParsePrefix
	descending := []Key{key(signerSeed), key(otherSeed)}
	slices.SortFunc(descending, func(a, b Key) int { return slices.Compare(b[:], a[:]) })
	return map[string]message{
		"state: epoch 0":              state(func(s *State) { s.Epoch = 0 }),
		"state: epoch 1 with prev":    state(func(s *State) { s.Prev[0] = 1 }),
		"state: epoch 2 without prev": state(func(s *State) { s.Epoch = 2 }),
		"state: no name":              state(func(s *State) { s.Name = "" }),
		"state: public prefix":        state(func(s *State) { s.Prefix4 = prefix("8.8.8.0/24") }),
		"state: prefix around shared": state(func(s *State) { s.Prefix4 = prefix("100.0.0.0/8") }),
		"state: prefix past private":  state(func(s *State) { s.Prefix4 = prefix("192.168.0.0/13") }),
		"state: prefix with host":     state(func(s *State) { s.Prefix4 = prefix("100.64.1.0/16") }),
		"state: prefix too small":     state(func(s *State) { s.Prefix4 = prefix("100.64.0.0/31") }),
		"state: server twice":         state(func(s *State) { s.Servers = []string{"a:1", "a:1"} }),
		"state: server without port":  state(func(s *State) { s.Servers = []string{"a"} }),
		"state: too many servers": state(func(s *State) {
			s.Servers = strings.Fields("a:1 a:2 a:3 a:4 a:5 a:6 a:7 a:8 a:9 b:1 b:2 b:3 b:4 b:5 b:6 b:7 b:8")
		}),
		"state: no current pin":   state(func(s *State) { s.Pins = s.Pins[1:] }),
		"state: pin twice":        state(func(s *State) { s.Pins[1].Hash = s.Pins[0].Hash }),
		"state: pin status":       state(func(s *State) { s.Pins[1].Status = PinRetired + 1 }),
		"state: too many pins":    state(func(s *State) { s.Pins = manyPins(MaxPins + 1) }),
		"state: signer twice":     state(func(s *State) { s.Signers = []Key{key(2), key(2)} }),
		"state: signers descend":  state(func(s *State) { s.Signers = descending }),
		"state: weak signer":      state(func(s *State) { s.Signers = []Key{weakKey()} }),
		"state: too many signers": state(func(s *State) { s.Signers = make([]Key, MaxSigners+1) }),
	}
}

func badInvites() map[string]message {
	invite := func(change func(*InviteCap)) message { c := testInviteCap(); change(&c); return c }
	return map[string]message{
		"invite: before 1970":        invite(func(c *InviteCap) { c.NotBefore = time.Time{} }),
		"invite: after 9999":         invite(func(c *InviteCap) { c.NotAfter = time.Unix(maxTime+1, 0) }),
		"invite: ends as it begins":  invite(func(c *InviteCap) { c.NotAfter = c.NotBefore }),
		"invite: no use":             invite(func(c *InviteCap) { c.Uses = 0 }),
		"invite: too many uses":      invite(func(c *InviteCap) { c.Uses = MaxUses + 1 }),
		"invite: one name, two uses": invite(func(c *InviteCap) { c.Name = "bob" }),
		"invite: bad name":           invite(func(c *InviteCap) { c.Name, c.Uses = "Bob", 1 }),
		"invite: tags descend":       invite(func(c *InviteCap) { c.Tags = []string{"web", "db"} }),
		"invite: tag twice":          invite(func(c *InviteCap) { c.Tags = []string{"web", "web"} }),
		"invite: bad tag":            invite(func(c *InviteCap) { c.Tags = []string{"we b"} }),
		"invite: too many tags":      invite(func(c *InviteCap) { c.Tags = strings.Fields("a b c d e f g h i") }),
	}
}

func badCerts(t testing.TB) map[string]message {
	cert := func(change func(*NodeCert)) message { c := testNodeCert(t); change(&c); return c }
	addr := netip.MustParseAddr
	return map[string]message{
		"cert: bad name":          cert(func(c *NodeCert) { c.Name = "bob\x1b[0m" }),
		"cert: WireGuard bit 255": cert(func(c *NodeCert) { c.WireGuard[31] = 0x80 }),
		"cert: WireGuard zero":    cert(func(c *NodeCert) { c.WireGuard = Key{} }),
		"cert: no IPv4":           cert(func(c *NodeCert) { c.IP4 = addr("0.0.0.0") }),
		"cert: IPv6 is IPv4":      cert(func(c *NodeCert) { c.IP6 = addr("::ffff:100.64.0.7") }),
		"cert: tags descend":      cert(func(c *NodeCert) { c.Tags = []string{"web", "db"} }),
		"cert: role":              cert(func(c *NodeCert) { c.Role = RoleRelay + 1 }),
		"cert: serial 0":          cert(func(c *NodeCert) { c.Serial = 0 }),
		"cert: before 1970":       cert(func(c *NodeCert) { c.IssuedAt = time.Unix(-1, 0) }),
	}
}

func badCountersigned() map[string]message {
	return map[string]message{
		"countersigned: no cert":     countersigned{at: at(0), server: key(signerSeed)},
		"countersigned: long cert":   countersigned{cert: make(Document, maxCert+1), at: at(0), server: key(signerSeed)},
		"countersigned: before 1970": countersigned{cert: Document{1}, at: time.Unix(-1, 0), server: key(signerSeed)},
	}
}

func badRecords() map[string]message {
	record := func(change func(*Record)) message { r := testRecord(); change(&r); return r }
	addrPort := netip.MustParseAddrPort
	return map[string]message{
		"record: port 0":      record(func(r *Record) { r.Candidates[0].Addr = addrPort("192.0.2.1:0") }),
		"record: unspecified": record(func(r *Record) { r.Candidates[0].Addr = addrPort("[::]:1") }),
		"record: multicast":   record(func(r *Record) { r.Candidates[0].Addr = addrPort("[ff02::1]:1") }),
		"record: mapped IPv4": record(func(r *Record) { r.Candidates[0].Addr = addrPort("[::ffff:192.0.2.1]:1") }),
		"record: no type":     record(func(r *Record) { r.Candidates[0].Type = 0 }),
		"record: twice":       record(func(r *Record) { r.Candidates[0] = r.Candidates[1] }),
		"record: too many": record(func(r *Record) {
			r.Candidates = nil
			for i := range uint16(MaxEndpoints + 1) {
				r.Candidates = append(r.Candidates, Endpoint{netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), i+1), 1})
			}
		}),
		"record: relay twice":     record(func(r *Record) { r.Relays = []RelayTrip{{Key{9}, 1}, {Key{9}, 2}} }),
		"record: relay of no key": record(func(r *Record) { r.Relays = make([]RelayTrip, 1) }),
		"record: too many relays": record(func(r *Record) {
			for i := range uint8(MaxRelays + 1) {
				r.Relays = append(r.Relays, RelayTrip{Key{9, i}, 1})
			}
		}),
	}
}

func manyPins(n int) []Pin {
	pins := make([]Pin, n)
	for i := range pins {
		pins[i] = Pin{Hash{uint8(i + 1)}, PinCurrent}
	}
	return pins
}

// TestValuesWithoutEncoding holds what has no octets on the wire, so that only
// the signer can be asked.
func TestValuesWithoutEncoding(t *testing.T) {
	zone := testRecord()
	zone.Candidates[0].Addr = netip.MustParseAddrPort("[fe80::1%eth0]:1")
	long, noULA, noIP4, noPrefix := testGenesis(t), testGenesis(t), testNodeCert(t), testState(t)
	long.ULA = netip.MustParsePrefix("fd00::/64")
	noULA.ULA, noIP4.IP4, noPrefix.Prefix4 = netip.Prefix{}, netip.Addr{}, netip.Prefix{}
	for _, m := range []message{zone, long, noULA, noIP4, noPrefix} {
		if d, err := seal(m, nil); err == nil {
			t.Errorf("signed %+v as %x", m, d)
		}
	}
}

// TestFraming wraps good contents badly. All is signed with the right keys.
func TestFraming(t *testing.T) {
	signer := privateKey(signerSeed)
	body := testInviteCap().appendTo(nil)
	good := forge(kindInviteCap, body, signer)
	if _, err := OpenInviteCap(good); err != nil {
		t.Fatal(err)
	}
	for name, d := range map[string]Document{
		"empty":                nil,
		"header only":          good[:headerSize],
		"no signature":         good[:len(good)-64],
		"signature cut":        good[:len(good)-1],
		"second signature":     forge(kindInviteCap, body, signer, signer),
		"octet after all":      append(good[:len(good):len(good)], 0),
		"octet after body":     forge(kindInviteCap, append(body[:len(body):len(body)], 0), signer),
		"body cut":             forge(kindInviteCap, body[:len(body)-1], signer),
		"another kind":         forge(kindRevocation, body, signer),
		"unknown kind":         forge(99, body, signer),
		"longer than any":      forge(kindInviteCap, make([]byte, MaxDocument), signer),
		"body length 2^32 - 1": append(Document{uint8(kindInviteCap), version, 255, 255, 255, 255}, body...),
		"version 2":            append(Document{uint8(kindInviteCap), version + 1}, good[2:]...),
		"count beyond the end": forge(kindInviteCap, append(body[:len(body)-8:len(body)-8], 255), signer),
		"family 5": forge(kindRecord, append(Record{Device: key(signerSeed)}.appendTo(nil)[:60],
			1, 5, 192, 0, 2, 1, 0, 1, 1), signer),
	} {
		t.Run(name, func(t *testing.T) {
			open := opener(OpenInviteCap)
			if len(d) > 0 && kind(d[0]) == kindRecord {
				open = opener(OpenRecord)
			}
			if v, err := open(d); !errors.Is(err, ErrEncoding) {
				t.Errorf("opened as %+v: %v, want %v", v, err, ErrEncoding)
			}
		})
	}
}

// TestWrongKeys signs with keys that the documents do not name.
func TestWrongKeys(t *testing.T) {
	other, short := privateKey(otherSeed), make(ed25519.PrivateKey, 31)
	for name, sign := range map[string]func() (Document, error){
		"genesis":             func() (Document, error) { return SignGenesis(testGenesis(t), other) },
		"invite":              func() (Document, error) { return SignInviteCap(testInviteCap(), other) },
		"cert invite":         func() (Document, error) { return SignNodeCert(testNodeCert(t), other, privateKey(deviceSeed)) },
		"cert device":         func() (Document, error) { return SignNodeCert(testNodeCert(t), privateKey(inviteSeed), other) },
		"record":              func() (Document, error) { return SignRecord(testRecord(), other) },
		"revocation":          func() (Document, error) { return SignRevocation(Revocation{From: at(0)}, other) },
		"short genesis":       func() (Document, error) { return SignGenesis(testGenesis(t), short) },
		"short state":         func() (Document, error) { return SignState(testState(t), short) },
		"short countersigned": func() (Document, error) { return Countersign(Document{1}, at(0), short) },
	} {
		if d, err := sign(); err == nil {
			t.Errorf("%s: signed as %x", name, d)
		}
	}

	state := must(SignState(testState(t), other))(t)
	if _, err := OpenState(state, key(rootSeed)); !errors.Is(err, ErrSignature) {
		t.Errorf("state of another root: %v, want %v", err, ErrSignature)
	}
	body := testNodeCert(t).appendTo(nil)
	for name, keys := range map[string][]ed25519.PrivateKey{
		"by another invite": {other, privateKey(deviceSeed)},
		"by another device": {privateKey(inviteSeed), other},
		"in wrong order":    {privateKey(deviceSeed), privateKey(inviteSeed)},
	} {
		if _, err := OpenNodeCert(forge(kindNodeCert, body, keys...)); !errors.Is(err, ErrSignature) {
			t.Errorf("certificate %s: %v, want %v", name, err, ErrSignature)
		}
	}
}

// TestKindUnderSignature shows that a signature of one kind is none of another,
// though key and octets be the same.
func TestKindUnderSignature(t *testing.T) {
	d := must(SignRecord(testRecord(), privateKey(deviceSeed)))(t)
	text := signedText(kindRevocation, d[:len(d)-64])
	if ed25519.Verify(privateKey(deviceSeed).Public().(ed25519.PublicKey), text, d[len(d)-64:]) {
		t.Error("the signature of a record holds for a revocation")
	}
}

// TestWeakSigner makes a document without any private key: under the neutral
// point the signature (neutral point, 0) verifies for every text.
func TestWeakSigner(t *testing.T) {
	neutral := Key{0: 1}
	r := Record{Device: neutral}
	d := append(forge(kindRecord, r.appendTo(nil)), append(neutral[:], make([]byte, 32)...)...)
	if !ed25519.Verify(neutral[:], signedText(kindRecord, d[:len(d)-64]), d[len(d)-64:]) {
		t.Fatal("the forged signature does not verify, so this test shows nothing")
	}
	if _, err := OpenRecord(d); !errors.Is(err, ErrSignature) {
		t.Errorf("opened: %v, want %v", err, ErrSignature)
	}
}

// TestTimesLoseFraction: a caller may sign time.Now().
func TestTimesLoseFraction(t *testing.T) {
	r := Revocation{Target: key(inviteSeed), By: key(signerSeed), From: time.Unix(start, 999_999_999)}
	got := must(OpenRevocation(must(SignRevocation(r, privateKey(signerSeed)))(t)))(t)
	if !got.From.Equal(at(0)) || got.From.Location() != time.UTC {
		t.Errorf("from %v, want %v", got.From, at(0))
	}
}

// TestRoundTrip: what is signed is what is opened, whatever it says.
func TestRoundTrip(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		seed := rapid.Byte().Draw(rt, "seed")
		signer := privateKey(seed)
		c := InviteCap{
			Invite:    key(rapid.Byte().Draw(rt, "invite")),
			Signer:    key(seed),
			NotBefore: drawTime(rt, 0, start),
			NotAfter:  drawTime(rt, start+1, maxTime),
			Uses:      rapid.Uint16Range(1, MaxUses).Draw(rt, "uses"),
			Tags:      drawTags(rt),
		}
		d, err := SignInviteCap(c, signer)
		check(rt, c, d, err, OpenInviteCap)

		n := NodeCert{
			Invite:    key(seed),
			Device:    key(seed),
			WireGuard: Key{0: 2, 5: seed},
			Name:      drawName(rt),
			IP4:       netip.AddrFrom4([4]byte{100, 64, seed, 1}),
			IP6:       netip.AddrFrom16([16]byte{0: 0xfd, 15: seed}),
			Tags:      drawTags(rt),
			Role:      Role(rapid.Uint8Range(1, 2).Draw(rt, "role")),
			Serial:    rapid.Uint64Min(1).Draw(rt, "serial"),
			IssuedAt:  drawTime(rt, 0, maxTime),
		}
		d, err = SignNodeCert(n, signer, signer)
		check(rt, n, d, err, OpenNodeCert)
		if len(d) > maxCert {
			rt.Errorf("a certificate of %d octets, over %d", len(d), maxCert)
		}

		r := Record{
			Device:       key(seed),
			Serial:       rapid.Uint64().Draw(rt, "record serial"),
			RelayPort:    rapid.Uint16().Draw(rt, "relay port"),
			Capabilities: rapid.Uint16().Draw(rt, "capabilities"),
			Candidates:   rapid.SliceOfNDistinct(rapid.Custom(drawEndpoint), -1, MaxEndpoints, rapid.ID[Endpoint]).Draw(rt, "candidates"),
		}
		if len(r.Candidates) == 0 {
			r.Candidates = nil
		}
		for i := range rapid.Uint8Max(MaxRelays).Draw(rt, "relays") {
			r.Relays = append(r.Relays, RelayTrip{Key{9, i}, rapid.Uint16().Draw(rt, "trip")})
		}
		d, err = SignRecord(r, signer)
		check(rt, r, d, err, OpenRecord)
	})
}

// TestLongestState: the longest lists that a State may have fit a document.
func TestLongestState(t *testing.T) {
	s := testState(t)
	s.Name = strings.Repeat("n", maxName)
	s.Servers, s.Pins, s.Signers = nil, manyPins(MaxPins), nil
	host := strings.Repeat(strings.Repeat("h", 61)+".", 4) + "h"
	for i := range MaxServers {
		s.Servers = append(s.Servers, host+":"+string([]byte{'1', '0', '0', byte('0' + i/10), byte('0' + i%10)}))
	}
	for i := range MaxSigners {
		s.Signers = append(s.Signers, Key{0: byte(i), 1: 1})
	}
	d := must(SignState(s, privateKey(rootSeed)))(t)
	if got := must(openState(d))(t); !reflect.DeepEqual(got, s) {
		t.Errorf("opened as %+v", got)
	}
}

func check[T any](t *rapid.T, want T, d Document, err error, open func(Document) (T, error)) {
	t.Helper()
	if err != nil {
		t.Fatalf("sign %+v: %v", want, err)
	}
	got, err := open(d)
	if err != nil {
		t.Fatalf("open %+v: %v", want, err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("signed %+v, opened %+v", want, got)
	}
}

func drawTime(t *rapid.T, from, to int64) time.Time {
	return time.Unix(rapid.Int64Range(from, to).Draw(t, "time"), 0).UTC()
}

func drawName(t *rapid.T) string {
	return rapid.StringMatching(`[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?`).Draw(t, "name")
}

func drawTags(t *rapid.T) []string {
	all := []string{"a", "b0", "c-c", strings.Repeat("d", maxName), strings.Repeat("e", maxName), "f", "g", "h"}
	var tags []string
	for _, tag := range all {
		if rapid.Bool().Draw(t, "tag") {
			tags = append(tags, tag)
		}
	}
	return tags
}

func drawEndpoint(t *rapid.T) Endpoint {
	octet := rapid.Byte().Draw(t, "octet")
	addr := netip.AddrFrom4([4]byte{192, 0, 2, octet})
	if rapid.Bool().Draw(t, "v6") {
		addr = netip.AddrFrom16([16]byte{0: 0x20, 15: octet})
	}
	return Endpoint{netip.AddrPortFrom(addr, rapid.Uint16Min(1).Draw(t, "port")), rapid.Uint8Min(1).Draw(t, "type")}
}

// TestBitFlip: no document survives the change of one bit. Steps of three reach
// every octet and every place in an octet.
func TestBitFlip(t *testing.T) {
	for _, d := range documents(t) {
		t.Run(d.name, func(t *testing.T) {
			for bit := 0; bit < len(d.doc)*8; bit += 3 {
				flipped := append(Document{}, d.doc...)
				flipped[bit/8] ^= 1 << (bit % 8)
				if v, err := d.open(flipped); err == nil {
					t.Fatalf("bit %d flipped, opened as %+v", bit, v)
				}
			}
		})
	}
}

// TestSplice: no document survives octets inserted, removed or replaced.
func TestSplice(t *testing.T) {
	docs := documents(t)
	rapid.Check(t, func(rt *rapid.T) {
		d := rapid.SampledFrom(docs).Draw(rt, "document")
		from := rapid.IntRange(0, len(d.doc)).Draw(rt, "from")
		to := rapid.IntRange(from, min(from+64, len(d.doc))).Draw(rt, "to")
		in := rapid.SliceOfN(rapid.Byte(), 0, 64).Draw(rt, "in")
		changed := append(append(append(Document{}, d.doc[:from]...), in...), d.doc[to:]...)
		if string(changed) == string(d.doc) {
			rt.Skip("unchanged")
		}
		if v, err := d.open(changed); err == nil {
			rt.Fatalf("opened as %+v", v)
		}
	})
}
