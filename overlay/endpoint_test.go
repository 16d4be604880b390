package overlay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"overlay/punch"
	"overlay/tun"
)

// fakeEndpoints notes in which order a device is told what.
type fakeEndpoints struct {
	mu   sync.Mutex
	done []string
	err  error // of writes
	gone bool  // the peer is no member
}

func (f *fakeEndpoints) note(format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.done = append(f.done, fmt.Sprintf(format, args...))
}

func (f *fakeEndpoints) take() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	done := f.done
	f.done = nil
	return done
}

// become changes how the device answers from now on.
func (f *fakeEndpoints) become(err error, gone bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err, f.gone = err, gone
}

func (f *fakeEndpoints) fails() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

func (f *fakeEndpoints) member(punch.Key) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return !f.gone
}

func (f *fakeEndpoints) SetEndpoint(_ tun.Key, to, from netip.AddrPort) error {
	if from.Port() != 0 {
		f.note("endpoint %s over %s", to, from)
	} else {
		f.note("endpoint %s", to)
	}
	return f.fails()
}

func (f *fakeEndpoints) ClearEndpoint(tun.Key) error             { f.note("clear"); return f.fails() }
func (f *fakeEndpoints) SetRoundTrip(_ tun.Key, d time.Duration) {}
func (f *fakeEndpoints) StartHandshake(tun.Key)                  { f.note("handshake") }

func (f *fakeEndpoints) SetPathMTU(_ tun.Key, to netip.AddrPort, size int) {
	if size > 0 {
		f.note("size %s %d", to, size)
	}
}

func (f *fakeEndpoints) SetCopy(_ tun.Key, to, from netip.AddrPort) {
	if from.Port() != 0 {
		f.note("copy %s over %s", to, from)
	} else {
		f.note("copy %s", to)
	}
}

func startEndpoints(t *testing.T, f *fakeEndpoints, log *slog.Logger) (e *endpoints, end func()) {
	e = newEndpoints(f, func(netip.AddrPort) string { return "relay berlin (udp)" }, f.member, log)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- e.run(ctx) }()
	return e, func() { cancel(); <-done }
}

// A handshake that is not completed is repeated, each time later: an answer that
// takes longer than a wait is void.
func TestHandshakeRepeats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var f fakeEndpoints
		e, end := startEndpoints(t, &f, slog.New(slog.DiscardHandler))
		defer end()
		e.set(punch.Path{Addr: netip.MustParseAddrPort("192.0.2.9:5"), Type: punch.Host})
		synctest.Wait()
		f.take()
		for i, wait := range []time.Duration{99, 149, 224, 337, 505, 759, 1138} {
			time.Sleep(wait * time.Millisecond)
			synctest.Wait()
			if n := len(f.take()); n != 0 {
				t.Errorf("%d: repeated %d times too early", i, n)
			}
			time.Sleep(time.Millisecond)
			synctest.Wait()
			if n := len(f.take()); n != 1 {
				t.Errorf("%d: repeated %d times in time", i, n)
			}
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := len(f.take()); n != 0 {
			t.Errorf("repeated %d times more", n)
		}
	})
}

func TestMovesBetweenRelayAndDirect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var f fakeEndpoints
		var text strings.Builder
		e, end := startEndpoints(t, &f, slog.New(slog.NewTextHandler(&text, nil)))
		addr := netip.MustParseAddrPort
		relayed, direct := addr("[fd00::2]:32769"), addr("192.0.2.9:5")
		for i, step := range []struct {
			path punch.Path
			want []string
			log  string
		}{
			{punch.Path{Addr: relayed, Type: punch.Relayed}, []string{"endpoint " + relayed.String(), "handshake"}, `via="relay berlin (udp)" was=none reason="first path"`},
			{
				punch.Path{Addr: direct, Type: punch.Host, Also: relayed},
				[]string{"copy " + relayed.String(), "endpoint " + direct.String(), "handshake"},
				`via="direct host" was="relay berlin (udp)" reason="a direct path answered"`,
			},
			{punch.Path{Addr: direct, Type: punch.Host}, []string{"copy invalid AddrPort", "endpoint " + direct.String()}, ""},
			{
				punch.Path{Addr: relayed, Type: punch.Relayed, Also: direct},
				[]string{"copy " + direct.String(), "endpoint " + relayed.String(), "handshake"},
				`reason="the direct path does not answer"`,
			},
			{
				punch.Path{Addr: relayed, Type: punch.Relayed, Also: direct, AlsoLocal: addr("192.168.1.2:7")},
				[]string{"copy " + direct.String() + " over 192.168.1.2:7", "endpoint " + relayed.String()},
				"",
			},
			{punch.Path{}, []string{"copy invalid AddrPort", "clear"}, `msg="path lost"`},
		} {
			text.Reset()
			e.set(step.path)
			synctest.Wait()
			if got := f.take(); !slices.Equal(got, step.want) {
				t.Fatalf("step %d: %q, want %q", i, got, step.want)
			}
			if got := text.String(); (step.log == "") != (got == "") || !strings.Contains(got, step.log) || strings.Contains(got, "192.0.2") {
				t.Fatalf("step %d logs %q, want %q", i, got, step.log)
			}
			time.Sleep(time.Minute) // the handshakes' repeats
			f.take()
		}
		end()
	})
}

