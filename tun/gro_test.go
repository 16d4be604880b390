package tun

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// placeFull gives the writer a packet with full checksums.
func placeFull(w *writer, p []byte) {
	one := pieceOf(p)
	w.place(&one)
}

// joined is what a writer makes of packets: super-packets with their headers.
func joined(w *writer, packets [][]byte) (out [][]byte, heads []virtio) {
	for _, p := range packets {
		placeFull(w, p)
	}
	for i := range w.groups[:w.count] {
		g := &w.groups[i]
		heads = append(heads, g.join())
		b := bytes.Clone(g.packets[0])
		for _, p := range g.packets[1:] {
			b = append(b, p[g.layout.headers:]...)
		}
		out = append(out, b)
	}
	w.clear()
	return out, heads
}

// apart splits what joined made.
func apart(t interface{ Fatal(...any) }, supers [][]byte, heads []virtio) [][]byte {
	var out [][]byte
	for i, p := range supers {
		if heads[i].kind == kindNone {
			out = append(out, p)
		} else {
			out = append(out, cutAll(t, p, heads[i])...)
		}
	}
	return out
}

func clones(packets [][]byte) [][]byte {
	var out [][]byte
	for _, p := range packets {
		out = append(out, bytes.Clone(p))
	}
	return out
}

func TestJoinThenSplitIsIdentity(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := drawSegments(t)
		packets := s.packets()
		supers, heads := joined(&writer{tcp: true, udp: true}, clones(packets))
		if want := 1; len(supers) != want {
			t.Fatalf("%d super-packets, want %d", len(supers), want)
		}
		mustEqual(t, apart(t, supers, heads), packets)
	})
}

// Flows are interleaved, some packets are damaged, doubled or out of order;
// each flow must come out as it went in.
func TestJoinKeepsOrderOfFlows(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var flows [][][]byte
		for i := range rapid.IntRange(1, 4).Draw(t, "flows") {
			s := drawSegments(t)
			s.ports = uint16(i)
			s.payload = s.payload[:min(len(s.payload), 20*s.size)]
			flows = append(flows, s.packets())
		}
		rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "mix"), 0))
		var packets [][]byte
		for len(flows) > 0 && len(packets) < batchSize {
			i := rng.IntN(len(flows))
			p := bytes.Clone(flows[i][0])
			switch rng.IntN(8) {
			case 0:
				p[len(p)-1]++ // damaged
			case 1:
				packets = append(packets, bytes.Clone(p)) // doubled
			case 2:
				if len(flows[i]) > 1 {
					flows[i][0], flows[i][1] = flows[i][1], flows[i][0]
				}
			}
			packets = append(packets, p)
			if flows[i] = flows[i][1:]; len(flows[i]) == 0 {
				flows = slices.Delete(flows, i, i+1)
			}
		}
		packets = packets[:min(len(packets), batchSize)]
		supers, heads := joined(&writer{tcp: true, udp: true}, clones(packets))
		got := apart(t, supers, heads)
		sameFlows(t, unmarked(got, packets), packets)
	})
}

// sameFlows checks that got holds each flow's packets in want's order.
func sameFlows(t interface{ Fatalf(string, ...any) }, got, want [][]byte) {
	byFlow := func(packets [][]byte) map[flow][][]byte {
		m := make(map[flow][][]byte)
		for _, p := range packets {
			f := layoutOf(p).flow
			m[f] = append(m[f], p)
		}
		return m
	}
	g, w := byFlow(got), byFlow(want)
	if len(g) != len(w) {
		t.Fatalf("%d flows, want %d", len(g), len(w))
	}
	for f, packets := range w {
		mustEqual(t, g[f], packets)
	}
}

// What differs in a way that splitting could not restore is not joined.
func TestNotJoined(t *testing.T) {
	pair := func() [][]byte {
		return segments{size: 200, payload: pattern(400, 1), options: 3}.packets()
	}
	const ip = ipv4HeaderSize
	for name, change := range map[string]func(p []byte){
		"type of service":  func(p []byte) { p[1] = 4 },
		"ttl":              func(p []byte) { p[8]-- },
		"may fragment":     func(p []byte) { p[6] = 0 },
		"fragment":         func(p []byte) { p[6] = 0x20 },
		"identification":   func(p []byte) { p[4]++ },
		"acknowledgement":  func(p []byte) { p[ip+tcpAck]++ },
		"window":           func(p []byte) { p[ip+tcpWindow]++ },
		"urgent":           func(p []byte) { p[ip+tcpUrgent]++ },
		"option":           func(p []byte) { p[ip+tcpHeaderSize]++ },
		"sequence":         func(p []byte) { p[ip+tcpSeq]++ },
		"fin":              func(p []byte) { p[ip+tcpFlags] |= flagFIN },
		"reserved flag":    func(p []byte) { p[ip+tcpOffset] |= 1 },
		"port":             func(p []byte) { p[ip]++ },
		"address":          func(p []byte) { p[15]++ },
		"header length":    func(p []byte) { p[ip+tcpOffset] = 0x50 },
		"wrong ip version": func(p []byte) { p[0] = 0x75 },
	} {
		packets := pair()
		change(packets[1])
		l := layoutOf(packets[1])
		if l.headers > 0 { // all but the one thing is right
			at := l.transport + tcpSum
			packets[1][at], packets[1][at+1] = 0, 0
			binary.BigEndian.PutUint16(packets[1][at:], ^fold(sum(packets[1][l.transport:], l.pseudo(len(packets[1])))))
		}
		want := clones(packets)
		supers, _ := joined(&writer{tcp: true, udp: true}, packets)
		if len(supers) != 2 {
			t.Errorf("%s: joined", name)
			continue
		}
		mustEqual(t, supers, want)
	}
	if supers, heads := joined(&writer{tcp: true}, pair()); len(supers) != 1 || heads[0].kind != kindTCP4 {
		t.Error("the unchanged pair is not joined")
	}
	if supers, _ := joined(&writer{udp: true}, pair()); len(supers) != 2 {
		t.Error("joined although switched off")
	}
}

