package tun

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/device"
)

const (
	// startInterval is the shortest time between two handshakes started for a
	// peer.
	startInterval = 50 * time.Millisecond
	// sessionsAge bounds how old the list of sessions may be that StartHandshake
	// looks at: wireguard-go tells of all peers or of none.
	sessionsAge = 20 * time.Millisecond
)

// handshakes remembers when handshakes began and when they were last completed.
// The zero value is ready.
type handshakes struct {
	mu       sync.Mutex
	started  map[Key]time.Time
	sessions map[Key]time.Time // when the handshake was completed
	read     time.Time         // when sessions was read
}

// forget drops what is known of a removed peer.
func (h *handshakes) forget(k Key) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.started, k)
	delete(h.sessions, k)
}

// due tells whether a handshake with k should start now, and takes it as
// started. list reads the times of all sessions.
func (h *handshakes) due(k Key, list func() map[Key]time.Time) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	if now.Sub(h.started[k]) < startInterval || h.alive(k, now) {
		return false
	}
	if now.Sub(h.read) >= sessionsAge {
		h.read, h.sessions = now, list()
		if h.alive(k, now) {
			return false
		}
	}
	if h.started == nil {
		h.started = make(map[Key]time.Time)
	}
	h.started[k] = now
	return true
}

// alive tells whether the session's keys are still good; those from the future
// were made before the clock was set back.
func (h *handshakes) alive(k Key, now time.Time) bool {
	age := now.Sub(h.sessions[k])
	return age >= 0 && age < device.RejectAfterTime
}

// StartHandshake sends a handshake initiation to the peer now, unless there is a
// session with it or one was sent in the last 50 ms. wireguard-go itself would
// wait for 5 s after an initiation that was lost. Unknown peers are ignored.
func (d *Device) StartHandshake(k Key) {
	p := d.wg.LookupPeer(device.NoisePublicKey(k))
	if p == nil || !d.starts.due(k, d.sessions) {
		return
	}
	p.ExpireCurrentKeypairs() // also forgets when the last initiation left
	if err := p.SendHandshakeInitiation(false); err != nil {
		d.log.Debug("cannot start a handshake", "err", cause(err))
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
	for s := bufio.NewScanner(b); s.Scan(); {
		name, value, _ := strings.Cut(s.Text(), "=")
		switch name {
		case "public_key":
			if n, err := hex.Decode(k[:], []byte(value)); err != nil || n != len(k) {
				return list
			}
		case "last_handshake_time_sec":
			if sec, err := strconv.ParseInt(value, 10, 64); err == nil && sec > 0 {
				list[k] = time.Unix(sec, 0)
			}
		}
	}
	return list
}
