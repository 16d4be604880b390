package overlay

import (
	"context"
	"crypto/rand"
	"fmt"
	"net"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
)

// pingWait is how long one echo is waited for.
const pingWait = 2 * time.Second

// ping sends one ICMP echo to the peer's overlay address, through the tunnel as
// any program's packets, and tells by which path it went.
func (s *session) ping(ctx context.Context, name string, full bool) (PingReply, error) {
	m, err := s.find(name)
	if err != nil {
		return PingReply{}, err
	}
	reply := PingReply{Name: m.cert.Name, IP: m.cert.IP4}
	ctx, cancel := context.WithTimeout(ctx, pingWait)
	defer cancel()
	rtt, err := echo(ctx, m.cert.IP4.AsSlice())
	if err != nil && ctx.Err() == nil {
		return reply, err
	}
	if reply.OK = err == nil; reply.OK {
		reply.RTTms = milliseconds(rtt)
	}
	s.mu.Lock()
	reply.Path = s.pathStatus(m, full)
	s.mu.Unlock()
	return reply, nil
}

// echo sends one ICMP echo request (RFC 792) and waits for its reply.
func echo(ctx context.Context, to net.IP) (time.Duration, error) {
	c, err := icmp.ListenPacket("ip4:icmp", "0.0.0.0")
	if err != nil {
		return 0, fmt.Errorf("open a socket for icmp: %w", err)
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(time.Unix(1, 0)) })()
	body := &icmp.Echo{ID: int(randomUint16()), Seq: 1, Data: []byte("overlay ping")}
	msg, err := (&icmp.Message{Type: ipv4.ICMPTypeEcho, Body: body}).Marshal(nil)
	if err != nil {
		return 0, fmt.Errorf("encode an echo request: %w", err)
	}
	start := time.Now()
	if _, err := c.WriteTo(msg, &net.IPAddr{IP: to}); err != nil {
		return 0, fmt.Errorf("send an echo request to %s: %w", to, err)
	}
	for {
		ok, err := readEcho(c, to, body)
		if err != nil {
			return 0, err
		}
		if ok {
			return time.Since(start), nil
		}
	}
}

// readEcho reads one ICMP message and says whether it is the reply to sent.
func readEcho(c *icmp.PacketConn, from net.IP, sent *icmp.Echo) (bool, error) {
	buf := make([]byte, 1500)
	n, src, err := c.ReadFrom(buf)
	if err != nil {
		return false, fmt.Errorf("wait for the echo reply of %s: %w", from, err)
	}
	msg, err := icmp.ParseMessage(ipv4.ICMPTypeEchoReply.Protocol(), buf[:n])
	if err != nil || msg.Type != ipv4.ICMPTypeEchoReply {
		return false, nil
	}
	got, ok := msg.Body.(*icmp.Echo)
	a, isIP := src.(*net.IPAddr)
	return ok && isIP && a.IP.Equal(from) && got.ID == sent.ID && got.Seq == sent.Seq, nil
}

func randomUint16() uint16 {
	var b [2]byte
	_, _ = rand.Read(b[:]) // fills b or ends the program
	return uint16(b[0])<<8 | uint16(b[1])
}
