//go:build !linux

package direct

import "net/netip"

// send is the agent's way to the socket. Only Linux gives a single datagram a TTL
// of its own. Elsewhere openers are left out: a full packet in their place could
// do the harm that they are to prevent.
func (p *PacketConn) send(b []byte, to, _ netip.AddrPort, ttl int) error {
	if ttl > 0 {
		return nil
	}
	_, err := p.udp.WriteToUDPAddrPort(b, to)
	return err
}
