package coord

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"os"
	"testing"
	"time"
)

func TestUpgrade(t *testing.T) {
	keys := make(chan []byte, 1)
	c := dial(t, serve(t, testKey("server"), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != RelayPath || r.Header.Get("Upgrade") != RelayProtocol || r.Header.Get("Connection") != "Upgrade" || r.Header.Get(HeaderVersion) == "" {
			t.Errorf("%s with %v", r.URL, r.Header)
		}
		key, err := r.TLS.ExportKeyingMaterial(ExporterRelay, nil, exporterSize)
		if err != nil {
			t.Error(err)
		}
		keys <- key
		conn, rw, _ := w.(http.Hijacker).Hijack()
		// What comes in one write with the answer must not be lost.
		_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: overlay-relay\r\n\r\nearly")
		_, _ = io.Copy(conn, rw.Reader)
		_ = conn.Close()
	})))
	binding, err := c.Export(ExporterRelay)
	if err != nil {
		t.Fatal(err)
	}
	up, err := c.Upgrade(t.Context(), RelayPath, RelayProtocol)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(binding, <-keys) || len(binding) != exporterSize {
		t.Error("the two ends have different bindings")
	}
	long := bytes.Repeat([]byte("frame"), 40<<10) // more than an answer may be
	go func() { _, _ = up.Write(long) }()
	got := make([]byte, len("early")+len(long))
	if _, err := io.ReadFull(up, got); err != nil || string(got) != "early"+string(long) {
		t.Fatalf("%d bytes: %v", len(got), err)
	}
	if _, err := c.Nodes(t.Context()); !errors.Is(err, errUpgraded) {
		t.Errorf("a request after the upgrade: %v", err)
	}
	_ = up.SetReadDeadline(time.Now())
	if _, err := up.Read(got); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read past the deadline: %v", err)
	}
	if err := errors.Join(up.Close(), up.Close()); err != nil {
		t.Error(err)
	}
}

func TestUpgradeRefused(t *testing.T) {
	c := dial(t, serve(t, testKey("server"), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/refused" {
			reply(w, http.StatusForbidden, Error{Code: CodeNotMember, Message: "the device is no member"})
			return
		}
		conn, _, _ := w.(http.Hijacker).Hijack()
		_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		_ = conn.Close()
	})))
	_, err := c.Upgrade(t.Context(), "/refused", RelayProtocol)
	if e, ok := errors.AsType[*Error](err); !ok || e.Code != CodeNotMember {
		t.Errorf("error %v", err)
	}
	if _, err := c.Upgrade(t.Context(), RelayPath, RelayProtocol); err == nil || errors.Is(err, errUpgraded) {
		t.Errorf("another protocol: %v", err)
	}
}
