package direct

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"io"
	"net"
	"sync"
	"time"
)

// shakeFor is how long a connection may take to prove whose it is.
const shakeFor = 3 * time.Second

// Handshake of a connection, each message an HMAC-SHA256 of its name under the
// key of the two attempts. The side with the lower key leads. The other one is
// silent until it has seen a right proof, and there may be several connections:
//
//	leading side                other side
//	  "lead"    ------------->
//	            <-------------    "follow"
//	  "take"    ------------->               on the one that is used
const (
	proofLead   = "lead"
	proofFollow = "follow"
	proofTake   = "take"
)

// shaking finds the one connection that both sides use.
type shaking struct {
	proof []byte
	leads bool
	won   chan net.Conn // of capacity 1

	mu    sync.Mutex
	taken bool
}

func (s *shaking) mac(name string) []byte {
	m := hmac.New(sha256.New, s.proof)
	m.Write([]byte(name))
	return m.Sum(nil)
}

// shake proves and checks who is at both ends. A connection that is not the one
// is closed without a word.
func (s *shaking) shake(ctx context.Context, conn net.Conn) {
	// What reads or writes ends with ctx; a connection that has won lives on.
	_ = conn.SetDeadline(time.Now().Add(shakeFor))
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	won := s.talk(conn)
	if !stop() || !won {
		_ = conn.Close()
		return
	}
	_ = conn.SetDeadline(time.Time{})
	s.won <- conn
}

func (s *shaking) talk(conn net.Conn) (won bool) {
	if s.leads {
		return s.say(conn, proofLead) && s.hear(conn, proofFollow) && s.take() && s.say(conn, proofTake)
	}
	return s.hear(conn, proofLead) && s.say(conn, proofFollow) && s.hear(conn, proofTake) && s.take()
}

// take makes the connection the one, unless there is one.
func (s *shaking) take() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.taken {
		return false
	}
	s.taken = true
	return true
}

func (s *shaking) say(conn net.Conn, name string) bool {
	_, err := conn.Write(s.mac(name))
	return err == nil
}

func (s *shaking) hear(conn net.Conn, name string) bool {
	var got [sha256.Size]byte
	if _, err := io.ReadFull(conn, got[:]); err != nil {
		return false
	}
	return hmac.Equal(got[:], s.mac(name))
}
