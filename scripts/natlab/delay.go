package natlab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const (
	delayDevice  = "delay"
	delayTable   = 100
	delayPackets = 32768
	delayBytes   = 256 << 20
	delayBuffer  = 128 << 10
)

// Line says what a delay line does to the packets that cross it. The zero
// value passes them on at once. Of a UDP packet that the kernel has left
// uncut, every datagram has a fate of its own.
type Line struct {
	// Delay is the time one packet spends in the line, one way.
	Delay time.Duration
	// Loss is the share of packets, 0 to 1, that vanish, and Burst how many of them
	// in a row do on average; up to 1 each vanishes by itself.
	Loss  float64
	Burst float64
	// Reorder is the share of packets, 0 to 1, that stay Late longer.
	Reorder float64
	Late    time.Duration
	// Jitter is by how much at most a packet stays shorter or longer than Delay.
	Jitter time.Duration
	// Rate is how many bits pass in a second, headers of IP included; zero is no
	// limit. Queue is how long a packet may wait for its turn; what would have to
	// wait longer vanishes.
	Rate  int
	Queue time.Duration
	// Seed makes what happens to the nth packet repeatable.
	Seed uint64
}

// delayLine holds every packet that crosses the core for a fixed time. The
// core's routing sends what enters it into a TUN device; the line reads it
// there and writes it back to the same device, from where the core routes it
// on. One crossing costs one more hop of the packet's TTL.
//
// Packets have a virtio header, so that UDP trains stay whole: cut into
// datagrams they would fill the two cores before the tunnels under test do.
type delayLine struct {
	queue, late, shaken chan heldPacket
	held                atomic.Int64 // bytes in all of them

	mu     sync.Mutex
	line   Line
	random *rand.Rand
	bad    bool      // packets vanish now
	free   time.Time // when all that has its turn has passed
}

type heldPacket struct {
	due  time.Time
	data []byte
}

func newDelayLine(delay time.Duration, loss float64) *delayLine {
	d := &delayLine{queue: make(chan heldPacket, delayPackets), late: make(chan heldPacket, delayPackets), shaken: make(chan heldPacket, delayPackets)}
	d.set(Line{Delay: delay, Loss: loss})
	return d
}

func (d *delayLine) set(line Line) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.line, d.random = line, rand.New(rand.NewPCG(line.Seed, line.Seed))
	d.bad, d.free = false, time.Time{}
}

// run moves packets until the context ends; it closes the device.
func (d *delayLine) run(ctx context.Context, dev io.ReadWriteCloser) error {
	stopped := context.AfterFunc(ctx, func() { dev.Close() })
	defer stopped()
	var g errgroup.Group
	g.Go(func() error { return d.receive(dev) })
	g.Go(func() error { return d.send(d.queue, dev) })
	g.Go(func() error { return d.send(d.late, dev) })
	g.Go(func() error { return d.sendSorted(d.shaken, dev) })
	if err := g.Wait(); err != nil && ctx.Err() == nil {
		return err
	}
	return nil
}

func (d *delayLine) receive(dev io.Reader) error {
	defer close(d.queue)
	defer close(d.late)
	defer close(d.shaken)
	buf := make([]byte, delayBuffer)
	for {
		n, err := dev.Read(buf)
		if err != nil {
			return fmt.Errorf("read from delay line: %w", err)
		}
		d.pass(buf[:n])
	}
}

// fate is what happens to one datagram.
type fate int

const (
	onTime fate = iota
	tooLate
	vanished
)

// pass queues what is to arrive of a packet. Without losses that is all of
// it, in one piece.
func (d *delayLine) pass(packet []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := time.Now()
	t, ok := trainOf(packet)
	if !ok || d.line.Loss == 0 && d.line.Reorder == 0 && !d.line.each() {
		d.hold(now, slices.Clone(packet), d.fate())
		return
	}
	first, last := 0, d.fate()
	for i := 1; i < t.datagrams(); i++ {
		next := d.fate()
		if next == onTime && last == onTime && !d.line.each() {
			continue
		}
		d.hold(now, t.cut(first, i), last)
		first, last = i, next
	}
	d.hold(now, t.cut(first, t.datagrams()), last)
}

func (d *delayLine) fate() fate {
	if d.lost() {
		return vanished
	}
	if d.line.Reorder > 0 && d.random.Float64() < d.line.Reorder {
		return tooLate
	}
	return onTime
}

func (d *delayLine) hold(now time.Time, data []byte, f fate) {
	if f == vanished || d.held.Load() > delayBytes {
		return
	}
	turn, ok := d.turn(now, len(data)-virtioHeader)
	if !ok {
		return
	}
	queue, due := d.queue, turn.Add(d.line.Delay)
	switch {
	case f == tooLate:
		queue, due = d.late, due.Add(d.line.Late)
	case d.line.Jitter > 0:
		queue, due = d.shaken, due.Add(d.jitter())
	}
	select {
	case queue <- heldPacket{due, data}:
		d.held.Add(int64(len(data)))
	default: // full, as any router's queue may be
	}
}

func (d *delayLine) send(queue <-chan heldPacket, dev io.Writer) error {
	for p := range queue {
		time.Sleep(time.Until(p.due))
		if err := d.deliver(p, dev); err != nil {
			return err
		}
	}
	return nil
}

func (d *delayLine) deliver(p heldPacket, dev io.Writer) error {
	d.held.Add(-int64(len(p.data)))
	if _, err := dev.Write(p.data); errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("write to delay line: %w", err)
	}
	return nil
}

