package relay

import (
	"context"
	"crypto/ecdh"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"overlay/punch"
)

// Identity is who holds credentials.
type Identity struct {
	Device    [32]byte  // Ed25519 public key
	WireGuard punch.Key // X25519 public key
}

// Defaults of ServerConfig, in bytes a second.
const (
	defaultFlowRate = 1_250_000_000
	defaultNodeRate = 2_500_000_000
)

// ServerConfig configures a Server. PrivateKey and Verify are required.
type ServerConfig struct {
	// PrivateKey is the relay's X25519 key.
	PrivateKey [32]byte
	// Verify says whose credentials are; an error refuses them. It is called
	// without locks, from several goroutines, and may take a millisecond. Its
	// answer is kept for some minutes, or until Retain.
	Verify func(credentials []byte) (Identity, error)
	// Answer answers a datagram that is neither flow nor control and came to our
	// address and port at, the address zero where it is not known; nil is silence.
	// It is called from the loop that forwards, so it must be quick, and must not
	// keep b. A nil Answer drops such datagrams.
	Answer func(b []byte, from, at netip.AddrPort) []byte
	// FlowRate and NodeRate bound what one node sends into one flow and in all,
	// in bytes a second; 0 means 1.25e9 and 2.5e9. TotalRate bounds what all of them
	// send together, of which those have the most who send no more than their share;
	// 0 is no bound.
	FlowRate, NodeRate, TotalRate uint64
	// MaxNodes and MaxFlows are how many nodes are admitted and how many flows are
	// open at a time; 0 means 16,384 and 131,072, which is also the most.
	MaxNodes, MaxFlows int
	// Refuse says of an address that no node is there: nothing is answered. It is
	// called as Answer is; nil refuses none.
	Refuse func(netip.Addr) bool
	// Log gets what an operator may want to know; nil is silence.
	Log *slog.Logger
}

// Server forwards datagrams between the nodes it admitted. It is safe for
// concurrent use.
type Server struct {
	cfg     ServerConfig
	log     *slog.Logger
	private *ecdh.PrivateKey
	public  [32]byte
	now     func() time.Time
	start   time.Time

	flowRate, nodeRate, controlRate, challengeRate, moveRate, refusalRate, answerRate rate
	totalRate                                                                         *rate // nil: no bound
	total                                                                             meter
	fair                                                                              atomic.Pointer[rate] // of totalRate, for each node with flows; nil: no bound, or never a flow

	cookies    cookies
	challenges *buckets
	challenged meter
	admissions *buckets
	refusals   meter // told in the log
	verified   verified
	count      counters
	trains     trains
	lender     blocks // of connections

	mu        sync.RWMutex
	sessions  map[sessionID]*node
	nodes     map[punch.Key]*node
	flows     map[uint64]*flow
	retention uint64 // calls of Retain
	present   int    // nodes that are not gone
	busy      int    // nodes with flows
}

// NewServer makes a server that serves nobody yet.
func NewServer(cfg ServerConfig) (*Server, error) { return newServer(cfg, time.Now) }

