package trust

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
)

// admission is the room for credentials in a relay's ADMIT message of 1,000
// bytes: the head, session, sequence, cookie, W, the length, the signature and
// the MAC take the rest.
const admission = 1000 - (4 + 8 + 16 + 16 + 32 + 2 + 64 + 16)

// credentials are those of a device whose name, tags and forced name are as
// long as asked.
func credentials(t testing.TB, name, forced int, tags ...string) []byte {
	t.Helper()
	granted, cert := testInviteCap(), testNodeCert(t)
	cert.Name = strings.Repeat("n", name)
	granted.Tags, cert.Tags = tags, tags
	if forced > 0 {
		granted.Name, granted.Uses = strings.Repeat("n", forced), 1
	}
	doc := must(SignNodeCert(cert, privateKey(inviteSeed), privateKey(deviceSeed)))(t)
	return Credentials(
		must(SignInviteCap(granted, privateKey(signerSeed)))(t),
		must(Countersign(doc, at(0), privateKey(serverSeed)))(t),
	)
}

// tagsOf are n tags of a length.
func tagsOf(n, length int) []string {
	tags := make([]string, n)
	for i := range tags {
		tags[i] = fmt.Sprintf("%d%s", i, strings.Repeat("t", length-1))
	}
	return tags
}

// TestCredentialsSize: what fits into one datagram of admission, and that the
// longest there are keep to MaxCredentials.
func TestCredentialsSize(t *testing.T) {
	for _, x := range []struct {
		name, forced, tags, length int
		fits                       bool
	}{
		{name: 12, fits: true},
		{name: maxName, forced: maxName, fits: true},
		{name: maxName, tags: MaxTags, length: 14, fits: true},
		{name: maxName, tags: MaxTags, length: 15},
		{name: maxName, forced: maxName, tags: MaxTags, length: 10, fits: true},
		{name: maxName, forced: maxName, tags: MaxTags, length: 11},
		{name: maxName, forced: maxName, tags: 1, length: maxName, fits: true},
		{name: maxName, tags: 2, length: maxName},
		{name: maxName, forced: maxName, tags: MaxTags, length: maxName},
	} {
		b := credentials(t, x.name, x.forced, tagsOf(x.tags, x.length)...)
		if fits := len(b) <= admission; fits != x.fits {
			t.Errorf("%+v: %d bytes of %d", x, len(b), admission)
		}
		if _, _, err := SplitCredentials(b); err != nil {
			t.Errorf("%+v: %v", x, err)
		}
	}
}

func TestSplitCredentials(t *testing.T) {
	docs := documents(t)
	granted, cert, seen := docs[2].doc, docs[3].doc, docs[4].doc
	a, b, err := SplitCredentials(Credentials(granted, seen))
	if err != nil || !bytes.Equal(a, granted) || !bytes.Equal(b, seen) {
		t.Fatalf("%x, %x: %v", a, b, err)
	}
	whole := Credentials(granted, seen)
	for name, bad := range map[string][]byte{
		"nothing":            nil,
		"length only":        whole[:2],
		"cut short":          whole[:len(whole)-1],
		"without cert":       whole[:2+len(granted)],
		"longer":             append(bytes.Clone(whole), 0),
		"too long":           append(bytes.Clone(whole), make([]byte, MaxCredentials)...),
		"cert not seen":      Credentials(granted, cert),
		"the wrong way":      Credentials(seen, granted),
		"longer cap":         Credentials(append(bytes.Clone(granted), 0), seen),
		"cap longer than it": {0xff, 0xff, 3, 1, 0, 0, 0, 0},
	} {
		if _, _, err := SplitCredentials(bad); !errors.Is(err, ErrEncoding) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzCredentials: what comes apart goes together again to the same bytes.
func FuzzCredentials(f *testing.F) {
	f.Add(credentials(f, 12, 0))
	f.Add(credentials(f, 12, 12, "db"))
	f.Add([]byte{0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		granted, cert, err := SplitCredentials(b)
		if err == nil && !bytes.Equal(Credentials(granted, cert), b) {
			t.Errorf("%x becomes %x and %x", b, granted, cert)
		}
	})
}
