package tun

import (
	"bytes"
	"net/netip"
	"testing"
)

var innerB = netip.MustParseAddr("100.64.0.2")

// boxed is a container from keyA to keyB with records.
func boxed(records ...[]byte) []byte {
	b := bytes.Join(append([][]byte{make([]byte, ipv4HeaderSize)}, records...), nil)
	putContainer(b, innerA, innerB)
	return b
}

// recordOf is one record.
func recordOf(kind uint8, p []byte, segment int) []byte {
	b := make([]byte, recordHeaderSize, recordHeaderSize+len(p))
	putRecord(b, kind, len(p), segment)
	return append(b, p...)
}

// walk is what a walk through a container finds, and whether all of it was valid.
func walk(b []byte) (kinds []uint8, pieces []piece, ok bool) {
	r, ok := recordsOf(b)
	for ok && len(r.rest) > 0 {
		var kind uint8
		var p piece
		if kind, p, ok = r.next(); ok {
			kinds, pieces = append(kinds, kind), append(pieces, p)
		}
	}
	return kinds, pieces, ok
}

func TestRecords(t *testing.T) {
	full := segments{udp: true, size: 100, payload: pattern(100, 1)}.packets()[0]
	tcp4, _ := segments{size: 100, payload: pattern(950, 1)}.super()
	tcp6, _ := segments{v6: true, size: 100, payload: pattern(950, 1)}.super()
	udp, _ := segments{udp: true, size: 100, payload: pattern(950, 1)}.super()
	report := make([]byte, reportRecord)
	putReport(report, 5, 6)
	kinds, pieces, ok := walk(boxed(recordOf(recordFull, full, 0), recordOf(recordPartial, full, 0), report,
		recordOf(recordTCP4, tcp4, 100), recordOf(recordTCP6, tcp6, 100), recordOf(recordUDP, udp, 100)))
	if want := []uint8{recordFull, recordPartial, recordReport, recordTCP4, recordTCP6, recordUDP}; !ok || !bytes.Equal(kinds, want) {
		t.Fatalf("kinds %v, valid %v", kinds, ok)
	}
	for i, want := range [][]byte{full, full, {0, 0, 0, 5, 0, 0, 0, 6}, tcp4, tcp6, udp} {
		if !bytes.Equal(pieces[i].data, want) {
			t.Errorf("record %d differs", i)
		}
		segments := 1
		if i > 2 {
			segments = 10
		}
		if i != 2 && (pieces[i].segments != segments || pieces[i].partial != (i > 0)) {
			t.Errorf("record %d: %d segments, partial %v", i, pieces[i].segments, pieces[i].partial)
		}
	}
}

