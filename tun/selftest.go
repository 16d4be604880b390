package tun

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Bounds of a trial.
const (
	trialTime  = 20 * time.Millisecond // of all its waiting; loopback takes less than one
	trialSmall = 8                     // datagrams of a small train
	trialLarge = 44                    // and of one that is a super-packet in fragments
	trialMark  = 16                    // bytes of the datagram behind a train
)

// errMangled says that other datagrams arrived than were sent.
var errMangled = errors.New("what arrives is not what was sent")

// trial is what the kernel was seen to do wrong with trains of datagrams. The
// zero value: nothing, or it could not be seen.
type trial struct {
	gso bool // sends with UDP_SEGMENT are refused or damaged
	gro bool // receives with UDP_GRO are damaged
}

// trial is made at the first call and remembered: the kernel stays the same.
func (b *bind) trial() trial {
	b.tried.Do(func() {
		if b.config.switched(offGSO) && b.config.switched(offGRO) {
			return
		}
		var err error
		if b.found, err = tryTrains(time.Now().Add(trialTime)); err != nil {
			b.config.logger().Warn("the kernel fails with trains of datagrams; going on without",
				"send", b.found.gso, "receive", b.found.gro, "err", err)
		}
	})
	return b.found
}

// tryTrains sends trains over loopback. The error is why something is wrong;
// where there is no loopback, nothing is.
func tryTrains(deadline time.Time) (trial, error) {
	from, to, err := trialSockets()
	if err != nil {
		return trial{}, nil
	}
	defer from.close()
	defer to.close()
	if err := to.conn.SetReadDeadline(deadline); err != nil || !from.canSegment() || !loopback(from, to) {
		return trial{}, nil
	}
	if err := tryBoth(from, to); err != nil {
		return trial{gso: true}, fmt.Errorf("send with UDP_SEGMENT: %w", err)
	}
	if err := to.set(unix.IPPROTO_UDP, unix.UDP_GRO, 1); err != nil {
		return trial{}, nil
	}
	if err := tryBoth(from, to); err != nil {
		return trial{gro: true}, fmt.Errorf("receive with UDP_GRO: %w", err)
	}
	return trial{}, nil
}

// trialSockets are two sockets on loopback, of the family the host has.
func trialSockets() (from, to *socket, err error) {
	for _, ip := range []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback} {
		if from, err = newSocket("udp", &net.UDPAddr{IP: ip}); err != nil {
			continue
		}
		if to, err = newSocket("udp", &net.UDPAddr{IP: ip}); err != nil {
			from.close()
			continue
		}
		_ = to.set(unix.SOL_SOCKET, unix.SO_RCVBUF, socketBuffer)
		return from, to, nil
	}
	return nil, nil, err
}

// loopback reports whether a plain datagram arrives.
func loopback(from, to *socket) bool {
	mark := trialBytes(trialMark)
	if _, err := from.conn.WriteToUDPAddrPort(mark, to.local()); err != nil {
		return false
	}
	got := make([]byte, maxPacket)
	n, _, err := to.conn.ReadFromUDPAddrPort(got)
	return err == nil && bytes.Equal(got[:n], mark)
}

// tryBoth sends a train of messages and one of fragments.
func tryBoth(from, to *socket) error {
	small := slices.Collect(slices.Chunk(trialBytes(trialSmall*defaultDatagram), defaultDatagram))
	large := slices.Collect(slices.Chunk(trialBytes(trialLarge*defaultDatagram), defaultDatagram))
	f := fragment{session: 1, id: 1, count: trialLarge, size: defaultDatagram - fragmentHeader}
	for i, b := range large {
		f.index = i
		f.put(b)
	}
	return errors.Join(tryTrain(from, to, small), tryTrain(from, to, large))
}

// tryTrain sends one train, then a single datagram, and compares what arrives.
// When that datagram does not come, the machine is too busy to tell.
func tryTrain(from, to *socket, datagrams [][]byte) error {
	t, local := newTrain(), to.local()
	for _, segment := range []bool{true, false} {
		o := batch{bufs: datagrams, to: newEndpoint(local, nil), segment: segment}
		if !segment {
			o.bufs = [][]byte{trialBytes(trialMark)}
		}
		t.load(&o, place{})
		err := from.raw.Control(t.run)
		t.unload()
		switch {
		case err != nil:
			return fmt.Errorf("send: %w", err)
		case t.errno == unix.EAGAIN:
			return nil
		case t.errno != 0:
			return fmt.Errorf("send: %w", t.errno)
		}
	}
	return compare(to, slices.Concat(datagrams...))
}

// compare reads until a mark and want, in datagrams of the train's size, have
// come.
func compare(to *socket, want []byte) error {
	b, control := make([]byte, receiveSize), make([]byte, receiveControl)
	marked := false
	for !marked || len(want) > 0 {
		n, k, _, _, err := to.conn.ReadMsgUDPAddrPort(b, control)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded) && !marked:
			return nil
		case err != nil:
			return errors.Join(errMangled, err)
		case n == trialMark && !marked:
			marked = true
			continue
		}
		if size := parseControl(control[:k]).segment; size != defaultDatagram && (size != 0 || n != defaultDatagram) ||
			n%defaultDatagram != 0 || !bytes.HasPrefix(want, b[:n]) {
			return errMangled
		}
		want = want[n:]
	}
	return nil
}

// trialBytes are n bytes of which no two neighbouring datagrams are alike.
func trialBytes(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i) ^ byte(i/defaultDatagram)<<3
	}
	return b
}
