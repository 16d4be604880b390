package natlab

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// victim is a machine that has nothing to do with the mesh, says nothing, and notes
// what arrives.
type victim struct {
	addr netip.Addr

	mu   sync.Mutex
	came []arrival
}

type arrival struct {
	at       time.Time
	from     netip.Addr
	protocol byte
	port     uint16
	size     int // of the IP packet
	payload  []byte
}

func mustVictim(t *testing.T, l *Lab) *victim {
	t.Helper()
	h := mustServer(t, l, "victim")
	var s script
	s.add("nft add table ip silent")
	s.add("nft add chain ip silent out '{ type filter hook output priority 0; policy drop; }'")
	if err := h.sh(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	v := &victim{addr: h.Addr()}
	fd := -1
	err := h.inside(func() (err error) {
		const allIPv4 = unix.ETH_P_IP<<8 | unix.ETH_P_IP>>8 // in network order
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, allIPv4&0xffff); err != nil {
			return err
		}
		return errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}),
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1))
	})
	if err != nil {
		t.Fatal(err)
	}
	var done atomic.Bool
	var g errgroup.Group
	g.Go(func() error {
		for !done.Load() {
			b, control := make([]byte, 2048), make([]byte, 64)
			n, c, _, _, err := unix.Recvmsg(fd, b, control, 0)
			if err == nil {
				v.note(b[:n], arrivedAt(control[:c]))
			} else if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
				return os.NewSyscallError("recvmsg", err)
			}
		}
		return nil
	})
	t.Cleanup(func() {
		done.Store(true)
		if err := errors.Join(g.Wait(), unix.Close(fd)); err != nil {
			t.Error(err)
		}
	})
	return v
}

// arrivedAt is when the kernel took a packet; later reading must not count.
func arrivedAt(control []byte) time.Time {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil || len(messages) == 0 || len(messages[0].Data) < 16 {
		return time.Now()
	}
	d := messages[0].Data
	return time.Unix(int64(binary.NativeEndian.Uint64(d)), int64(binary.NativeEndian.Uint64(d[8:])))
}

func (v *victim) note(b []byte, at time.Time) {
	if len(b) < ipHeader+udpHeader || b[0] != 0x45 || netip.AddrFrom4([4]byte(b[16:20])) != v.addr {
		return
	}
	a := arrival{at: at, from: netip.AddrFrom4([4]byte(b[12:16])), protocol: b[ipProtocol], size: len(b)}
	a.port = binary.BigEndian.Uint16(b[ipHeader+2:])
	if a.protocol == protoUDP {
		a.payload = b[ipHeader+udpHeader:]
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.came = append(v.came, a)
}

func (v *victim) all() []arrival {
	v.mu.Lock()
	defer v.mu.Unlock()
	return slices.Clone(v.came)
}

func (v *victim) forget() { v.drop(func(arrival) bool { return true }) }

func (v *victim) drop(which func(arrival) bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.came = slices.DeleteFunc(v.came, which)
}

func (v *victim) count(which func(arrival) bool) (n int) {
	for _, a := range v.all() {
		if which(a) {
			n++
		}
	}
	return n
}

func (v *victim) ports(which func(arrival) bool) map[uint16]bool {
	ports := map[uint16]bool{}
	for _, a := range v.all() {
		if which(a) {
			ports[a.port] = true
		}
	}
	return ports
}

// rate is the most that came within any second.
func (v *victim) rate(which func(arrival) bool) (most int) {
	var recent []time.Time
	for _, a := range v.all() {
		if !which(a) {
			continue
		}
		recent = append(slices.DeleteFunc(recent, func(at time.Time) bool { return a.at.Sub(at) >= time.Second }), a.at)
		most = max(most, len(recent))
	}
	return most
}
