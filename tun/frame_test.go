package tun

import (
	"encoding/binary"
	"testing"
)

// stunMessage is a Binding request of n bytes.
func stunMessage(n int) []byte {
	b := make([]byte, n)
	b[1] = 1
	binary.BigEndian.PutUint16(b[2:], uint16(n-stunHeaderSize))
	binary.BigEndian.PutUint32(b[stunCookieAt:], stunCookie)
	return b
}

// wireGuard is a message of n bytes.
func wireGuard(kind byte, index uint32, n int) []byte {
	b := make([]byte, n)
	b[0] = kind
	binary.LittleEndian.PutUint32(b[indexAt:], index)
	return b
}

func TestFrameOf(t *testing.T) {
	alike := wireGuard(typeInitiation, 0x42A41221, initiationSize) // its index is the cookie
	odd := wireGuard(typeData, 7, 64)
	odd[2] = 1
	wrong := stunMessage(20)
	wrong[5]++
	for name, c := range map[string]struct {
		b    []byte
		want frame
	}{
		"empty":              {nil, frameUnknown},
		"one byte":           {[]byte{1}, frameUnknown},
		"first fragment":     {[]byte{0x80}, frameFragment},
		"last fragment":      {[]byte{0x8f, 1}, frameFragment},
		"flow":               {[]byte{0x90}, frameFlow},
		"control":            {[]byte{0xa0, 1}, frameControl},
		"signal":             {[]byte{0xb0}, frameSignal},
		"first own":          {[]byte{0x91}, frameOwn},
		"last own":           {[]byte{0xff, 1, 2}, frameOwn},
		"initiation":         {wireGuard(1, 7, initiationSize), frameWireGuard},
		"keepalive":          {wireGuard(4, 7, keepaliveSize), frameWireGuard},
		"short data":         {wireGuard(4, 7, keepaliveSize-1), frameUnknown},
		"type five":          {wireGuard(5, 7, 64), frameUnknown},
		"type zero":          {wireGuard(0, 7, 64), frameUnknown},
		"reserved bits":      {odd, frameUnknown},
		"index like cookie":  {alike, frameWireGuard},
		"stun":               {stunMessage(20), frameSTUN},
		"long stun":          {stunMessage(148), frameSTUN},
		"stun without end":   {stunMessage(20)[:19], frameUnknown},
		"stun, wrong cookie": {wrong, frameUnknown},
	} {
		if got := frameOf(c.b); got != c.want {
			t.Errorf("%s: frame %d, want %d", name, got, c.want)
		}
	}
}

func FuzzFrameOf(f *testing.F) {
	f.Add(stunMessage(20))
	f.Add(wireGuard(4, 7, 64))
	f.Add([]byte{0x80})
	f.Fuzz(func(t *testing.T, b []byte) {
		switch frameOf(b) {
		case frameWireGuard:
			if len(b) < keepaliveSize {
				t.Fatal("too short for wireguard-go")
			}
			indexOf(b)
			isData(b)
		case frameSTUN:
			if b[0]&0xc0 != 0 || len(b) < stunHeaderSize {
				t.Fatal("not STUN")
			}
		case frameFragment, frameOwn, frameFlow, frameControl, frameSignal:
			if b[0] < ownFrame {
				t.Fatal("not ours")
			}
		}
	})
}
