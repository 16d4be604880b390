package coord

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash/crc32"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func fixedInvite() Invite {
	return Invite{
		Kind:   InviteMember,
		Seed:   [16]byte(bytes.Repeat([]byte{0xa5}, 16)),
		Hash:   [32]byte(bytes.Repeat([]byte{0x3c}, 32)),
		Server: "vpn.example.org:443",
	}
}

const (
	fixedInviteText = "ovl1_AqWlpaWlpaWlpaWlpaWlpaU8PDw8PDw8PDw8PDw8PDw8PDw8PDw8PDw8PDw8PDw8PBN2cG4uZXhhbXBsZS5vcmc6NDQz1v5zXQ"
	fixedInviteKey  = "cee2044fe46cf74378b8d2b81ac926a51b235d03c67d371b7adafea435da5bd0" // public
)

// TestInviteVector holds the string and the key that grows from the seed still:
// invites already handed out must stay good.
func TestInviteVector(t *testing.T) {
	i := fixedInvite()
	if got := i.String(); got != fixedInviteText {
		t.Errorf("text is now %s", got)
	}
	if got := hex.EncodeToString(i.Key()[32:]); got != fixedInviteKey {
		t.Errorf("key is now %s", got)
	}
	// The text by its drawing, without the encoder.
	b := slices.Concat([]byte{2}, bytes.Repeat([]byte{0xa5}, 16), bytes.Repeat([]byte{0x3c}, 32), []byte{19}, []byte("vpn.example.org:443"))
	b = binary.BigEndian.AppendUint32(b, crc32.ChecksumIEEE(b))
	if want := "ovl1_" + base64.RawURLEncoding.EncodeToString(b); i.String() != want {
		t.Errorf("text is %s, drawn %s", i, want)
	}
}

func TestParseInvite(t *testing.T) {
	text := fixedInviteText
	for name, pasted := range map[string]string{
		"as it is":       text,
		"line end":       text + "\r\n",
		"around":         " \t" + text + "\n\n",
		"wrapped":        text[:40] + "\n  " + text[40:80] + "\r\n" + text[80:],
		"in the prefix":  text[:3] + "\n" + text[3:],
		"no-break space": text + "\u00a0",
		"zero width":     "\ufeff" + text[:50] + "\u200b" + text[50:],
	} {
		if got, err := ParseInvite(pasted); err != nil || got != fixedInvite() {
			t.Errorf("%s: %#v, %v", name, got, err)
		}
	}
}

// sealInvite makes an invite of any octets, with a right checksum.
func sealInvite(b []byte) string {
	b = binary.BigEndian.AppendUint32(b, crc32.ChecksumIEEE(b))
	return invitePrefix + base64.RawURLEncoding.EncodeToString(b)
}

func TestParseInviteRefuses(t *testing.T) {
	text := fixedInviteText
	n := len(text)
	fields := append([]byte{2}, make([]byte, 48)...)
	for pasted, want := range map[string]string{
		"":                          "the invite is empty",
		" \n":                       "the invite is empty",
		"hunter2":                   `this is not an invite: an invite starts with "ovl1_"`,
		"OVL1_" + text[5:]:          `this is not an invite: an invite starts with "ovl1_"`,
		"ovl_" + text[5:]:           `this is not an invite`,
		"ovl0_" + text[5:]:          `this is not an invite`,
		"ovlx_" + text[5:]:          `this is not an invite`,
		"ovl2_" + text[5:]:          `invite needs a newer overlay: it starts with "ovl2_"`,
		"ovl17_":                    `invite needs a newer overlay: it starts with "ovl17_"`,
		strings.Repeat("a", 5000):   "this is not an invite: it has 5000 characters",
		"ovl1":                      "invite is damaged: ovl1... ends after 4 characters",
		"ovl1_":                     "invite is damaged: ovl1_... ends after 5 characters",
		text[:40]:                   "invite is damaged: ovl1_AqWl... ends after 40 characters",
		text[:n-1]:                  fmt.Sprintf("invite is damaged: checksum does not match (%d of %d characters) in ovl1_AqWl...", n-1, n),
		text[:n-7]:                  fmt.Sprintf("invite is damaged: checksum does not match (%d of %d characters) in ovl1_AqWl...", n-7, n),
		text + "A":                  fmt.Sprintf("invite is damaged: checksum does not match (%d of %d characters) in ovl1_AqWl...", n+1, n),
		text + text[5:]:             "invite is damaged: checksum does not match",
		text + ".":                  fmt.Sprintf("invite is damaged: character %d of ovl1_AqWl... is none that an invite has", n+1),
		text[:20] + "ä" + text[21:]: "invite is damaged: character 21 of ovl1_AqWl... is none",
		text[:7] + "€" + text[8:]:   "invite is damaged: character 8 of ovl1_Aq... is none",
		text[:30] + "Z" + text[31:]: "invite is damaged: checksum does not match in ovl1_AqWl...",
		text[:n-1] + "_":            "invite is damaged: checksum does not match in ovl1_AqWl...",
		sealInvite(append([]byte{0}, slices.Concat(fields[1:], []byte{3}, []byte("a:1"))...)): "kind 0",
		sealInvite(append([]byte{3}, slices.Concat(fields[1:], []byte{3}, []byte("a:1"))...)): "kind 3",
		sealInvite(slices.Concat(fields, []byte{0})):                                          "not HOST:PORT",
		sealInvite(slices.Concat(fields, []byte{3}, []byte("a:0"))):                           "port of server",
		sealInvite(slices.Concat(fields, []byte{2}, []byte("a:1"))):                           "checksum does not match",
	} {
		i, err := ParseInvite(pasted)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: %#v, %v, want %s", pasted, i, err, want)
		}
		if i != (Invite{}) {
			t.Errorf("%.60q: %#v beside an error", pasted, i)
		}
	}
}

