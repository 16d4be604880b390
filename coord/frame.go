package coord

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

const (
	frameHeader = 4
	// frameStep is how much of a frame is believed before it arrives: a
	// length alone must not make the receiver allocate.
	frameStep = 64 << 10
)

var errEmptyFrame = errors.New("empty frame")

// ReadFrame reads one frame of at most limit bytes: see the package comment.
// It gives io.EOF only when r ends between two frames.
func ReadFrame(r io.Reader, limit int) ([]byte, error) {
	var header [frameHeader]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return nil, err
	}
	n := int64(binary.BigEndian.Uint32(header[:]))
	if n == 0 {
		return nil, errEmptyFrame
	}
	if n > int64(limit) {
		return nil, fmt.Errorf("frame of %d bytes, at most %d are allowed", n, limit)
	}
	var body bytes.Buffer
	body.Grow(int(min(n, frameStep)))
	if _, err := io.CopyN(&body, r, n); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("read frame of %d bytes: %w", n, err)
	}
	return body.Bytes(), nil
}

// WriteFrame writes b as one frame. A small frame is one call of w.Write, so
// that it is one TLS record. It is not safe for concurrent use of one w.
func WriteFrame(w io.Writer, b []byte) error {
	if len(b) == 0 {
		return errEmptyFrame
	}
	if len(b) > MaxEvent {
		return fmt.Errorf("frame of %d bytes, at most %d are allowed", len(b), MaxEvent)
	}
	header := binary.BigEndian.AppendUint32(nil, uint32(len(b)))
	if len(b) <= frameStep {
		_, err := w.Write(append(header, b...))
		return err
	}
	if _, err := w.Write(header); err != nil {
		return err
	}
	_, err := w.Write(b)
	return err
}
