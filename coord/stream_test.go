package coord

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"overlay/coord/trust"
)

// upgraded is the server's end of a stream.
type upgraded struct {
	conn net.Conn
	r    *bufio.Reader
	key  []byte
	from string // Overlay-Resume
}

func (u *upgraded) send(t *testing.T, event string) {
	t.Helper()
	if err := WriteFrame(u.conn, []byte(event)); err != nil {
		t.Error(err)
	}
}

func (u *upgraded) receive(t *testing.T) Report {
	t.Helper()
	frame, err := ReadFrame(u.r, MaxBody)
	if err != nil {
		t.Fatal(err)
	}
	var r Report
	if err := json.Unmarshal(frame, &r); err != nil {
		t.Fatal(err)
	}
	return r
}

// relayKey is a key of 32 zero bytes in base 64.
const relayKey = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="

// streams gives both ends of a stream over loopback.
func streams(t *testing.T, resume string) (*Stream, *upgraded) {
	t.Helper()
	far := make(chan *upgraded, 1)
	c := dial(t, serve(t, testKey("server"), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		key, err := r.TLS.ExportKeyingMaterial(ExporterSTUN, nil, exporterSize)
		if err != nil || r.Header.Get("Upgrade") != "overlay" || r.Header.Get("Connection") != "Upgrade" {
			reply(w, http.StatusBadRequest, Error{Code: CodeBadRequest})
			return
		}
		conn, rw, _ := w.(http.Hijacker).Hijack()
		// The first event comes in one write with the answer: it must not be lost.
		var b bytes.Buffer
		b.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: overlay\r\n\r\n")
		_ = WriteFrame(&b, []byte(`{"welcome":{"session":"AQI=","stun":[3478],"time":"2026-01-02T03:04:05Z","relay":{"key":"`+relayKey+`","ports":[443]}}}`))
		_, _ = conn.Write(b.Bytes())
		far <- &upgraded{conn, rw.Reader, key, r.Header.Get(HeaderResume)}
	})))
	s, err := c.Stream(t.Context(), resume)
	if err != nil {
		t.Fatal(err)
	}
	u := <-far
	t.Cleanup(func() { _ = u.conn.Close() })
	return s, u
}

func TestStream(t *testing.T) {
	s, u := streams(t, "boot/7")
	if !bytes.Equal(s.STUNKey(), u.key) || len(u.key) != exporterSize {
		t.Errorf("STUN key %x, the server has %x", s.STUNKey(), u.key)
	}
	if u.from != "boot/7" {
		t.Errorf("resume %q", u.from)
	}
	welcome, err := s.Next()
	want := Event{Welcome: &Welcome{Session: []byte{1, 2}, STUN: []uint16{3478}, Time: someDate(), Relay: &Relay{Key: make([]byte, relayKeySize), Ports: []uint16{443}}}}
	if diff := cmp.Diff(want, welcome); diff != "" || err != nil {
		t.Fatal(diff, err)
	}
	peer := trust.Key{5}
	u.send(t, `{"horoscope":{"text":"good"},"resume":"boot/8"}`)
	u.send(t, `{"ping":{}}`)
	u.send(t, `{"delta":{"removed":["`+peer.String()+`"],"mood":1},"resume":"boot/9"}`)
	got, err := s.Next()
	want = Event{Delta: &Netmap{Removed: []trust.Key{peer}}, Resume: "boot/9"}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Fatal(diff, err)
	}
	if diff := cmp.Diff(Report{}, u.receive(t)); diff != "" {
		t.Error("answer to a ping:", diff)
	}
	signal, publish := Signal{Peer: peer, Data: []byte("sealed")}, Publish{Record: []byte{1}, Tokens: [][]byte{{2}}}
	if err := errors.Join(s.Signal(signal), s.Publish(publish)); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]Report{{Signal: &signal}, {Publish: &publish}}, []Report{u.receive(t), u.receive(t)}); diff != "" {
		t.Error(diff)
	}
	if _, err := s.conn.Nodes(t.Context()); !errors.Is(err, errUpgraded) {
		t.Errorf("a request on a stream: error %v", err)
	}
	_ = s.Close()
	if _, err := s.Next(); err == nil {
		t.Error("a closed stream gave an event")
	}
	if err := s.Signal(signal); err == nil {
		t.Error("a closed stream took a signal")
	}
}

func TestStreamBounds(t *testing.T) {
	s, u := streams(t, "")
	if err := s.Signal(Signal{Data: make([]byte, MaxSignal+1)}); err == nil {
		t.Error("sent a signal that is too long")
	}
	if err := s.Publish(Publish{Record: make([]byte, MaxBody)}); err == nil {
		t.Error("sent a record that is too long")
	}
	if err := s.Signal(Signal{Data: make([]byte, MaxSignal)}); err != nil {
		t.Errorf("the stream did not survive what was refused: %v", err)
	}
	if r := u.receive(t); r.Signal == nil || len(r.Signal.Data) != MaxSignal {
		t.Errorf("the server got %v", r)
	}
}