// Whatever is wrong with a record, it is not taken.
func TestBrokenRecords(t *testing.T) {
	packet := segments{udp: true, size: 100, payload: pattern(100, 1)}.packets()[0]
	tcp4, _ := segments{size: 10, payload: pattern(1290, 1)}.super()
	udp, _ := segments{udp: true, size: 10, payload: pattern(950, 1)}.super()
	change := func(b []byte, at int, v byte) []byte { b = bytes.Clone(b); b[at] = v; return b }
	for name, record := range map[string][]byte{
		"cut header":          {recordFull, 0, 0},
		"nothing":             recordOf(recordFull, nil, 0),
		"too long":            recordOf(recordFull, packet, 0)[:100],
		"reserved byte":       change(recordOf(recordFull, packet, 0), 1, 1),
		"unknown kind":        recordOf(5, packet, 0),
		"no ip":               recordOf(recordFull, change(packet, 0, 0x25), 0),
		"short ip":            recordOf(recordFull, packet[:19], 0),
		"ip length":           recordOf(recordFull, change(packet, 3, 20), 0),
		"container in it":     recordOf(recordFull, boxed(), 0),
		"no transport":        recordOf(recordPartial, change(packet, 9, 1), 0),
		"fragment":            recordOf(recordPartial, change(packet, 6, 0x20), 0),
		"ip options":          recordOf(recordPartial, change(packet, 0, 0x46), 0),
		"no segment":          recordOf(recordUDP, udp, 0),
		"udp as tcp":          recordOf(recordTCP4, udp, 10),
		"tcp as udp":          recordOf(recordUDP, tcp4, 100),
		"tcp4 as tcp6":        recordOf(recordTCP6, tcp4, 100),
		"129 segments":        recordOf(recordTCP4, tcp4, 10),
		"udp length":          recordOf(recordUDP, change(udp, ipv4HeaderSize+udpLength, 1), 10),
		"tcp header too long": recordOf(recordTCP4, change(segments{size: 10, payload: pattern(10, 1)}.packets()[0], ipv4HeaderSize+tcpOffset, 0xf0), 10),
		"tcp header too short": recordOf(recordTCP4,
			change(tcp4, ipv4HeaderSize+tcpOffset, 0x40), 100),
		"short report": recordOf(recordReport, make([]byte, 7), 0),
		"long report":  recordOf(recordReport, make([]byte, 9), 0),
	} {
		if kinds, _, ok := walk(boxed(recordOf(recordFull, packet, 0), record)); ok || len(kinds) != 1 {
			t.Errorf("%s: %d records, valid %v", name, len(kinds), ok)
		}
	}
	good := boxed(recordOf(recordFull, packet, 0))
	for name, b := range map[string][]byte{
		"options": change(good, 0, 0x46),
		"longer":  append(bytes.Clone(good), 0),
		"shorter": good[:len(good)-1],
	} {
		if kinds, _, ok := walk(b); ok || len(kinds) > 0 {
			t.Errorf("%s: valid", name)
		}
	}
}

func FuzzContainer(f *testing.F) {
	packet := segments{udp: true, size: 100, payload: pattern(100, 1)}.packets()[0]
	tcp, _ := segments{v6: true, size: 100, payload: pattern(950, 1)}.super()
	report := make([]byte, reportRecord)
	putReport(report, 5, 6)
	f.Add(boxed(recordOf(recordFull, packet, 0), report, recordOf(recordTCP6, tcp, 100)))
	f.Add(boxed(recordOf(recordPartial, packet, 0), recordOf(recordPartial, packet, 0)))
	n, _ := largeTunnel(f, everything)
	w := &n.writer
	w.run = func(uintptr) bool { return true }
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > maxPacket || !contained(b) {
			return
		}
		kinds, pieces, _ := walk(b)
		for i, p := range pieces {
			checkPiece(t, kinds[i], &p)
		}
		w.from = sources{peer: n.peers.byKey(keyA), first: innerA}
		w.unpack(b)
		for i := range w.groups[:w.count] {
			g := &w.groups[i]
			if src, _ := innerAddrs(g.packets[0]); n.peers.byAddr(src) != w.from.peer {
				t.Fatal("a source that is not the peer's passed")
			}
			h := g.join()
			if h.flags&needsSum != 0 && int(h.sumStart)+int(h.sumOffset)+2 > len(g.packets[0]) {
				t.Fatal("checksum outside the packet")
			}
			g.part()
		}
		w.clear()
	})
}

// checkPiece checks that a record is what it says.
func checkPiece(t *testing.T, kind uint8, p *piece) {
	if kind == recordReport {
		if len(p.data) != reportSize {
			t.Fatal("report of another size")
		}
		return
	}
	if packetSize(p.data) != len(p.data) {
		t.Fatal("length differs from the packet's own")
	}
	if kind == recordFull || kind == recordPartial {
		return
	}
	var g group
	g.begin(p)
	var s split
	if !s.start(bytes.Clone(p.data), g.head(max(2, p.segments))) || s.left() != p.segments || p.segments > maxRecordSegments {
		t.Fatalf("%d segments cannot be split", p.segments)
	}
}
