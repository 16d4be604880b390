package trust

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// maxTime is the end of the year 9999, the last one RFC 3339 can write.
const maxTime = 253402300799

// The lengths of a mesh's IPv4 prefix: a /30 has two addresses for nodes.
const (
	minPrefix4 = 8
	maxPrefix4 = 30
)

func (g Genesis) check() error {
	if g.Pin == (Hash{}) {
		return errors.New("no server pin")
	}
	if err := checkSigningKey(g.Signer); err != nil {
		return fmt.Errorf("first signer: %w", err)
	}
	ula, isULA := g.ULA, netip.PrefixFrom(netip.AddrFrom16([16]byte{0: 0xfc}), 7)
	if ula != ula.Masked() || ula.Bits() != ulaBits || !isULA.Contains(ula.Addr()) {
		return fmt.Errorf("prefix %v is not a /48 in fc00::/7", ula)
	}
	return nil
}

func (s State) check() error {
	if s.Epoch == 0 || (s.Epoch == 1) != (s.Prev == Hash{}) {
		return fmt.Errorf("epoch %d with previous state %x", s.Epoch, s.Prev[:4])
	}
	if err := ValidName(s.Name); err != nil {
		return err
	}
	if err := ValidPrefix4(s.Prefix4); err != nil {
		return err
	}
	if err := checkServers(s.Servers); err != nil {
		return err
	}
	if err := checkPins(s.Pins); err != nil {
		return err
	}
	return checkSigners(s.Signers)
}

// ValidPrefix4 refuses what a State's Prefix4 may not be. It accepts only addresses that are nobody's on the Internet, so
// that no State draws the traffic to foreign hosts into the mesh.
func ValidPrefix4(p netip.Prefix) error {
	shared := netip.PrefixFrom(netip.AddrFrom4([4]byte{100, 64}), 10) // RFC 6598
	if p.IsValid() && p.Addr().Is4() && p != p.Masked() {
		return fmt.Errorf("prefix %v has bits set behind its length; the network is %v", p, p.Masked())
	}
	if !p.IsValid() || !p.Addr().Is4() || p.Bits() < minPrefix4 || p.Bits() > maxPrefix4 {
		return fmt.Errorf("prefix %v is not an IPv4 network of /%d to /%d", p, minPrefix4, maxPrefix4)
	}
	private := p.Addr().IsPrivate() && lastAddr(p).IsPrivate()
	if !private && (!shared.Contains(p.Addr()) || p.Bits() < shared.Bits()) {
		return fmt.Errorf("prefix %v is neither in 100.64.0.0/10 nor private", p)
	}
	return nil
}

// lastAddr returns the broadcast address of an IPv4 network.
func lastAddr(p netip.Prefix) netip.Addr {
	a := p.Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		a[i/8] |= 0x80 >> (i % 8)
	}
	return netip.AddrFrom4(a)
}

func checkServers(servers []string) error {
	if len(servers) > MaxServers {
		return fmt.Errorf("%d servers, at most %d", len(servers), MaxServers)
	}
	for i, s := range servers {
		if err := ValidServer(s); err != nil {
			return err
		}
		if slices.Contains(servers[:i], s) {
			return fmt.Errorf("server %q is listed twice", s)
		}
	}
	return nil
}

func checkPins(pins []Pin) error {
	if len(pins) > MaxPins {
		return fmt.Errorf("%d pins, at most %d", len(pins), MaxPins)
	}
	current := false
	for i, p := range pins {
		if p.Status < PinNext || p.Status > PinRetired {
			return fmt.Errorf("pin has status %d", p.Status)
		}
		if slices.ContainsFunc(pins[:i], func(q Pin) bool { return q.Hash == p.Hash }) {
			return errors.New("a pin is listed twice")
		}
		current = current || p.Status == PinCurrent
	}
	if !current {
		return errors.New("no current pin")
	}
	return nil
}

func checkSigners(signers []Key) error {
	if len(signers) > MaxSigners {
		return fmt.Errorf("%d signers, at most %d", len(signers), MaxSigners)
	}
	for i, k := range signers {
		if err := checkSigningKey(k); err != nil {
			return err
		}
		if i > 0 && slices.Compare(signers[i-1][:], k[:]) >= 0 {
			return errors.New("signers are not in ascending order")
		}
	}
	return nil
}

