package overlay

import (
	"context"
	"crypto/rand"
	"fmt"
	"net"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"

	"overlay/punch"
)

// pingWait is how long one echo is waited for.
const pingWait = 2 * time.Second

// answerWait is how long, at least, the path has to answer that a reply is said
// to have come by.
const answerWait = 300 * time.Millisecond

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
	path := s.answering(ctx, punch.Key(m.cert.WireGuard))
	s.mu.Lock()
	if reply.Path = s.describe(m, path, full); reply.OK && reply.Path.Kind == "none" {
		reply.Path = s.route(path, full) // whatever the server says
	}
	s.mu.Unlock()
	return reply, nil
}

// answering is the path to a peer that answers now. The endpoint alone does not
// tell: beside a direct path that is in doubt copies go through a relay, and the
// reply may have come there.
func (s *session) answering(ctx context.Context, k punch.Key) punch.Path {
	path, ok := s.endpoints.path(k)
	if !ok || path.Type == punch.Relayed {
		return path
	}
	ctx, cancel := context.WithTimeout(ctx, max(answerWait, 3*path.RTT))
	defer cancel()
	if now, err := s.agent.Ping(ctx, k); err == nil {
		return now
	}
	if path, _ = s.endpoints.path(k); path.Type != punch.Relayed && path.Also.IsValid() {
		path = punch.Path{Peer: k, Addr: path.Also, Type: punch.Relayed}
	}
	return path
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
