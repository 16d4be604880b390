package server

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"

	"overlay/coord"
	"overlay/coord/trust"
	"overlay/punch"
)

const (
	tokenMinute = 4
	tokenMAC    = 16
	tokenLen    = tokenMinute + tokenMAC
	tokenLife   = 10 // minutes

	maxHosts  = 2 // global IPv6 host candidates in a record
	maxMapped = 2 // port-mapped candidates in a record
)

// tokens proves to the server itself what it saw: a token says that a device's
// Binding request came from an address in a minute.
//
//	 0            4                         20
//	+------------+-------------------------+
//	| minutes    | HMAC-SHA256(secret,     |
//	| since 1970 |  minute, D, IP16, port) |
//	+------------+-------------------------+
//
// The secret is new at every start. It is safe for concurrent use.
type tokens struct {
	secret [32]byte
	now    func() time.Time
}

func newTokens(now func() time.Time) *tokens {
	t := &tokens{now: now}
	_, _ = rand.Read(t.secret[:]) // fills it or ends the program
	return t
}

func (t *tokens) make(device trust.Key, addr netip.AddrPort) []byte {
	return t.at(uint32(t.now().Unix()/60), device, addr)
}

func (t *tokens) at(minute uint32, device trust.Key, addr netip.AddrPort) []byte {
	head := binary.BigEndian.AppendUint32(make([]byte, 0, tokenLen), minute)
	ip := addr.Addr().As16()
	mac := hmac.New(sha256.New, t.secret[:])
	mac.Write(head)
	mac.Write(device[:])
	mac.Write(ip[:])
	mac.Write(binary.BigEndian.AppendUint16(nil, addr.Port()))
	return mac.Sum(head)[:tokenLen]
}

func (t *tokens) valid(token []byte, device trust.Key, addr netip.AddrPort) bool {
	if len(token) != tokenLen {
		return false
	}
	minute, now := binary.BigEndian.Uint32(token), uint32(t.now().Unix()/60)
	return minute <= now && now-minute <= tokenLife && hmac.Equal(token, t.at(minute, device, addr))
}

// publisher is a member that publishes a record.
type publisher struct {
	device trust.Key
	role   trust.Role
}

// checkRecord judges a record before anybody else sees it: what a device may
// tell the mesh to send packets to. A relay's mapped ports may be on any
// address of one machine elsewhere: who runs it says where it is reached, and who
// invited it let him.
func (t *tokens) checkRecord(by publisher, p coord.Publish) (trust.Record, error) {
	rec, err := trust.OpenRecord(p.Record)
	if err != nil {
		return rec, refuse(coord.CodeBadCandidates, "%v", err)
	}
	if rec.Device != by.device {
		return rec, refuse(coord.CodeBadCandidates, "the record is another device's")
	}
	observed, err := t.observed(rec, p.Tokens)
	if err != nil {
		return rec, err
	}
	hosts, mapped := 0, 0
	for i, e := range rec.Candidates {
		addr := e.Addr.Addr()
		switch punch.CandidateType(e.Type) {
		case punch.ServerReflexive:
		case punch.Host:
			if hosts++; hosts > maxHosts || !global6(addr) {
				return rec, badCandidate(i, "only %d global IPv6 host candidates are published", maxHosts)
			}
		case punch.PortMapped:
			if mapped++; mapped > maxMapped || !observed[addr] && (by.role != trust.RoleRelay || !addr.Unmap().IsGlobalUnicast()) {
				return rec, badCandidate(i, "a mapped port must be on an observed address")
			}
		default:
			return rec, badCandidate(i, "type %d is not published", e.Type)
		}
	}
	return rec, nil
}

// observed gives the addresses that the record's tokens prove.
func (t *tokens) observed(rec trust.Record, proofs [][]byte) (map[netip.Addr]bool, error) {
	seen := map[netip.Addr]bool{}
	for i, e := range rec.Candidates {
		if punch.CandidateType(e.Type) != punch.ServerReflexive {
			continue
		}
		if len(proofs) == 0 || !t.valid(proofs[0], rec.Device, e.Addr) {
			return nil, badCandidate(i, "this server has not seen the address lately")
		}
		proofs = proofs[1:]
		seen[e.Addr.Addr()] = true
	}
	if len(proofs) > 0 {
		return nil, refuse(coord.CodeBadCandidates, "%d tokens too many", len(proofs))
	}
	return seen, nil
}

func badCandidate(i int, format string, args ...any) error {
	return refuse(coord.CodeBadCandidates, "candidate %d: %s", i, fmt.Sprintf(format, args...))
}

// global6 says whether a is in 2000::/3, what the Internet routes.
func global6(a netip.Addr) bool {
	return a.Is6() && !a.Is4In6() && a.As16()[0]>>5 == 1
}
