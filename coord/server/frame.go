package server

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"fmt"

	"overlay/coord"
	"overlay/coord/trust"
)

// frameRoom is how many bytes of nodes go into one frame; more nodes go into
// several. The rest of coord.MaxEvent is for what stands around them.
const frameRoom = coord.MaxEvent / 2

// frame is one event as it goes on the wire, encoded once and shared by all
// streams. The nodes stand apart, so that every receiver can be left out of its
// own copy:
//
//	head part , part , part tail
type frame struct {
	head, tail []byte
	parts      []part
	partBytes  int
	revision   uint64 // of the netmap; 0 for what is not part of its history
}

// part is one node, encoded.
type part struct {
	device trust.Key
	raw    []byte
}

// single makes a frame of an event without nodes.
func single(e any) *frame {
	b, err := json.Marshal(e)
	if err != nil {
		panic(fmt.Sprintf("encode event: %v", err)) // our own types always encode
	}
	return &frame{head: b}
}

// netmapFrames encodes a change, or with whole the mesh, as one frame or as
// many as its nodes need. Only the last one can be resumed from.
func netmapFrames(whole bool, rest coord.Netmap, parts []part, at resumePoint) []*frame {
	var frames []*frame
	for first := true; first || len(parts) > 0; first = false {
		n, size := 0, 0
		for n < len(parts) && (n == 0 || size+len(parts[n].raw) < frameRoom) {
			size += len(parts[n].raw) + 1
			n++
		}
		f := &frame{parts: parts[:n], partBytes: size, revision: at.revision, tail: []byte("]}}")}
		if n == len(parts) {
			f.tail = fmt.Appendf(nil, `]},"resume":%q}`, at)
		}
		f.head = netmapHead(whole && first, rest)
		rest = coord.Netmap{}
		frames, parts = append(frames, f), parts[n:]
	}
	return frames
}

// netmapHead is everything of a netmap event before its nodes.
func netmapHead(whole bool, rest coord.Netmap) []byte {
	name := "delta"
	if whole {
		name = "netmap"
	}
	body := single(rest).head
	body = body[:len(body)-1]
	comma := ","
	if len(body) == 1 {
		comma = ""
	}
	return fmt.Appendf(nil, `{%q:%s%s"nodes":[`, name, body, comma)
}

// empty says whether nothing of the frame is for this receiver.
func (f *frame) empty(self trust.Key) bool {
	return len(f.parts) == 1 && f.parts[0].device == self && string(f.head) == `{"delta":{"nodes":[`
}

// size is at least the length of the frame on the wire.
func (f *frame) size() int { return 4 + len(f.head) + f.partBytes + len(f.tail) }

// write writes the frame without the receiver's own node.
func (f *frame) write(w *bufio.Writer, self trust.Key) error {
	n, size := len(f.parts), f.partBytes
	for _, p := range f.parts {
		if p.device == self {
			n--
			size -= len(p.raw) + 1
		}
	}
	if n > 0 {
		size-- // there is one comma less than there are nodes
	}
	length := binary.BigEndian.AppendUint32(nil, uint32(len(f.head)+size+len(f.tail)))
	// A bufio.Writer keeps its first error, so the last call tells of all.
	_, _ = w.Write(length)
	_, _ = w.Write(f.head)
	for _, p := range f.parts {
		if p.device == self {
			continue
		}
		_, _ = w.Write(p.raw)
		if n--; n > 0 {
			_ = w.WriteByte(',')
		}
	}
	_, err := w.Write(f.tail)
	return err
}