func (c InviteCap) check() error {
	if err := cmp.Or(checkTime(c.NotBefore), checkTime(c.NotAfter)); err != nil {
		return err
	}
	if c.NotBefore.Unix() >= c.NotAfter.Unix() {
		return fmt.Errorf("valid from %v until %v", c.NotBefore, c.NotAfter)
	}
	if c.Uses == 0 || c.Uses > MaxUses {
		return fmt.Errorf("%d uses: at least 1, at most %d", c.Uses, MaxUses)
	}
	if err := checkTags(c.Tags); err != nil {
		return err
	}
	if c.Name == "" {
		return nil
	}
	if c.Uses != 1 {
		return fmt.Errorf("an invite for the name %q has %d uses", c.Name, c.Uses)
	}
	return ValidName(c.Name)
}

func (c NodeCert) check() error {
	if err := CanonicalKey(c.WireGuard); err != nil {
		return err
	}
	if err := ValidName(c.Name); err != nil {
		return err
	}
	if !c.IP4.Is4() || c.IP4.IsUnspecified() {
		return fmt.Errorf("%v is not an IPv4 address for a node", c.IP4)
	}
	if !c.IP6.Is6() || c.IP6.Is4In6() || c.IP6.Zone() != "" {
		return fmt.Errorf("%v is not an IPv6 address for a node", c.IP6)
	}
	if c.Role != RoleNode && c.Role != RoleRelay {
		return fmt.Errorf("role %d", c.Role)
	}
	if c.Serial == 0 {
		return errors.New("serial 0")
	}
	return cmp.Or(checkTags(c.Tags), checkTime(c.IssuedAt))
}

func (c countersigned) check() error {
	if len(c.cert) == 0 || len(c.cert) > maxCert {
		return fmt.Errorf("certificate of %d octets", len(c.cert))
	}
	return checkTime(c.at)
}

func (r Record) check() error {
	if len(r.Candidates) > MaxEndpoints {
		return fmt.Errorf("%d candidates, at most %d", len(r.Candidates), MaxEndpoints)
	}
	for i, e := range r.Candidates {
		addr := e.Addr.Addr()
		if !addr.IsValid() || addr.Is4In6() || addr.Zone() != "" || addr.IsUnspecified() || addr.IsMulticast() {
			return fmt.Errorf("candidate %d has address %v", i, addr)
		}
		if e.Addr.Port() == 0 || e.Type == 0 {
			return fmt.Errorf("candidate %d has port %d, type %d", i, e.Addr.Port(), e.Type)
		}
		if slices.Contains(r.Candidates[:i], e) {
			return fmt.Errorf("candidate %d is listed twice", i)
		}
	}
	return checkRelays(r.Relays)
}

func checkRelays(relays []RelayTrip) error {
	if len(relays) > MaxRelays {
		return fmt.Errorf("%d relays, at most %d", len(relays), MaxRelays)
	}
	for i, t := range relays {
		if err := CanonicalKey(t.Relay); err != nil {
			return fmt.Errorf("relay %d: %w", i, err)
		}
		if slices.ContainsFunc(relays[:i], func(o RelayTrip) bool { return o.Relay == t.Relay }) {
			return fmt.Errorf("relay %d is listed twice", i)
		}
	}
	return nil
}

func (r Revocation) check() error { return checkTime(r.From) }

func checkTags(tags []string) error {
	if len(tags) > MaxTags {
		return fmt.Errorf("%d tags, at most %d", len(tags), MaxTags)
	}
	for i, t := range tags {
		if err := ValidName(t); err != nil {
			return fmt.Errorf("tag: %w", err)
		}
		if i > 0 && tags[i-1] >= t {
			return errors.New("tags are not in ascending order")
		}
	}
	return nil
}

func checkTime(t time.Time) error {
	if s := t.Unix(); s < 0 || s > maxTime {
		return fmt.Errorf("time %v is not between 1970 and 9999", t)
	}
	return nil
}
