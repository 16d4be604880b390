package coord

import (
	"bytes"
	"errors"
	"io"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"
)

func TestFrames(t *testing.T) {
	var b bytes.Buffer
	long := bytes.Repeat([]byte("x"), 3*frameStep)
	for _, body := range [][]byte{[]byte("{}"), long, []byte("end")} {
		if err := WriteFrame(&b, body); err != nil {
			t.Fatal(err)
		}
	}
	r := iotest.HalfReader(&b)
	for _, want := range [][]byte{[]byte("{}"), long, []byte("end")} {
		got, err := ReadFrame(r, len(long))
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("read %d bytes, error %v, want %d bytes", len(got), err, len(want))
		}
	}
	if _, err := ReadFrame(r, 1); !errors.Is(err, io.EOF) {
		t.Errorf("error %v at the end, want io.EOF", err)
	}
}

func TestReadFrameRefuses(t *testing.T) {
	for _, tt := range []struct {
		name, in, text string
	}{
		{"empty", "\x00\x00\x00\x00", "empty frame"},
		{"too long", "\x00\x00\x00\x03abc", "frame of 3 bytes, at most 2"},
		{"huge", "\xff\xff\xff\xff", "frame of 4294967295 bytes"},
		{"cut in the header", "\x00\x00", "unexpected EOF"},
		{"cut after the header", "\x00\x00\x00\x02", "unexpected EOF"},
		{"cut in the body", "\x00\x00\x00\x02a", "unexpected EOF"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := ReadFrame(strings.NewReader(tt.in), 2)
			if err == nil || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("error %v, want %q", err, tt.text)
			}
		})
	}
}

func TestWriteFrameRefuses(t *testing.T) {
	for _, n := range []int{0, MaxEvent + 1} {
		var b bytes.Buffer
		if err := WriteFrame(&b, make([]byte, n)); err == nil || b.Len() > 0 {
			t.Errorf("%d bytes: error %v, %d bytes written", n, err, b.Len())
		}
	}
	broken := iotest.ErrTimeout
	for _, n := range []int{1, frameStep + 1} {
		if err := WriteFrame(brokenWriter{broken}, make([]byte, n)); !errors.Is(err, broken) {
			t.Errorf("%d bytes: error %v", n, err)
		}
	}
}

type brokenWriter struct{ err error }

func (w brokenWriter) Write([]byte) (int, error) { return 0, w.err }

func TestReadFrameBelievesNoLength(t *testing.T) {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err := ReadFrame(strings.NewReader("\x00\xff\xff\xff"), MaxEvent)
	runtime.ReadMemStats(&after)
	if err == nil {
		t.Error("read a frame that never came")
	}
	if got := after.TotalAlloc - before.TotalAlloc; got > 1<<20 {
		t.Errorf("%d bytes for a frame that never came", got)
	}
}

func FuzzReadFrame(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x02{}"))
	f.Add([]byte("\x00\x00\x00\x05{}"))
	f.Add([]byte("\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, in []byte) {
		const limit = 1 << 10
		body, err := ReadFrame(bytes.NewReader(in), limit)
		if err != nil {
			return
		}
		if len(body) == 0 || len(body) > limit {
			t.Fatalf("frame of %d bytes", len(body))
		}
		var out bytes.Buffer
		if err := WriteFrame(&out, body); err != nil || !bytes.HasPrefix(in, out.Bytes()) {
			t.Fatalf("wrote %x of %x, error %v", out.Bytes(), in, err)
		}
	})
}

func FuzzDecodeEvent(f *testing.F) {
	f.Add([]byte(`{"welcome":{"session":"AAECAwQFBgcICQoLDA0ODw==","stun":[443,3478],"time":"2026-01-02T03:04:05Z"}}`))
	f.Add([]byte(`{"netmap":{"state":"AA==","nodes":[{"device":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=","cap":"","cert":"","online":true}]},"resume":"1/2"}`))
	f.Add([]byte(`{"signal":{"peer":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=","data":"AA=="}}`))
	f.Add([]byte(`{"ping":{}}`))
	f.Fuzz(func(t *testing.T, in []byte) {
		e, err := decodeEvent(in)
		if err != nil {
			return
		}
		if e.Signal != nil && len(e.Signal.Data) > MaxSignal {
			t.Fatalf("signal of %d bytes", len(e.Signal.Data))
		}
		if e.Welcome != nil && (len(e.Welcome.Session) == 0 || len(e.Welcome.Session) > maxSession) {
			t.Fatalf("session of %d bytes", len(e.Welcome.Session))
		}
	})
}