// TestInviteTypo: whichever character is mistaken, left out or doubled, the
// invite is refused and the message shows no more of it than its beginning.
func TestInviteTypo(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		i := drawInvite(rt)
		text := i.String()
		at := rapid.IntRange(0, len(text)-1).Draw(rt, "at")
		with := rapid.StringN(0, 2, 8).Draw(rt, "with")
		typo := text[:at] + with + text[at+1:]
		got, err := ParseInvite(typo)
		if strings.Map(dropSpace, typo) == text {
			rt.Skip("no typo")
		}
		if err == nil {
			rt.Fatalf("%q is read as %#v", typo, got)
		}
		if secret := text[inviteShown+1 : inviteShown+13]; strings.Contains(err.Error(), secret) {
			rt.Errorf("%v shows %s", err, secret)
		}
	})
}

func TestInviteRoundTrip(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		i := drawInvite(rt)
		got, err := ParseInvite(i.String())
		if err != nil || got != i {
			rt.Errorf("%v becomes %v: %v", i, got, err)
		}
	})
}

func drawInvite(t *rapid.T) Invite {
	octets := func(n int) []byte { return rapid.SliceOfN(rapid.Byte(), n, n).Draw(t, "octets") }
	host := rapid.StringMatching(`[a-z]{1,60}(\.[a-z]{1,60}){0,2}`).Draw(t, "host")
	return Invite{
		Kind:   InviteKind(rapid.Uint8Range(1, 2).Draw(t, "kind")),
		Seed:   [16]byte(octets(16)),
		Hash:   [32]byte(octets(32)),
		Server: fmt.Sprintf("%s:%d", host, rapid.Uint16Min(1).Draw(t, "port")),
	}
}

func TestNewInvite(t *testing.T) {
	a, err := NewInvite(InviteOwner, [32]byte{1}, "[2001:db8::1]:443")
	if err != nil {
		t.Fatal(err)
	}
	b, err := NewInvite(InviteOwner, [32]byte{1}, "[2001:db8::1]:443")
	if err != nil {
		t.Fatal(err)
	}
	if a.Seed == b.Seed || a.Key().Equal(b.Key()) {
		t.Error("two invites have one seed")
	}
	for _, bad := range []Invite{{Kind: 0, Server: "a:1"}, {Kind: 3, Server: "a:1"}, {Kind: InviteOwner, Server: "a"}} {
		if i, err := NewInvite(bad.Kind, bad.Hash, bad.Server); err == nil {
			t.Errorf("made %#v", i)
		}
	}
}

// TestInviteRedacted looks for the seed wherever a careless line may put it.
func TestInviteRedacted(t *testing.T) {
	i := fixedInvite()
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("text", "invite", i, "pointer", &i)
	slog.New(slog.NewJSONHandler(&log, nil)).Info("json", "invite", i, "pointer", &i)
	fmt.Fprintf(&log, "%#v %#v", i, struct{ I Invite }{i})
	if secret := fixedInviteText[inviteShown+1 : inviteShown+9]; strings.Contains(log.String(), secret) {
		t.Errorf("the secret is in\n%s", log.String())
	}
	if n := strings.Count(log.String(), "ovl1_AqWl..."); n != 6 {
		t.Errorf("the invite is named %d times in\n%s", n, log.String())
	}
}

func FuzzParseInvite(f *testing.F) {
	f.Add(fixedInviteText)
	f.Add(fixedInviteText[:90])
	f.Add("ovl1_\x1b[2J") // found by fuzzing: the message cleared the screen
	f.Add("ovl2_" + fixedInviteText[5:])
	f.Add(" ovl1_\n" + fixedInviteText[5:] + "\n")
	f.Add(sealInvite(slices.Concat([]byte{2}, make([]byte, 48), []byte{3}, []byte("a:1"))))
	f.Fuzz(func(t *testing.T, s string) {
		i, err := ParseInvite(s)
		if err == nil && i.String() != strings.Map(dropSpace, s) {
			t.Errorf("%q is read as %s", s, i)
		}
		if err != nil && (len(err.Error()) > 200 || strings.ContainsAny(err.Error(), "\n\x1b")) {
			t.Errorf("%q: message %q", s, err)
		}
	})
}