// The same address over another socket of ours is another path.
func TestMovesBetweenSockets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var f fakeEndpoints
		e, end := startEndpoints(t, &f, slog.New(slog.DiscardHandler))
		defer end()
		direct := punch.Path{Addr: netip.MustParseAddrPort("192.0.2.9:5"), Type: punch.PeerReflexive}
		for local, want := range map[string][]string{
			"10.0.0.1:0":     {"endpoint 192.0.2.9:5"},
			"10.0.0.1:40000": {"endpoint 192.0.2.9:5 over 10.0.0.1:40000", "handshake"},
		} {
			e.set(direct)
			synctest.Wait()
			time.Sleep(time.Minute) // the handshakes' repeats
			synctest.Wait()
			f.take()
			moved := direct
			moved.Local = netip.MustParseAddrPort(local)
			e.set(moved)
			synctest.Wait()
			if got := f.take(); !slices.Equal(got, want) {
				t.Errorf("%s: did %q, want %q", local, got, want)
			}
		}
	})
}

// Handshakes sent to a relay before the peer came there are lost: one is due
// when it does.
func TestHandshakeWhenAPeerComesToARelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var f fakeEndpoints
		e, end := startEndpoints(t, &f, slog.New(slog.DiscardHandler))
		defer end()
		relayed := punch.Path{Addr: netip.MustParseAddrPort("[fd00::2]:32769"), Type: punch.Relayed}
		e.renew(relayed.Peer) // no path: nothing
		e.set(relayed)
		time.Sleep(time.Minute)
		synctest.Wait()
		f.take()
		e.renew(relayed.Peer)
		synctest.Wait()
		if got := f.take(); !slices.Equal(got, []string{"handshake"}) {
			t.Fatalf("did %q", got)
		}
	})
}

// A path that the device refused is written again, and copies are ended although
// the path that began them never was one.
func TestRefusedEndpointIsWrittenAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := fakeEndpoints{err: errors.New("no")}
		var text strings.Builder
		e, end := startEndpoints(t, &f, slog.New(slog.NewTextHandler(&text, nil)))
		defer end()
		addr := netip.MustParseAddrPort
		relayed, direct := addr("[fd00::2]:32769"), addr("192.0.2.9:5")
		did := func(want ...string) {
			t.Helper()
			synctest.Wait()
			if got := f.take(); !slices.Equal(got, want) {
				t.Fatalf("did %q, want %q", got, want)
			}
		}
		e.set(punch.Path{Addr: direct, Type: punch.Host, Also: relayed})
		did("copy "+relayed.String(), "endpoint "+direct.String())
		time.Sleep(firstRewrite)
		did("endpoint " + direct.String())
		time.Sleep(firstRewrite)
		did()
		time.Sleep(firstRewrite)
		did("endpoint " + direct.String())
		time.Sleep(time.Minute)
		if n := len(f.take()); n < 10 || n > 20 {
			t.Fatalf("%d attempts in a minute", n)
		}
		if n := strings.Count(text.String(), "endpoint not written"); n != 1 {
			t.Fatalf("told %d times", n)
		}
		e.set(punch.Path{Addr: relayed, Type: punch.Relayed})
		did("copy invalid AddrPort", "endpoint "+relayed.String())
		f.become(nil, false)
		time.Sleep(firstRewrite)
		did("endpoint "+relayed.String(), "handshake")
		time.Sleep(time.Minute)
		if slices.Contains(f.take(), "endpoint "+relayed.String()) {
			t.Fatal("written again although it was")
		}
		f.become(errors.New("no"), false)
		e.set(punch.Path{})
		did("clear")
		f.become(errors.New("no"), true)
		time.Sleep(time.Minute)
		did()
	})
}
