package trust

import (
	"encoding/hex"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestVectors holds the encoding still: a mesh that exists must stay readable.
func TestVectors(t *testing.T) {
	file, err := os.ReadFile("testdata/vectors.txt")
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{}
	for line := range strings.Lines(string(file)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), " "); ok && name != "#" {
			want[name] = value
		}
	}
	docs := documents(t)
	if len(want) != len(docs) {
		t.Errorf("%d vectors for %d documents", len(want), len(docs))
	}
	for _, d := range docs {
		if got := hex.EncodeToString(d.doc); got != want[d.name] {
			t.Errorf("%s changed; it is now\n%s %s", d.name, d.name, got)
		}
		if _, err := d.open(d.doc); err != nil {
			t.Errorf("open %s: %v", d.name, err)
		}
	}
}

// TestLayout compares documents with the drawings above their types, octet by
// octet, without the encoder.
func TestLayout(t *testing.T) {
	docs := documents(t)
	root, signer, pin := key(rootSeed), key(signerSeed), pinOf(t, serverSeed)
	ula := []byte{0xfd, 0x12, 0x34, 0x56, 0x78, 0x9a}
	meshID := append([]byte{1, 2, 3}, make([]byte, 13)...)
	genesis := slices.Concat([]byte{1, 1, 0, 0, 0, 16 + 32 + 32 + 6 + 32}, meshID, root[:], signer[:], ula, pin[:])
	if got := []byte(docs[0].doc[:len(docs[0].doc)-64]); !slices.Equal(got, genesis) {
		t.Errorf("genesis\n got %x\nwant %x", got, genesis)
	}

	device := key(deviceSeed)
	serial := []byte{0x00, 0x00, 0x01, 0x8b, 0xcf, 0xe5, 0x68, 0x00} // 1,700,000,000,000
	nonce := append([]byte{7, 7}, make([]byte, 14)...)
	host6 := append([]byte{6, 0x20, 0x01, 0x0d, 0xb8}, make([]byte, 11)...)
	record := slices.Concat([]byte{6, 1, 0, 0, 0, 89}, device[:], serial, nonce, []byte{0x80, 0, 0, 1},
		[]byte{2}, []byte{4, 192, 0, 2, 1, 0xa0, 0x28, 2}, host6, []byte{2, 0xa0, 0x28, 1})
	if got := []byte(docs[5].doc[:len(docs[5].doc)-64]); !slices.Equal(got, record) {
		t.Errorf("record\n got %x\nwant %x", got, record)
	}
}

// TestLayoutOfRelays: a record's relays follow what a record without them is.
func TestLayoutOfRelays(t *testing.T) {
	r := testRecord()
	before := encode(r)
	relay := Key{9, 8, 7}
	r.Relays = []RelayTrip{{relay, 0x0102}}
	want := slices.Concat(before, []byte{1}, relay[:], []byte{1, 2})
	want[5] += 1 + 32 + 2 // the length of the body
	if got := encode(r); !slices.Equal(got, want) {
		t.Errorf("record\n got %x\nwant %x", got, want)
	}
}

// TestCountersigned looks at what Open returns beside the certificate.
func TestCountersigned(t *testing.T) {
	docs := documents(t)
	cert, seen, pin, err := OpenCountersigned(docs[4].doc)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(cert, docs[3].doc) {
		t.Error("the certificate inside is another one")
	}
	if !seen.Equal(at(2 * time.Minute)) {
		t.Errorf("seen at %v", seen)
	}
	if pin != pinOf(t, serverSeed) {
		t.Errorf("pin %x", pin)
	}
}
