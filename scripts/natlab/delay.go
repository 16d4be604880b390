package natlab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const (
	delayDevice  = "delay"
	delayTable   = 100
	delayPackets = 32768
	delayBuffer  = 65536
)

// delayLine holds every packet that crosses the core for a fixed time. The
// core's routing sends what enters it into a TUN device; the line reads it
// there and writes it back to the same device, from where the core routes it
// on. One crossing costs one more hop of the packet's TTL.
type delayLine struct {
	delay time.Duration
	loss  float64
	queue chan heldPacket
}

type heldPacket struct {
	due  time.Time
	data []byte
}

func newDelayLine(delay time.Duration, loss float64) *delayLine {
	return &delayLine{delay: delay, loss: loss, queue: make(chan heldPacket, delayPackets)}
}

// run moves packets until the context ends; it closes the device.
func (d *delayLine) run(ctx context.Context, dev io.ReadWriteCloser) error {
	stopped := context.AfterFunc(ctx, func() { dev.Close() })
	defer stopped()
	var g errgroup.Group
	g.Go(func() error { return d.receive(dev) })
	g.Go(func() error { return d.send(dev) })
	if err := g.Wait(); err != nil && ctx.Err() == nil {
		return err
	}
	return nil
}

func (d *delayLine) receive(dev io.Reader) error {
	defer close(d.queue)
	buf := make([]byte, delayBuffer)
	for {
		n, err := dev.Read(buf)
		if err != nil {
			return fmt.Errorf("read from delay line: %w", err)
		}
		if d.loss > 0 && rand.Float64() < d.loss {
			continue
		}
		select {
		case d.queue <- heldPacket{time.Now().Add(d.delay), slices.Clone(buf[:n])}:
		default: // full, as any router's queue may be
		}
	}
}

func (d *delayLine) send(dev io.Writer) error {
	for p := range d.queue {
		time.Sleep(time.Until(p.due))
		if _, err := dev.Write(p.data); errors.Is(err, os.ErrClosed) {
			return fmt.Errorf("write to delay line: %w", err)
		}
	}
	return nil
}

func delaySetup() script {
	var s script
	s.sysctl("net/ipv4/conf/"+delayDevice+"/rp_filter", 0)
	s.add("ip link set %s txqueuelen 10000 up", delayDevice)
	s.add("ip route add default dev %s table %d", delayDevice, delayTable)
	return s
}

// openTUN creates a TUN device in the calling thread's network namespace.
func openTUN(name string) (*os.File, error) {
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
