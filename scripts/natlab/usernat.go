package natlab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"overlay/punch/nattest"
)

// The kinds that nftables cannot be. A program of the lab translates their UDP,
// with the very tables that the simulated networks have.
const (
	// AddressMapped has one mapping for every remote address, and filters by
	// addresses.
	AddressMapped NAT = "address-mapped"
	// RandomOpen is Random that filters nothing.
	// Its hosts reach each other by their mappings.
	RandomOpen NAT = "random-open"
	// Stride is Sequential in steps of four, which RFC 7753 calls a port set.
	Stride NAT = "stride-4"
)

// userspace is the NAT whose table a kind has, if it is one of these.
func (n NAT) userspace() (nattest.NAT, bool) {
	const each = nattest.AddressAndPortDependent
	nat, ok := map[NAT]nattest.NAT{
		AddressMapped: {Mapping: nattest.AddressDependent, Filtering: nattest.AddressDependent},
		RandomOpen:    {Mapping: each, Hairpin: true},
		Stride:        {Mapping: each, Filtering: each, Sequential: 4},
	}[n]
	return nat, ok
}

const (
	userDevice = "unat"
	userTable  = 200
	userPref   = 10

	// What is not UDP is the kernel's. It does not look at UDP.
	userPost = `chain post { type nat hook postrouting priority srcnat; oifname "wan" meta l4proto != udp masquerade; }`

	userForward = `chain fw { type filter hook forward priority 0; meta l4proto udp accept; iifname "wan" ct state established,related accept; iifname "wan" drop; }
chain early { type filter hook prerouting priority raw; meta l4proto udp notrack; }`
)

// startUserNAT has the program translate the home's UDP, if it is of such a kind.
func (h *Home) startUserNAT(ctx context.Context) error {
	nat, ok := h.nat.userspace()
	if !ok {
		return nil
	}
	var dev *os.File
	err := h.inside(func() (err error) {
		dev, err = plainTUN(userDevice)
		return err
	})
	if err != nil {
		return err
	}
	h.table = nattest.NewTable(nat, uint64(h.pid))
	h.lab.spawn(func(running context.Context) error {
		stopped := context.AfterFunc(running, func() { dev.Close() })
		defer stopped()
		if err := h.translate(dev); running.Err() == nil {
			return err
		}
		return nil
	})
	var s script
	for _, dev := range []string{"all", "default", lanDevice, wanDevice, userDevice} {
		s.sysctl("net/ipv4/conf/"+dev+"/rp_filter", 0)
	}
	// What it has translated comes back with the router's own address.
	s.sysctl("net/ipv4/conf/"+userDevice+"/accept_local", 1)
	s.add("ip link set %s up", userDevice)
	s.add("ip route add default dev %s table %d", userDevice, userTable)
	for _, dev := range []string{lanDevice, wanDevice} {
		s.add("ip rule add pref %d iif %s ipproto udp lookup %d", userPref, dev, userTable)
	}
	s.add("ip rule add pref %d lookup local", userPref+1)
	s.add("ip rule del pref 0 lookup local")
	return h.sh(ctx, s)
}

// plainTUN is a TUN device whose packets have no header of the kernel's, and
// complete checksums.
func plainTUN(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	ifr, err := unix.NewIfreq(name)
	if err == nil {
		ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("create tun %s: %w", name, err), unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), "/dev/net/tun"), nil
}

// translate moves packets until the device is closed.
func (h *Home) translate(dev io.ReadWriter) error {
	buf := make([]byte, delayBuffer)
	for {
		n, err := dev.Read(buf)
		if err != nil {
			return fmt.Errorf("read from %s: %w", userDevice, err)
		}
		p, ok := parseUDP(buf[:n])
		if !ok || !h.rewrite(p) {
			continue
		}
		// A packet that the kernel does not want is lost.
		if _, err := dev.Write(p.data); errors.Is(err, os.ErrClosed) {
			return fmt.Errorf("write to %s: %w", userDevice, err)
		}
	}
}

// rewrite gives a packet the addresses it has on the other side, and says whether
// it passes.
func (h *Home) rewrite(p udpPacket) bool {
	from, to, wan := p.source(), p.destination(), h.WAN()
	if h.lan.Contains(from.Addr()) {
		if to.Addr() == wan && !h.table.Hairpin() {
			return false
		}
		from = h.table.Outbound(from, to, wan)
		if !from.IsValid() {
			return false
		}
		p.setSource(from)
	}
	if to.Addr() != wan {
		return from.Addr() == wan
	}
	to, ok := h.table.Inbound(from, to)
	if ok {
		p.setDestination(to)
	}
	return ok
}

// udpPacket is an IPv4 packet with a whole UDP datagram in it.
type udpPacket struct {
	data []byte
	udp  int // where its header begins
}

// Offsets in the header of IPv4 (RFC 791) and of UDP (RFC 768).
const (
	ipFragment, ipProtocol    = 6, 9
	ipSource, ipDestination   = 12, 16
	udpSource, udpDestination = 0, 2
	ipFragmentMask, protoUDP  = 0x3fff, 17
	ipVersion, ipWord         = 4, 4
)

func parseUDP(b []byte) (udpPacket, bool) {
	if len(b) < minIPv4Header || b[0]>>4 != ipVersion || b[ipProtocol] != protoUDP {
		return udpPacket{}, false
	}
	p := udpPacket{data: b, udp: int(b[0]&15) * ipWord}
	whole := binary.BigEndian.Uint16(b[ipFragment:])&ipFragmentMask == 0
	return p, whole && p.udp >= minIPv4Header && len(b) >= p.udp+udpHeader
}

func (p udpPacket) source() netip.AddrPort      { return p.at(ipSource, udpSource) }
func (p udpPacket) destination() netip.AddrPort { return p.at(ipDestination, udpDestination) }

func (p udpPacket) at(addr, port int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(p.data[addr:])), binary.BigEndian.Uint16(p.data[p.udp+port:]))
}

func (p udpPacket) setSource(a netip.AddrPort)      { p.set(ipSource, udpSource, a) }
func (p udpPacket) setDestination(a netip.AddrPort) { p.set(ipDestination, udpDestination, a) }

// set changes an address and a port, and the checksums as RFC 1624 does.
func (p udpPacket) set(addr, port int, a netip.AddrPort) {
	to := a.Addr().As4()
	var old, new uint32
	add := func(sum *uint32, b []byte) {
		for i := 0; i < len(b); i += 2 {
			*sum += uint32(binary.BigEndian.Uint16(b[i:]))
		}
	}
	add(&old, p.data[addr:addr+4])
	add(&new, to[:])
	copy(p.data[addr:], to[:])
	adjust(p.data[ipSum:], old, new)
	udp := p.data[p.udp:]
	add(&old, udp[port:port+2])
	binary.BigEndian.PutUint16(udp[port:], a.Port())
	add(&new, udp[port:port+2])
	if binary.BigEndian.Uint16(udp[udpSum:]) != 0 { // there is one
		adjust(udp[udpSum:], old, new)
	}
}

// adjust changes a checksum by what has left and what has come.
func adjust(b []byte, old, new uint32) {
	sum := uint32(^binary.BigEndian.Uint16(b)) + uint32(^fold(old)) + uint32(fold(new))
	binary.BigEndian.PutUint16(b, ^fold(sum))
}