func newServer(cfg ServerConfig, now func() time.Time) (*Server, error) {
	if cfg.Verify == nil {
		return nil, errors.New("relay: no Verify")
	}
	private, err := ecdh.X25519().NewPrivateKey(cfg.PrivateKey[:])
	if err != nil {
		return nil, fmt.Errorf("read relay key: %w", err)
	}
	s := &Server{
		cfg: cfg.bounded(), log: cfg.Log, private: private, public: [32]byte(private.PublicKey().Bytes()),
		now: now, start: now(),
		flowRate:      newRate(orDefault(cfg.FlowRate, defaultFlowRate)),
		nodeRate:      newRate(orDefault(cfg.NodeRate, defaultNodeRate)),
		controlRate:   newLimit(controlsPerNode, controlBurst),
		challengeRate: newLimit(challengesTotal, challengeTotalBurst),
		moveRate:      newLimit(movesPerNode, moveBurst),
		refusalRate:   newLimit(refusalsTold, refusalsTold),
		answerRate:    newLimit(answersPerNode, answerBurst),
		cookies:       newCookies(),
		challenges:    newBuckets(challengesPerSource, challengeBurst),
		admissions:    newBuckets(admissionsPerSource, admissionBurst),
		verified:      verified{entries: map[[32]byte]verdict{}},
		sessions:      map[sessionID]*node{},
		nodes:         map[punch.Key]*node{},
		flows:         map[uint64]*flow{},
	}
	if cfg.TotalRate > 0 {
		r := newRate(cfg.TotalRate)
		s.totalRate = &r
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	return s, nil
}

// bounded gives the configuration with bounds on what the tables hold.
func (c ServerConfig) bounded() ServerConfig {
	if c.MaxNodes <= 0 || c.MaxNodes > maxNodes {
		c.MaxNodes = maxNodes
	}
	if c.MaxFlows <= 0 || c.MaxFlows > maxFlows {
		c.MaxFlows = maxFlows
	}
	return c
}

func orDefault(n, otherwise uint64) uint64 {
	if n == 0 {
		return otherwise
	}
	return n
}

// clock is the time since the server was made, in ns.
func (s *Server) clock() int64 { return int64(s.now().Sub(s.start)) }

// PublicKey is the X25519 key by which nodes know the relay.
func (s *Server) PublicKey() [32]byte { return s.public }

// Run forgets nodes and flows that are not used any more, until ctx ends. It
// returns nil.
func (s *Server) Run(ctx context.Context) error {
	tick := time.NewTicker(expireEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			s.expire()
		}
	}
}

// Session gives the MAC key of the node with a session, so that a Binding
// request (RFC 8489 section 9.1) can name it, and whose node that is. ok is false
// when no such node is here.
func (s *Server) Session(user []byte) (key []byte, device [32]byte, ok bool) {
	if len(user) != len(sessionID{}) {
		return nil, device, false
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	n := s.sessions[sessionID(user)]
	if n == nil || n.gone {
		return nil, device, false
	}
	return slices.Clone(n.session.mac[:]), n.device, true
}

// Spend counts an answer to a Binding request of the node with a session, which is
// to be one with the right MAC. It says false when the node got enough of them: it
// could name a stranger's address.
func (s *Server) Spend(user []byte) bool {
	if len(user) != len(sessionID{}) {
		return false
	}
	n := s.bySession(sessionID(user))
	return n != nil && n.told.take(&s.answerRate, s.clock(), 1)
}

// Stats is what a server holds and did since it was made.
type Stats struct {
	Nodes     int    // admitted
	Streams   int    // of them over TLS
	Flows     int    // open
	Datagrams uint64 // forwarded
	Bytes     uint64 // forwarded, headers included
	Drops     Drops
}

// Drops counts datagrams that were not forwarded or answered, by cause.
type Drops struct {
	Flow      uint64 // of no open flow
	Source    uint64 // of a flow, not from one of its nodes
	Offline   uint64 // the other node cannot be reached now
	Rate      uint64 // more than the limits of a flow or a node
	Full      uint64 // the socket or the system had no room
	Oversize  uint64 // longer than a frame, or than the way can carry
	Unsent    uint64 // refused by the system for another reason
	Malformed uint64 // nobody's, or damaged
	Forged    uint64 // control with a wrong MAC, signature or session
	Replayed  uint64 // control with an old sequence number
	Limited   uint64 // control beyond the limits of a network or node
}

type counters struct {
	datagrams, bytes atomic.Uint64

	flow, source, offline, rate, full, oversize, unsent atomic.Uint64
	malformed, forged, replayed, limited                atomic.Uint64
}

// Stats takes a look at the tables and counters.
func (s *Server) Stats() Stats {
	c := &s.count
	st := Stats{
		Datagrams: c.datagrams.Load(), Bytes: c.bytes.Load(),
		Drops: Drops{
			Flow: c.flow.Load(), Source: c.source.Load(), Offline: c.offline.Load(), Rate: c.rate.Load(),
			Full: c.full.Load(), Oversize: c.oversize.Load(), Unsent: c.unsent.Load(), Malformed: c.malformed.Load(),
			Forged: c.forged.Load(), Replayed: c.replayed.Load(), Limited: c.limited.Load(),
		},
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	st.Flows = len(s.flows)
	for _, n := range s.nodes {
		if n.gone {
			continue
		}
		st.Nodes++
		if t := n.active.Load(); t != nil && t.conn != nil {
			st.Streams++
		}
	}
	return st
}