func TestDamagedIsNeverBlessed(t *testing.T) {
	for _, udp := range []bool{false, true} {
		for damaged := range 3 {
			packets := segments{udp: udp, size: 300, payload: pattern(900, 2)}.packets()
			packets[damaged][100] ^= 1
			supers, heads := joined(&writer{tcp: true, udp: true}, clones(packets))
			mustEqual(t, apart(t, supers, heads), packets)
		}
	}
	none := segments{udp: true, size: 300, payload: pattern(900, 2)}.packets()
	for _, p := range none {
		p[ipv4HeaderSize+udpSum], p[ipv4HeaderSize+udpSum+1] = 0, 0 // sender sent no checksum
	}
	if supers, _ := joined(&writer{udp: true}, clones(none)); len(supers) != len(none) {
		t.Error("joined without checksums")
	}
}

func TestPart(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := drawSegments(t)
		packets := s.packets()
		w := &writer{tcp: true, udp: true}
		for _, p := range clones(packets) {
			placeFull(w, p)
		}
		g := &w.groups[0]
		g.join()
		g.part()
		mustEqual(t, g.packets, packets)
	})
}

// FuzzJoin gives the writer foreign packets, cut out of one string of bytes.
func FuzzJoin(f *testing.F) {
	add := func(packets [][]byte) {
		var b []byte
		for _, p := range packets {
			b = binary.BigEndian.AppendUint16(b, uint16(len(p)))
			b = append(b, p...)
		}
		f.Add(b)
	}
	add(segments{size: 100, payload: pattern(250, 0)}.packets())
	add(segments{v6: true, udp: true, size: 30, payload: pattern(250, 0)}.packets())
	f.Fuzz(func(t *testing.T, b []byte) {
		var packets [][]byte
		for len(b) > 2 && len(packets) < batchSize {
			n := min(be16(b), len(b)-2)
			packets = append(packets, b[2:2+n])
			b = b[2+n:]
		}
		supers, heads := joined(&writer{tcp: true, udp: true}, clones(packets))
		sameFlows(t, unmarked(apart(t, supers, heads), packets), packets)
	})
}

// unmarked gives packets whose identification means nothing the one they had,
// which joining may lose (RFC 6864 §4.1).
func unmarked(got, want [][]byte) [][]byte {
	byRest := make(map[string][]int)
	rest := func(p []byte) string {
		p = bytes.Clone(p)
		if l := layoutOf(p); l.headers > 0 && !l.flow.v6 && p[6]&0x40 != 0 {
			clear(p[4:6])
			clear(p[10:12])
		}
		return string(p)
	}
	for i, p := range want {
		byRest[rest(p)] = append(byRest[rest(p)], i)
	}
	for i, p := range got {
		if l := byRest[rest(p)]; len(l) > 0 {
			got[i] = want[l[0]]
			byRest[rest(p)] = l[1:]
		}
	}
	return got
}

func BenchmarkJoin(b *testing.B) {
	w := &writer{tcp: true, udp: true}
	packets := segments{size: 1348, payload: pattern(62000, 0)}.packets()
	b.SetBytes(62000)
	b.ReportAllocs()
	for b.Loop() {
		for _, p := range packets {
			placeFull(w, p)
		}
		w.clear()
	}
}

// A packet whose IP header is damaged is not joined: the super-packet's header,
// which is right, would stand for it.
func TestDamagedHeaderIsNotJoined(t *testing.T) {
	for _, udp := range []bool{false, true} {
		for damaged := range 3 {
			packets := segments{udp: udp, size: 100, payload: pattern(300, 1)}.packets()
			packets[damaged][10] ^= 1
			supers, heads := joined(&writer{tcp: true, udp: true}, clones(packets))
			mustEqual(t, apart(t, supers, heads), packets)
		}
	}
}