func TestStreamEndsWithBadEvents(t *testing.T) {
	long, _ := json.Marshal(Event{Signal: &Signal{Data: make([]byte, MaxSignal+1)}})
	for name, event := range map[string]string{
		"no JSON": "hello", "long signal": string(long),
		"no session":       `{"welcome":{"session":""}}`,
		"long session":     `{"welcome":{"session":"` + strings.Repeat("AAAA", maxSession/3+1) + `"}}`,
		"short relay key":  `{"welcome":{"session":"AQ==","relay":{"key":"AQ=="}}}`,
		"many relay ports": `{"welcome":{"session":"AQ==","relay":{"key":"` + relayKey + `","ports":[` + strings.Repeat("1,", maxSTUNPorts) + `1]}}}`,
		"many ports":       `{"welcome":{"session":"AQ==","stun":[` + strings.Repeat("1,", maxSTUNPorts) + `1]}}`,
		"bad key":          `{"delta":{"removed":["AQ=="]}}`,
	} {
		t.Run(name, func(t *testing.T) {
			s, u := streams(t, "")
			if _, err := s.Next(); err != nil {
				t.Fatal(err)
			}
			u.send(t, event)
			if e, err := s.Next(); err == nil {
				t.Errorf("got %v", e)
			}
		})
	}
}

func TestStreamRefused(t *testing.T) {
	for name, tt := range map[string]struct {
		answer string
		text   string
	}{
		"not a member":     {"HTTP/1.1 403 Forbidden\r\nContent-Length: 49\r\n\r\n" + `{"code":"not_member","message":"you are unknown"}`, "you are unknown"},
		"another protocol": {"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n", "another protocol"},
		"no upgrade":       {"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "answered 200"},
	} {
		t.Run(name, func(t *testing.T) {
			c := dial(t, serve(t, testKey("server"), http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				conn, _, _ := w.(http.Hijacker).Hijack()
				_, _ = io.WriteString(conn, tt.answer)
				_ = conn.Close()
			})))
			if _, err := c.Stream(t.Context(), ""); err == nil || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("error %v, want %q", err, tt.text)
			}
		})
	}
}

// pipe gives both ends of a stream in memory, for a synctest bubble.
func pipe(t *testing.T) (*Stream, *tls.Conn) {
	t.Helper()
	near, far := net.Pipe()
	d := Dialer{Device: testKey("anna")}
	cert, err := deviceCertificate(d.Device)
	if err != nil {
		t.Fatal(err)
	}
	server := tls.Server(far, testTLS(t, testKey("server")))
	accepted := make(chan error, 1)
	go func() {
		if err := server.Handshake(); err != nil {
			accepted <- err
			return
		}
		if _, err := http.ReadRequest(bufio.NewReader(server)); err != nil {
			accepted <- err
			return
		}
		_, err := io.WriteString(server, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: overlay\r\n\r\n")
		accepted <- err
	}()
	client := tls.Client(near, d.config(target{server: "server:443", host: "server", cert: cert}))
	if err := client.Handshake(); err != nil {
		t.Fatal(err)
	}
	s, err := newConn(client, "server:443").Stream(t.Context(), "")
	if err := errors.Join(err, <-accepted); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = s.Close()
		_ = far.Close()
	})
	return s, server
}

func TestSilentStreamEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, server := pipe(t)
		go func() {
			time.Sleep(2 * PingInterval)
			_ = WriteFrame(server, []byte(`{"welcome":{"session":"AQ==","stun":[]}}`))
		}()
		if _, err := s.Next(); err != nil {
			t.Fatalf("an event after two intervals: %v", err)
		}
		start := time.Now()
		if _, err := s.Next(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("error %v", err)
		}
		if took := time.Since(start); took != 3*PingInterval {
			t.Errorf("silence was borne for %s", took)
		}
	})
}

// A whole netmap over a slow line takes longer than the silence that is borne.
func TestSlowEventArrives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, server := pipe(t)
		var b bytes.Buffer
		if err := WriteFrame(&b, []byte(`{"netmap":{}}`)); err != nil {
			t.Fatal(err)
		}
		go func() {
			for _, c := range b.Bytes() {
				time.Sleep(PingInterval)
				_, _ = server.Write([]byte{c})
			}
		}()
		if e, err := s.Next(); err != nil || e.Netmap == nil {
			t.Errorf("event %v, error %v", e, err)
		}
	})
}

func TestBlockedReportEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := pipe(t) // whose other end does not read
		const writers = 10
		took := make(chan time.Duration, writers)
		start := time.Now()
		for range writers {
			go func() {
				if err := s.Signal(Signal{Data: []byte("x")}); err == nil {
					t.Error("a blocked write succeeded")
				}
				took <- time.Since(start)
			}()
		}
		for range writers {
			if d := <-took; d != writeTimeout {
				t.Errorf("a report blocked for %s, want %s", d, writeTimeout)
			}
		}
	})
}
