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
// secret of each cookieAge is derived from one that is new at every start. It is
// constant.
//
//	HMAC-SHA256(secret, age || IP || port), first 16 bytes:
//	 0       8             24     26
//	+-------+-------------+------+
//	|  age  |     IP      | port |
//	+-------+-------------+------+
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
	current, last := c.of(addr, age), c.of(addr, age-1)
	return hmac.Equal(k[:], current[:]) || hmac.Equal(k[:], last[:])
}

func (c *cookies) of(addr netip.AddrPort, age int64) cookie {
	var text [8 + 16 + 2]byte
	binary.BigEndian.PutUint64(text[:], uint64(age))
	ip := addr.Addr().As16()
	copy(text[8:], ip[:])
	binary.BigEndian.PutUint16(text[24:], addr.Port())
	h := hmac.New(sha256.New, c.secret[:])
	h.Write(text[:])
	return cookie(h.Sum(nil)[:cookieSize])
}
