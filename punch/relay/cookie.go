package relay

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"net/netip"
	"time"
)

// cookieAge is how long a secret makes new cookies; the one before is accepted
// as well.
const cookieAge = 2 * time.Minute

// cookies makes and checks the cookies of addresses, and remembers none. The
// secret of each cookieAge is derived from one that is new at every start; its
// number, modulo 256, spares the computation for most of what is made up. It is
// constant.
//
//	 0     1                                                      16
//	+-----+--------------------------------------------------------+
//	| age | first 15 bytes of HMAC-SHA256(secret, age, IP, port)   |
//	+-----+--------------------------------------------------------+
type cookies struct{ secret [32]byte }

func newCookies() (c cookies) {
	_, _ = rand.Read(c.secret[:]) // fills it or ends the program
	return c
}

// make gives the cookie of an address at a time of Server.clock.
func (c *cookies) make(addr netip.AddrPort, now int64) cookie {
	return c.of(addr, now/int64(cookieAge))
}

func (c *cookies) valid(k cookie, addr netip.AddrPort, now int64) bool {
	age := now / int64(cookieAge)
	if k[0] == byte(age-1) {
		age--
	}
	if k[0] != byte(age) {
		return false
	}
	want := c.of(addr, age)
	return hmac.Equal(k[:], want[:])
}

func (c *cookies) of(addr netip.AddrPort, age int64) (k cookie) {
	var text [8 + 16 + 2]byte
	binary.BigEndian.PutUint64(text[:], uint64(age))
	ip := addr.Addr().As16()
	copy(text[8:], ip[:])
	binary.BigEndian.PutUint16(text[24:], addr.Port())
	h := hmac.New(sha256.New, c.secret[:])
	h.Write(text[:])
	k[0] = byte(age)
	copy(k[1:], h.Sum(nil))
	return k
}
