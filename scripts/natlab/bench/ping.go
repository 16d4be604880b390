package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	pingEvery = 5 * time.Millisecond
	pingSize  = 56
	pingGrace = time.Second
	maxPings  = 1 << 16
	longGap   = time.Second

	echoRequest, echoReply = 8, 0
	echoHeader             = 8
)

// pings is the outcome of a row of pings: the round trips of the answered
// ones, sorted, in milliseconds, how many got no answer, and the times in
// seconds, of 1 s or more, in which nothing that was sent was answered.
type pings struct {
	RoundTrips []float64 `json:"roundTrips"`
	Lost       int       `json:"lost"`
	Gaps       []float64 `json:"gaps"`
}

// lostShare is in percent.
func (p pings) lostShare() float64 {
	all := len(p.RoundTrips) + p.Lost
	if all == 0 {
		return 0
	}
	return 100 * float64(p.Lost) / float64(all)
}

// quantile gives the smallest round trip that a share of all does not exceed,
// and 0 when there is none.
func (p pings) quantile(share float64) float64 {
	if len(p.RoundTrips) == 0 {
		return 0
	}
	i := int(share * float64(len(p.RoundTrips)))
	return p.RoundTrips[min(i, len(p.RoundTrips)-1)]
}

// pinger sends ICMP echo requests at a steady pace, whether they are answered
// or not (RFC 792), and so does not slow down when the path does.
type pinger struct {
	conn *net.IPConn
	id   uint16

	mu    sync.Mutex
	sent  []time.Time
	trips []time.Duration
}

// ping has a copy of this program ping the first peer from inside the host
// that sends.
func (t *tunnel) ping(ctx context.Context, every, during time.Duration) (pings, error) {
	self, err := os.Executable()
	if err != nil {
		return pings{}, fmt.Errorf("find own program: %w", err)
	}
	out, err := output(t.hosts[0].Command(ctx, self, verbPing,
		"-to", t.addrs[1].String(), "-every", every.String(), "-for", during.String()))
	if err != nil {
		return pings{}, err
	}
	var p pings
	if err := json.Unmarshal([]byte(out), &p); err != nil {
		return pings{}, fmt.Errorf("read pings: %w", err)
	}
	return p, nil
}

// answerPing is all that the copy inside a host does.
func answerPing(ctx context.Context, o *options) error {
	addr, err := netip.ParseAddr(o.to)
	if err != nil {
		return fmt.Errorf("parse address to ping: %w", err)
	}
	p, err := ping(ctx, addr, o.every, o.wait)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(p)
}

// ping needs root. It lasts as long as asked for and a grace for answers.
func ping(ctx context.Context, to netip.Addr, every, during time.Duration) (pings, error) {
	conn, err := net.DialIP("ip4:icmp", nil, &net.IPAddr{IP: to.AsSlice()})
	if err != nil {
		return pings{}, fmt.Errorf("open ping socket: %w", err)
	}
	p := &pinger{conn: conn, id: uint16(os.Getpid())}
	var g errgroup.Group
	g.Go(p.receive)
	g.Go(func() error {
		defer conn.Close()
		return p.send(ctx, every, int(during/every))
	})
	if err := g.Wait(); err != nil {
		return pings{}, err
	}
	return p.outcome(), nil
}

func (p *pinger) send(ctx context.Context, every time.Duration, count int) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for seq := range min(count, maxPings) {
		p.mu.Lock()
		p.sent = append(p.sent, time.Now())
		p.trips = append(p.trips, -1)
		p.mu.Unlock()
		// A full queue loses the packet, as it would lose others.
		if _, err := p.conn.Write(echo(p.id, uint16(seq))); err != nil && !errors.Is(err, net.ErrClosed) && ctx.Err() != nil {
			return ctx.Err()
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
	select {
	case <-ctx.Done():
	case <-time.After(pingGrace):
	}
	return nil
}

func (p *pinger) receive() error {
	buf := make([]byte, 1500)
	for {
		n, _, err := p.conn.ReadFromIP(buf)
		now := time.Now()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read ping answer: %w", err)
		}
		if seq, ok := answered(buf[:n], p.id); ok {
			p.note(seq, now)
		}
	}
}

func (p *pinger) note(seq uint16, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if i := int(seq); i < len(p.trips) && p.trips[i] < 0 {
		p.trips[i] = now.Sub(p.sent[i])
	}
}

func (p *pinger) outcome() pings {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out pings
	begin := -1 // of the gap
	for i, trip := range p.trips {
		if trip < 0 {
			out.Lost++
			if begin < 0 {
				begin = i
			}
			continue
		}
		out.RoundTrips = append(out.RoundTrips, float64(trip)/float64(time.Millisecond))
		if begin >= 0 {
			out.gap(p.sent[i].Sub(p.sent[begin]))
		}
		begin = -1
	}
	if begin >= 0 {
		out.gap(p.sent[len(p.sent)-1].Sub(p.sent[begin]))
	}
	slices.Sort(out.RoundTrips)
	return out
}

// gap notes a time without answers if it is long.
func (p *pings) gap(d time.Duration) {
	if d >= longGap {
		p.Gaps = append(p.Gaps, d.Seconds())
	}
}

// echo writes an echo request:
//
//	| type 1 | code 1 | checksum 2 | identifier 2 | sequence 2 | data … |
func echo(id, seq uint16) []byte {
	b := make([]byte, echoHeader+pingSize)
	b[0] = echoRequest
	binary.BigEndian.PutUint16(b[4:], id)
	binary.BigEndian.PutUint16(b[6:], seq)
	binary.BigEndian.PutUint16(b[2:], checksum(b))
	return b
}

func answered(b []byte, id uint16) (seq uint16, ok bool) {
	if len(b) != echoHeader+pingSize || b[0] != echoReply || binary.BigEndian.Uint16(b[4:]) != id {
		return 0, false
	}
	return binary.BigEndian.Uint16(b[6:]), true
}

// checksum is that of the Internet, RFC 1071, of an even number of bytes.
func checksum(b []byte) uint16 {
	var sum uint32
	for ; len(b) > 1; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
