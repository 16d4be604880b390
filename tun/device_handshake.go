package tun

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/device"
)

const (
	// startInterval is the shortest time between two initiations to a peer.
	// The other side takes a second one within 50 ms for a flood, and one within
	// 17 ms, the grain of its timestamp, for a replay; while this side no longer
	// takes the answer to the first. Then nothing flows for 5 s.
	startInterval = 50 * time.Millisecond
	// yieldTime is how long the side that should not initiate leaves it to the
	// other. Starting anew while the other's handshake is under way would spoil
	// that: it takes 1.5 round trips until this side can tell.
	yieldTime = 300 * time.Millisecond
	// sessionsAge bounds how old the list of sessions may be that StartHandshake
	// looks at: wireguard-go tells of all peers or of none.
	sessionsAge = 20 * time.Millisecond
	// restartInterval is the shortest time from the last handshake, or start of
	// one, to a restart.
	restartInterval = time.Second
)

// handshakes remembers when handshakes began and when they were last completed.
// The zero value is ready.
type handshakes struct {
	mu       sync.Mutex
	peers    map[Key]*handshake
	sessions map[Key]time.Time // when the handshake was completed
	read     time.Time         // when sessions was read
}

// A handshake is what is known of the attempts with one peer.
type handshake struct {
	started time.Time
	to      netip.AddrPort // endpoint; zero: a handle
	port    uint16         // of the spare socket; 0: a main one
	moved   time.Time      // when those were set
	waiting bool           // a start is put off
	waited  bool           // it was, long enough
	dead    time.Time      // when the session was completed that counts no more
}

// of returns the handshake of k; call it with mu held.
func (h *handshakes) of(k Key) *handshake {
	if h.peers == nil {
		h.peers = make(map[Key]*handshake)
	}
	if h.peers[k] == nil {
		h.peers[k] = new(handshake)
	}
	return h.peers[k]
}

// forget drops what is known of a removed peer.
func (h *handshakes) forget(k Key) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.peers, k)
	delete(h.sessions, k)
}

// move notes an endpoint before it is written; writing can send an initiation.
func (h *handshakes) move(k Key, to netip.AddrPort, port uint16) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if one := h.of(k); one.to != to || one.port != port {
		one.to, one.port, one.moved = to, port, time.Now()
	}
}

// due tells whether a handshake with k should start: at once (0), later, or not
// (negative). sent is when wireguard-go last sent something on a path, which is
// an initiation as long as there is no session. What began less than
// startInterval ago on the present path is not disturbed; when it went another
// way, the start is put off; so is the start by the side that should not
// initiate. list reads the times of all sessions.
func (h *handshakes) due(k Key, sent time.Time, initiate bool, list func() map[Key]time.Time) time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	now, one := time.Now(), h.of(k)
	if !h.alive(k, now) && now.Sub(h.read) >= sessionsAge {
		h.read, h.sessions = now, list()
	}
	if one.started.After(sent) {
		sent = one.started
	}
	wait := startInterval - now.Sub(sent)
	switch {
	case h.alive(k, now):
		one.waited = false
		return -1
	case one.waiting:
		return -1
	case !initiate && !one.waited:
		wait = yieldTime
	case wait <= 0:
		one.started, one.waited = now, false
		return 0
	case !one.moved.After(sent):
		return -1
	}
	one.waiting = true
	return wait
}

// putOff has a start that was due wait.
func (h *handshakes) putOff(k Key, wait time.Duration) time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	if wait > 0 {
		one := h.of(k)
		one.started, one.waiting = time.Time{}, true
	}
	return wait
}

// restart tells whether a session that the peer has lost should make room for
// another: not when a handshake began or was completed just now.
func (h *handshakes) restart(k Key, list func() map[Key]time.Time) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	now, one := time.Now(), h.of(k)
	if now.Sub(one.started) < restartInterval {
		return false
	}
	h.read, h.sessions = now, list()
	if age := now.Sub(h.sessions[k]); age >= 0 && age < restartInterval {
		return false
	}
	one.started, one.dead = now, h.sessions[k]
	return true
}

// resume ends the wait for a start that was put off.
func (h *handshakes) resume(k Key) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if one := h.peers[k]; one != nil {
		one.waiting, one.waited = false, true
	}
}

