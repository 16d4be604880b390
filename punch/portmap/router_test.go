package portmap

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"
)

const testPort = 41641

func local() netip.Addr { return netip.MustParseAddr("127.0.0.1") }

func outer() netip.Addr { return netip.MustParseAddr("203.0.113.7") }

// loopback draws an address for a router, so that tests at the same time do not
// meet.
func loopback() netip.Addr {
	return netip.AddrFrom4([4]byte{127, byte(1 + rand.N(250)), byte(rand.N(250)), byte(1 + rand.N(250))})
}

// router answers PCP and NAT-PMP on loopback, as far as it is told to.
type router struct {
	t    *testing.T
	addr netip.Addr
	conn *net.UDPConn

	mu       sync.Mutex
	pcp, pmp bool
	result   byte // of mapping requests; PCP and NAT-PMP
	external netip.AddrPort
	started  time.Time
	nonce    []byte            // of the mapping; nil: none, or of NAT-PMP
	mapped   map[uint16]uint16 // inner to outer port
	lies     [][]byte          // sent before each answer
	lost     int               // requests that are not heard
	keeps    bool              // removing is refused, and lives below two minutes are made that long
	granted  uint32            // seconds, last, of PCP
}

func newRouter(t *testing.T) *router {
	t.Helper()
	return newRouterAt(t, loopback())
}

func newRouterAt(t *testing.T, addr netip.Addr) *router {
	t.Helper()
	r := &router{
		t: t, addr: addr, started: time.Now().Add(-1000 * time.Second),
		external: netip.AddrPortFrom(outer(), 0), mapped: map[uint16]uint16{},
	}
	var err error
	if r.conn, err = net.ListenUDP("udp", udpAddr(r.addr, routerPort)); err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(r.serve)
	t.Cleanup(func() {
		_ = r.conn.Close()
		serving.Wait()
	})
	return r
}

func (r *router) route() Route { return Route{Gateway: r.addr, Local: local()} }

// set changes the router's mind.
func (r *router) set(change func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	change()
}

// reboot forgets everything, the time included.
func (r *router) reboot() {
	r.set(func() { r.started, r.nonce, r.mapped = time.Now(), nil, map[uint16]uint16{} })
}

func (r *router) has(port uint16) uint16 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.mapped[port]
}

func (r *router) serve() {
	b := make([]byte, 2048)
	for {
		n, from, err := r.conn.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		r.mu.Lock()
		answer := r.answer(b[:n])
		lies := r.lies
		r.mu.Unlock()
		if answer == nil {
			continue
		}
		for _, lie := range append(lies, answer) {
			_, _ = r.conn.WriteToUDPAddrPort(lie, from)
		}
	}
}

func (r *router) answer(b []byte) []byte {
	if r.lost > 0 {
		r.lost--
		return nil
	}
	epoch := uint32(time.Since(r.started) / time.Second)
	switch {
	case b[0] == pcpVersion && r.pcp:
		return r.answerPCP(b, epoch)
	case b[0] == pcpVersion && r.pmp: // RFC 6887 section 9
		return binary.BigEndian.AppendUint32([]byte{0, b[1] | 0x80, 0, 1}, epoch)
	case b[0] == pmpVersion && r.pmp:
		return r.answerPMP(b, epoch)
	}
	return nil
}

func (r *router) answerPCP(b []byte, epoch uint32) []byte {
	out := append([]byte{2, b[1] | 0x80, 0, 0}, b[4:8]...)
	out = binary.BigEndian.AppendUint32(out, epoch)
	out = append(out, make([]byte, 12)...)
	if b[1] == pcpAnnounce {
		return out
	}
	out = append(out, b[24:]...)
	if out[3] = r.result; r.result != 0 {
		return out
	}
	port := binary.BigEndian.Uint16(b[40:])
	if r.nonce != nil && string(r.nonce) != string(b[24:36]) {
		out[3] = 2
		return out
	}
	life := binary.BigEndian.Uint32(b[4:])
	if life == 0 && r.keeps {
		out[3] = pcpNotAuthorized
		return out
	}
	if life == 0 {
		delete(r.mapped, port)
		r.nonce = nil
		return out
	}
	if r.keeps {
		life = max(life, 120)
		binary.BigEndian.PutUint32(out[4:], life)
	}
	r.granted = life
	external := binary.BigEndian.Uint16(b[42:])
	if r.external.Port() != 0 {
		external = r.external.Port()
	}
	r.mapped[port], r.nonce = external, append([]byte{}, b[24:36]...)
	binary.BigEndian.PutUint16(out[42:], external)
	ip := r.external.Addr().As16()
	copy(out[44:], ip[:])
	return out
}

func (r *router) answerPMP(b []byte, epoch uint32) []byte {
	out := binary.BigEndian.AppendUint32([]byte{0, b[1] | 0x80, 0, 0}, epoch)
	if b[1] == pmpAddress {
		return append(out, r.external.Addr().AsSlice()...)
	}
	if out[3] = r.result; r.result != 0 {
		return out
	}
	port, external := binary.BigEndian.Uint16(b[4:]), binary.BigEndian.Uint16(b[6:])
	if binary.BigEndian.Uint32(b[8:]) == 0 {
		delete(r.mapped, port)
		return append(out, b[4:12]...)
	}
	if r.external.Port() != 0 {
		external = r.external.Port()
	}
	r.mapped[port] = external
	out = append(out, b[4], b[5], byte(external>>8), byte(external))
	return append(out, b[8:12]...)
}

func wanted() want { return want{port: testPort, lifetime: lifetime} }

// timely is a context for one request.
func timely(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func mustAsk(t *testing.T, p protocol, want netip.AddrPort) grant {
	t.Helper()
	got, err := p.ask(timely(t), wanted())
	if err != nil {
		t.Fatal(err)
	}
	if got.external != want || got.lifetime != lifetime {
		t.Fatalf("granted %v for %v, want %v for %v", got.external, got.lifetime, want, lifetime)
	}
	return got
}

func mustBe(t *testing.T, p protocol, got grant, want bool) {
	t.Helper()
	if alive, err := p.alive(timely(t), got); err != nil || alive != want {
		t.Errorf("alive: %v, %v; want %v", alive, err, want)
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal(fmt.Sprint("never: ", what))
		}
	}
}
