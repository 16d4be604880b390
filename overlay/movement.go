package overlay

import (
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"overlay/punch"
	"overlay/tun"
)

const (
	// wakeTick is how often the clock is looked at, and wakeLate how late a look
	// has to come for the machine, or this process, to have slept.
	wakeTick = time.Second
	wakeLate = 5 * time.Second
	// reopenMost is the longest time between two attempts to open the sockets that
	// could not be opened after a sleep; it doubles from wakeTick.
	reopenMost = time.Minute
)

// movement has one change of the machine's place told at a time.
type movement struct{ mu sync.Mutex }

// follow tells of everything after which the paths of this machine are others.
func (s *session) follow(ctx context.Context) error {
	return tun.Watch(ctx, func(routes bool) {
		if err := s.linkChanged(routes); err != nil {
			s.log.Warn("local addresses not read", "err", err)
		}
	})
}

// linkChanged looks at the machine's addresses again; routes says that paths may
// have moved although the addresses are the same.
func (s *session) linkChanged(routes bool) error {
	s.moves.mu.Lock()
	defer s.moves.mu.Unlock()
	if err := s.moved(routes); err != nil {
		return err
	}
	s.control.networkChanged()
	return nil
}

// moved tells the agent and the links of relays. A change of the addresses is one
// for the agent anyway.
func (s *session) moved(routes bool) error {
	addrs, err := tun.HostAddrs()
	if err != nil {
		err = fmt.Errorf("list local addresses: %w", err)
	} else {
		s.mu.Lock()
		s.local = addrs
		s.mu.Unlock()
	}
	told := err == nil && s.agent.SetLocal(addrs, s.dev.Load().Port())
	if routes && !told {
		s.agent.NetworkChanged()
	}
	s.links.networkChanged()
	if all, err := net.InterfaceAddrs(); err == nil { // also those of other VPNs
		s.tcp.localChanged(all)
	}
	s.lan.networkChanged()
	s.lookAtRouters()
	return err
}

// woke is what follows a sleep: nothing that was open needs to be so still, and
// nobody says so. Sockets and the connection to the server are made anew,
// sessions too, and all paths are looked for as after a change of the network. The
// error is that the sockets could not be opened.
func (s *session) woke(slept time.Duration) error {
	s.log.Info("woke up", "after", slept.Round(time.Second))
	s.moves.mu.Lock()
	defer s.moves.mu.Unlock()
	s.control.reconnect()
	return s.reopen()
}

// reopened tries again what failed in woke.
func (s *session) reopened() error {
	s.moves.mu.Lock()
	defer s.moves.mu.Unlock()
	return s.reopen()
}

// reopen makes the sockets anew, and has paths looked for through them.
func (s *session) reopen() error {
	dev := s.dev.Load()
	err := dev.Rebind()
	if err != nil {
		s.log.Warn("sockets not opened again", "err", err)
	}
	if err := s.moved(true); err != nil {
		s.log.Warn("local addresses not read", "err", err)
	}
	s.checkMapping()
	dev.ExpireSessions()
	s.endpoints.resume()
	return err
}

// remapped is what follows when a router maps us to another address than it did.
// It may have lost all else it knew of us, so relays are asked at once.
func (s *session) remapped() {
	s.log.Info("the router gave this machine another address or port")
	s.links.networkChanged()
}

// sleepWatch notices that the machine slept, and has things mended then.
type sleepWatch struct {
	now func() time.Duration // goes on while the machine sleeps
	// woke is called after a sleep. When it fails, again is called until it succeeds.
	woke  func(slept time.Duration) error
	again func() error
}

// run looks at the clock every second until ctx ends, and calls woke with the time
// since the last look when that was more than 5 s late. Timers stand still while
// the machine sleeps, and so they do while a process is stopped.
func (w sleepWatch) run(ctx context.Context) error {
	tick := time.NewTicker(wakeTick)
	defer tick.Stop()
	last := w.now()
	var wait, due time.Duration // until again is called; 0: it need not be
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		now, began := w.now(), time.Now()
		slept := now - last
		last = now
		var err error
		switch {
		case slept > wakeTick+wakeLate:
			wait, err = 0, w.woke(slept)
		case wait == 0 || now < due:
			continue
		default:
			err = w.again()
		}
		last += time.Since(began) // mending takes time, which is not sleep
		if err == nil {
			wait = 0
			continue
		}
		wait = min(max(2*wait, wakeTick), reopenMost)
		due = now + wait
	}
}

// resume has handshakes started with all peers that have a path, because all
// sessions ended.
func (e *endpoints) resume() {
	e.mu.Lock()
	e.resumed = true
	e.mu.Unlock()
	e.poke()
}

// afresh gives all paths when all sessions ended.
func (e *endpoints) afresh() []punch.Path {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.resumed {
		return nil
	}
	e.resumed = false
	return slices.Collect(maps.Values(e.current))
}