// The virtio header before every packet (linux/virtio_net.h, host byte order,
// which is little-endian on the machines a lab runs on):
//
//	| flags 1 | kind 1 | header length 2 | segment 2 | checksum start 2 | checksum offset 2 |
const (
	virtioHeader      = 10
	virtioKind        = 1
	virtioSegment     = 4
	virtioSum         = 6
	virtioKindUDP     = 5
	udpHeader         = 8
	udpLength, udpSum = 4, 6
	ipLength, ipSum   = 2, 10
	minIPv4Header     = 20
)

// train is a UDP packet over IPv4 that the kernel has left uncut: several
// datagrams of equal size, the last of which may be shorter, behind one
// header. Its checksum is still only that of the pseudo header.
type train struct {
	data           []byte
	ip, udp, start int // where the headers and the payload begin
	segment        int
}

func trainOf(data []byte) (train, bool) {
	if len(data) < virtioHeader+minIPv4Header || data[virtioKind] != virtioKindUDP || data[virtioHeader]>>4 != 4 {
		return train{}, false
	}
	t := train{data: data, ip: virtioHeader, segment: int(binary.LittleEndian.Uint16(data[virtioSegment:]))}
	t.udp = t.ip + int(binary.LittleEndian.Uint16(data[virtioSum:]))
	t.start = t.udp + udpHeader
	return t, t.segment > 0 && t.udp >= t.ip+minIPv4Header && t.start < len(data)
}

func (t train) datagrams() int { return (len(t.data) - t.start + t.segment - 1) / t.segment }

// cut gives the datagrams from one number to before another as a packet of
// its own.
func (t train) cut(from, to int) []byte {
	begin, end := t.start+from*t.segment, min(t.start+to*t.segment, len(t.data))
	p := slices.Concat(t.data[:t.start], t.data[begin:end])
	if to-from == 1 {
		p[virtioKind] = 0
		binary.LittleEndian.PutUint16(p[virtioSegment:], 0)
	}
	udp, ip := p[t.udp:], p[t.ip:t.udp]
	// The pseudo header has the length in it: RFC 768; the arithmetic is
	// that of RFC 1624.
	sum := uint32(binary.BigEndian.Uint16(udp[udpSum:])) + uint32(^binary.BigEndian.Uint16(udp[udpLength:])) + uint32(len(udp))
	binary.BigEndian.PutUint16(udp[udpSum:], fold(sum))
	binary.BigEndian.PutUint16(udp[udpLength:], uint16(len(udp)))
	binary.BigEndian.PutUint16(ip[ipLength:], uint16(len(p)-t.ip))
	binary.BigEndian.PutUint16(ip[ipSum:], 0)
	sum = 0
	for i := 0; i < len(ip); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	binary.BigEndian.PutUint16(ip[ipSum:], ^fold(sum))
	return p
}

func fold(sum uint32) uint16 {
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

// DelayLine is a delay line put into a lab that is there already. Its methods
// may be used from several goroutines.
type DelayLine struct {
	line  *delayLine
	stop  context.CancelFunc
	group errgroup.Group
}

// StartLine puts a delay line before everything that is attached to the
// Internet by now. The lab must have been made without one (Options.Delay
// negative); Close ends the line and must come before that of the lab. The
// context bounds the starting only.
func (l *Lab) StartLine(ctx context.Context, line Line) (*DelayLine, error) {
	d, err := l.startLine(ctx, delayDevice, line)
	if err != nil {
		return nil, err
	}
	s := lineSetup(delayDevice, delayTable)
	l.mu.Lock()
	ports := l.ports
	l.mu.Unlock()
	for i := range ports {
		// A port inside a home has no meaning in the core, and does no harm.
		s.add("ip rule add iif port%d lookup %d", i+1, delayTable)
	}
	if err := l.core.sh(ctx, s); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// Set changes what the line does from now on.
func (d *DelayLine) Set(line Line) { d.line.set(line) }

// Close ends the line. The lab's Internet is cut then.
func (d *DelayLine) Close() error {
	d.stop()
	return d.group.Wait()
}

// lineSetup makes what is routed by a table cross the line of a device.
func lineSetup(device string, table int) script {
	var s script
	s.sysctl("net/ipv4/conf/"+device+"/rp_filter", 0)
	s.add("ip link set %s txqueuelen 10000 up", device)
	s.add("ip route add default dev %s table %d", device, table)
	return s
}

// startLine runs a delay line on a device of its own.
func (l *Lab) startLine(ctx context.Context, device string, line Line) (*DelayLine, error) {
	var tun *os.File
	err := l.core.inside(func() (err error) {
		tun, err = openTUN(device)
		return err
	})
	if err != nil {
		return nil, err
	}
	running, stop := context.WithCancel(context.WithoutCancel(ctx))
	d := &DelayLine{line: newDelayLine(0, 0), stop: stop}
	d.Set(line)
	d.group.Go(func() error { return d.line.run(running, tun) })
	return d, nil
}

// openTUN creates a TUN device in the calling thread's network namespace.
func openTUN(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	ifr, err := unix.NewIfreq(name)
	if err == nil {
		ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("create tun %s: %w", name, err), unix.Close(fd))
	}
	// Before Linux 6.2 trains come cut into datagrams: slower, not wrong.
	if unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_USO4|unix.TUN_F_USO6) != nil {
		err = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("set offloads of tun %s: %w", name, err), unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), "/dev/net/tun"), nil
}
