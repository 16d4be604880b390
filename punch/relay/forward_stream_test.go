package relay

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

func TestForwardToStream(t *testing.T) {
	w := newSite(t, ServerConfig{})
	l := &loop{s: w.s, train: newTrain(w.s), receiver: &receiver{}}
	a, b := w.guest(1), w.guest(2)
	at := place("192.0.2.1:1000")
	w.join(a, at)
	stream, _, n := w.connect(b, "192.0.2.2:1000")
	w.mustOpen(a, at, b)
	d := (&station{guest: a}).datagram(&station{guest: b}, "there", 100)
	l.take(&arrival{data: slices.Concat(d, d, d[:50]), stride: 100, name: &at.name})
	if want := [][]byte{d, d, d[:50]}; !slices.EqualFunc(stream.frames, want, bytes.Equal) {
		t.Errorf("%d frames", len(stream.frames))
	}
	w.s.leave(n, n.tls.Load())
	l.take(&arrival{data: d, stride: 100, name: &at.name})
	if got := w.s.Stats().Drops.Offline; got != 1 {
		t.Errorf("%d dropped of a node that is nowhere", got)
	}
}

// Frames of a connection reach both kinds of transport, whatever their order.
func TestForwardFromStream(t *testing.T) {
	w := newSite(t, ServerConfig{})
	relay := addrOf(w.serve(t, "udp4", "127.0.0.1:0"))
	a, c := w.guest(1), w.guest(3)
	_, tls, n := w.connect(a, "192.0.2.1:1000")
	b := w.station(t, 2, relay)
	other, _, _ := w.connect(c, "192.0.2.3:1000")
	bm := b.guest
	open, _ := parseOpened(w.s.control(n, a.open(bm, c), tls))
	if open.bitmap != 3 {
		t.Fatalf("opened %b", open.bitmap)
	}
	from := &station{guest: a}
	var run []byte
	var toB, toC [][]byte
	for i := range 140 {
		d := from.datagram(b, string(rune('a'+i)), 100-10*(i%75/70)) // more than a train, then shorter ones
		if i%50 == 49 {
			d = from.datagram(&station{guest: c}, string(rune('a'+i)), 100)
			toC = append(toC, d)
		} else {
			toB = append(toB, d)
		}
		run = appendFrame(run, d)
	}
	run = appendFrame(run, b.datagram(&station{guest: c}, "foreign", 100))
	run = appendFrame(run, []byte{FlowByte, 1})
	w.s.forwardRun(n, append(run, 0xff))
	b.expect(toB...)
	b.silence()
	if !slices.EqualFunc(other.frames, toC, bytes.Equal) {
		t.Errorf("%d frames of %d", len(other.frames), len(toC))
	}
	if got, want := w.s.Stats().Drops, (Drops{Flow: 1, Malformed: 2}); got != want {
		t.Errorf("%+v", got)
	}
}

// FuzzTake feeds whatever can be in a buffer of the kernel's: nothing may leave
// for anybody but the other end of the flow it came in.
func FuzzTake(f *testing.F) {
	w := newSite(f, ServerConfig{Answer: func(_ []byte, _, _ netip.AddrPort) []byte { return nil }})
	a, b := w.guest(1), w.guest(2)
	at := place("192.0.2.1:1000")
	w.join(a, at)
	stream, _, _ := w.connect(b, "192.0.2.2:1000")
	w.mustOpen(a, at, b)
	l := &loop{s: w.s, train: newTrain(w.s), receiver: &receiver{socket: &socket{}}, admissions: make(chan pending, 1)}
	h := FlowOf(a.key, b.key)
	f.Add(h[:], uint16(5)) // a header in two datagrams is none
	f.Add(slices.Concat(h[:], h[:], []byte{0xA0, 1, 1, 0, 0, 0, 0, 0}, h[:]), uint16(8))
	f.Fuzz(func(t *testing.T, data []byte, stride uint16) {
		if stride == 0 || len(data) == 0 {
			return
		}
		stream.frames = nil
		size := min(int(stride), len(data))
		l.take(&arrival{data: data, stride: size, name: &at.name})
		l.train.count, l.train.used = 0, 0 // answers, which have nowhere to go here
		var want [][]byte
		for i := 0; i < len(data); i += size {
			if d := data[i:min(i+size, len(data))]; bytes.HasPrefix(d, h[:]) && len(d) <= MaxFrame {
				want = append(want, d)
			}
		}
		if len(want) < len(stream.frames) || len(want) > len(stream.frames) && w.s.Stats().Drops.Rate == 0 {
			t.Errorf("%d datagrams forwarded of %d", len(stream.frames), len(want))
		}
	})
}

func FuzzParse(f *testing.F) {
	c := control{b: make([]byte, 0, receiveControl)}
	c.source(netip.MustParseAddr("192.0.2.1"), true)
	binary.NativeEndian.PutUint32(c.add(unix.IPPROTO_UDP, unix.UDP_GRO, 4), 1000)
	f.Add(c.b)
	f.Fuzz(func(t *testing.T, b []byte) {
		a := arrival{stride: 1 << 16}
		if a.parse(b); a.stride <= 0 || a.stride > 1<<16 {
			t.Errorf("stride %d", a.stride)
		}
	})
}