// alive tells whether the session's keys are still good; those from the future
// were made before the clock was set back, and those of a dead one are not used.
func (h *handshakes) alive(k Key, now time.Time) bool {
	at := h.sessions[k]
	if one := h.peers[k]; one != nil && at.Equal(one.dead) {
		return false
	}
	age := now.Sub(at)
	return age >= 0 && age < device.RejectAfterTime
}

// StartHandshake sends a handshake initiation to the peer now, unless there is a
// session with it, the peer begins one, or an initiation took the present path in
// the last 50 ms. The side that does not initiate (Peer.Initiate) leaves it to the
// other for 300 ms.
//
// wireguard-go itself would wait for 5 s after an initiation that was lost, or
// whose answer was because the other side had no path yet: until there is a
// session, call it again after each round trip; sooner, and the answer still
// under way becomes void. Unknown peers are ignored.
func (d *Device) StartHandshake(k Key) {
	p, shared := d.wg.LookupPeer(device.NoisePublicKey(k)), d.peers.byKey(k)
	if p == nil || shared == nil {
		return
	}
	if d.answering(shared, yieldTime) {
		return
	}
	var sent time.Time
	if last := shared.lastSent.Load(); last != 0 {
		sent = time.Now().Add(time.Duration(last - d.bind.now()))
	}
	wait := d.starts.due(k, sent, shared.initiate.Load(), d.sessions)
	if wait == 0 {
		wait = d.starts.putOff(k, d.bind.begins(shared))
	}
	switch {
	case wait < 0:
		return
	case wait > 0:
		time.AfterFunc(wait, func() { d.starts.resume(k); d.StartHandshake(k) })
		return
	}
	p.ExpireCurrentKeypairs() // also forgets when the last initiation left
	if err := p.SendHandshakeInitiation(false); err != nil {
		d.log.Debug("cannot start a handshake", "err", cause(err))
	}
}

// answering tells whether a handshake of the peer was answered within a time. As
// long as the peer has not confirmed that, no session tells of it, and expiring the
// keys would make it void.
func (d *Device) answering(p *peer, within time.Duration) bool {
	at := p.answered.Load()
	return at != 0 && d.bind.now()-at < int64(within)
}

// RestartSession begins a new session with a peer that says, authenticated, that
// it has lost the one there is. It does nothing when a handshake began, was
// answered or was completed in the last second. Unknown peers are ignored. It
// does not wait, and may be called from Config.Receive.
func (d *Device) RestartSession(k Key) {
	time.AfterFunc(0, func() { d.restart(k) }) // reading sessions would deadlock there
}

func (d *Device) restart(k Key) {
	p, shared := d.wg.LookupPeer(device.NoisePublicKey(k)), d.peers.byKey(k)
	if p == nil || shared == nil {
		return
	}
	if d.answering(shared, restartInterval) || !d.starts.restart(k, d.sessions) {
		return
	}
	p.ExpireCurrentKeypairs() // also forgets when the last initiation left
	if err := p.SendHandshakeInitiation(false); err != nil {
		d.log.Debug("cannot restart a session", "err", cause(err))
	}
}

// sessions reads from wireguard-go when each handshake was completed.
func (d *Device) sessions() map[Key]time.Time {
	var b bytes.Buffer
	if err := d.wg.IpcGetOperation(&b); err != nil {
		d.log.Debug("cannot read sessions", "err", cause(err))
	}
	return parseSessions(&b)
}

// parseSessions reads the answer of the UAPI's get operation, in which each
// peer begins with its public key. A time of 0 means no handshake yet.
func parseSessions(b *bytes.Buffer) map[Key]time.Time {
	list := make(map[Key]time.Time)
	var k Key
	var sec int64
	for s := bufio.NewScanner(b); s.Scan(); {
		name, value, _ := strings.Cut(s.Text(), "=")
		switch name {
		case "public_key":
			if n, err := hex.Decode(k[:], []byte(value)); err != nil || n != len(k) {
				return list
			}
		case "last_handshake_time_sec":
			sec, _ = strconv.ParseInt(value, 10, 64) // 0: never, or not a number
		case "last_handshake_time_nsec":
			if nsec, err := strconv.ParseInt(value, 10, 64); err == nil && sec > 0 {
				list[k] = time.Unix(sec, nsec)
			}
		}
	}
	return list
}
