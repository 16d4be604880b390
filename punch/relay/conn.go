package relay

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const (
	// writeDeadline is how long a connection may take none of what is written
	// before it counts as dead; it is given writePiece bytes at a time.
	writeDeadline = 10 * time.Second
	writePiece    = 16 << 10 // a record of TLS
	// maxUrgent is how many bytes of control messages wait for one connection.
	// They are answers, so more than a few mean that the other side reads none.
	maxUrgent = 4 << 10
	// maxUnsent bounds what the kernel keeps unsent of a connection, in bytes:
	// what has left the queue can no longer be dropped in favour of newer frames.
	maxUnsent = 128 << 10
)

var errFrame = errors.New("a frame is empty or too long")

// framed carries frames over a connection, both ways. An idle one costs the
// goroutine that reads: what writes is started when there is something to write,
// and buffers are borrowed while frames pass.
type framed struct {
	conn   net.Conn
	group  *errgroup.Group // runs the writer; close comes before its Wait
	lender *blocks
	log    *slog.Logger

	prefix [framePrefix]byte // for the reader alone
	heard  atomic.Uint64     // how often something came

	mu      sync.Mutex
	queue   queue
	urgent  []byte // control frames, written before what is queued
	writing bool
	ended   bool
}

func newFramed(c net.Conn, group *errgroup.Group, lender *blocks, log *slog.Logger) *framed {
	if err := boundUnsent(c); err != nil {
		log.Debug("bound unsent data", "remote", c.RemoteAddr(), "err", err)
	}
	return &framed{conn: c, group: group, lender: lender, log: log, queue: queue{lender: lender}}
}

// boundUnsent limits what the kernel keeps unsent, where c is TCP or shows what
// it is made of.
func boundUnsent(c net.Conn) error {
	for {
		switch t := c.(type) {
		case interface{ NetConn() net.Conn }:
			c = t.NetConn()
		case syscall.Conn:
			raw, err := t.SyscallConn()
			if err != nil {
				return err
			}
			var failed error
			err = raw.Control(func(fd uintptr) {
				failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, maxUnsent)
			})
			return errors.Join(err, failed)
		default:
			return nil
		}
	}
}

// offer queues copies of a run of flow frames. It never blocks; frames that
// find no room push out older ones.
func (f *framed) offer(run []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.ended {
		f.queue.put(run)
		f.write()
	}
}

// offerTrain is offer for datagrams that are not frames yet: all but the last
// are stride bytes long.
func (f *framed) offerTrain(train []byte, stride int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.ended {
		f.queue.putTrain(train, stride)
		f.write()
	}
}

// control queues a control message ahead of the flow frames. It is lost when
// the other side reads nothing.
func (f *framed) control(message []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.ended && len(f.urgent)+framePrefix+len(message) <= maxUrgent {
		f.urgent = appendFrame(f.urgent, message)
		f.write()
	}
}

// write starts the writer unless it runs. The caller holds mu.
func (f *framed) write() {
	if !f.writing {
		f.writing = true
		f.group.Go(func() error { f.drain(); return nil })
	}
}

// drain writes until nothing is queued.
func (f *framed) drain() {
	for {
		urgent, b, ok := f.next()
		if !ok {
			return
		}
		err := f.send(urgent, b)
		if b != nil {
			f.lender.giveBack(b)
		}
		if err != nil {
			f.log.Debug("write to relay connection", "remote", f.conn.RemoteAddr(), "err", err)
			f.close()
			return
		}
	}
}

// next takes what is to be written. When there is nothing the writer has ended.
func (f *framed) next() (urgent []byte, b *block, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.ended {
		urgent, b = f.urgent, f.queue.take()
		f.urgent = nil
	}
	f.writing = urgent != nil || b != nil
	return urgent, b, f.writing
}

func (f *framed) send(urgent []byte, b *block) error {
	if err := f.put(urgent); err != nil || b == nil {
		return err
	}
	return f.put(b.bytes())
}

// put writes by pieces, so that a slow connection is not taken for a dead one.
func (f *framed) put(b []byte) error {
	for len(b) > 0 {
		if err := f.conn.SetWriteDeadline(time.Now().Add(writeDeadline)); err != nil {
			return err
		}
		n, err := f.conn.Write(b[:min(len(b), writePiece)])
		if err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// first reads one datagram of at most maxAdmissionTLS bytes.
func (f *framed) first() ([]byte, error) {
	if _, err := io.ReadFull(f.conn, f.prefix[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(f.prefix[:]))
	if n == 0 || n > maxAdmissionTLS {
		return nil, fmt.Errorf("read frame of %d bytes: %w", n, errFrame)
	}
	b := make([]byte, n)
	_, err := io.ReadFull(f.conn, b)
	return b, err
}

// read hands on frames until the connection ends or the handler is dissatisfied:
// runs of flow frames, and control frames one by one. While nothing comes it holds
// no buffer.
func (f *framed) read(handle func(run []byte) error) error {
	for {
		if _, err := io.ReadFull(f.conn, f.prefix[:]); err != nil {
			return err
		}
		f.heard.Add(1)
		b := f.lender.borrow()
		b.end = copy(b.data[:], f.prefix[:])
		err := f.readBlock(b, handle)
		f.lender.giveBack(b)
		if err != nil {
			return err
		}
	}
}

// readBlock hands on frames, the first of which has begun in b, until one ends
// where what has been received ends.
func (f *framed) readBlock(b *block, handle func(run []byte) error) error {
	for {
		if err := split(b, handle); err != nil || b.start == b.end {
			return err
		}
		// The rest of a frame moves to the front, so there is room for all of it.
		b.end = copy(b.data[:], b.bytes())
		b.start = 0
		n, err := f.conn.Read(b.data[b.end:])
		f.heard.Add(1)
		b.end += n
		if n == 0 && err != nil {
			return err
		}
	}
}

// split hands on the whole frames in a block.
func split(b *block, handle func(run []byte) error) error {
	for {
		run, err := cutRun(b.bytes())
		if err != nil || len(run) == 0 {
			return err
		}
		if err := handle(run); err != nil {
			return err
		}
		b.start += len(run)
	}
}

// cutRun finds the frames at the beginning of b that can be handled at once:
// flow frames that follow each other, or one other frame. It finds none when the
// first frame is not whole yet.
func cutRun(b []byte) (run []byte, err error) {
	n := 0
	for len(b)-n >= framePrefix {
		size := int(binary.BigEndian.Uint16(b[n:]))
		if size == 0 || size > MaxFrame {
			return nil, fmt.Errorf("read frame of %d bytes: %w", size, errFrame)
		}
		end := n + framePrefix + size
		if end > len(b) {
			break
		}
		if b[n+framePrefix] != FlowByte {
			if n == 0 {
				n = end
			}
			break
		}
		n = end
	}
	return b[:n], nil
}

// close ends the connection at once.
func (f *framed) close() {
	f.mu.Lock()
	ended := f.ended
	f.ended, f.urgent = true, nil
	f.queue.clear()
	f.mu.Unlock()
	if ended {
		return
	}
	var c io.Closer = f.conn
	if t, ok := f.conn.(interface{ NetConn() net.Conn }); ok {
		c = t.NetConn() // without TLS's farewell, which can wait for seconds
	}
	if err := c.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		f.log.Debug("close relay connection", "err", err)
	}
}
