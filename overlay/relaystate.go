package overlay

import (
	"time"

	"overlay/coord/trust"
	"overlay/punch"
	"overlay/punch/relay"
)

// onState takes what a client says of its link.
func (l *links) onState(k *relayLink, st relay.State) {
	now := time.Now()
	l.mu.Lock()
	old := k.state
	k.state = st
	if st.Transport != old.Transport {
		k.began = now
	}
	if old.Transport == relay.UDP && st.Transport != relay.UDP {
		k.mute = now
	}
	if st.Transport == relay.UDP && st.Addr != k.stun {
		k.stun = st.Addr
		l.collectAddrs()
	}
	if k.up() && st.RTT > 0 {
		l.trips[k.info.key] = st.RTT
	}
	moved := l.judge(k, now)
	name, peer := k.info.name, k.info.peer
	l.mu.Unlock()
	if !peer && mappedAnew(old, st) && l.cfg.mapped != nil { // a node's word alone is not enough
		l.cfg.mapped()
	}
	if st.Transport != old.Transport {
		l.logState(name, old, st)
	}
	if moved != "" {
		l.cfg.log.Info("home relay", "relay", moved)
	}
	l.poke()
	l.cfg.changed()
}

// mappedAnew reports whether the address of ours that a relay sees is another one.
// Asked at another address of its own it may see another one anyway.
func mappedAnew(old, now relay.State) bool {
	return old.Observed.IsValid() && now.Transport == relay.UDP && old.Addr == now.Addr && old.Observed != now.Observed
}

func (l *links) logState(name string, old, st relay.State) {
	if st.Transport == relay.None {
		l.cfg.log.Info("relay lost", "relay", name, "was", old.Transport)
		l.cfg.log.Debug("relay lost", "relay", name, "err", st.Err)
		return
	}
	l.cfg.log.Info("relay", "relay", name, "over", st.Transport, "rtt", st.RTT)
	if st.Err != nil {
		l.cfg.log.Debug("relay not over udp", "relay", name, "err", st.Err)
	}
}

// judge compares the home with a relay, and names the new one if it moved; mu is
// held.
func (l *links) judge(k *relayLink, now time.Time) (moved string) {
	k.judged = now
	if k.info.peer || !l.home.measured(k.info.key, l.upTrips(false), now) {
		return ""
	}
	return l.open[l.home.key].info.name
}

// judgeAll does so with those that said nothing new for a while: their trips are
// as they were.
func (l *links) judgeAll(now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, k := range l.open {
		if k.up() && now.Sub(k.judged) >= judgeEvery {
			if moved := l.judge(k, now); moved != "" {
				l.cfg.log.Info("home relay", "relay", moved)
			}
		}
	}
}

// upTrips are the round trips to the relays that are up, and, if asked for, to those
// in nodes that are wanted; mu is held.
func (l *links) upTrips(peers bool) map[punch.Key]time.Duration {
	up := map[punch.Key]time.Duration{}
	for r, k := range l.open {
		if k.info.peer && !(peers && l.via.wanted[r]) {
			continue
		}
		if k.up() && k.state.RTT > 0 {
			up[r] = k.state.RTT
		}
	}
	return up
}

// onPeer takes whether a peer is at a relay.
func (l *links) onPeer(k *relayLink, p punch.Key, here bool) {
	l.mu.Lock()
	_, member := l.peers[p]
	here = here && member
	if here {
		k.here[p] = true
	} else {
		delete(k.here, p)
	}
	l.mu.Unlock()
	l.poke()
	if here {
		l.cfg.arrived(p)
	}
}

// record gives the relays for the record that is about to be signed.
func (l *links) record() []trust.RelayTrip {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.published = tripList(l.home.key, l.upTrips(true))
	return l.published
}

// tellRecord has the record published when what it says of relays is old, and
// tells how long until it is to be looked at again.
func (l *links) tellRecord(now time.Time) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if sameTrips(l.published, tripList(l.home.key, l.upTrips(true))) {
		return linkTick
	}
	if now.Before(l.publishAt) {
		return l.publishAt.Sub(now)
	}
	if now.Sub(l.publishAt) > publishPause {
		l.gap = firstPublishGap
	}
	l.publishAt = now.Add(l.gap)
	l.gap = min(2*l.gap, lastPublishGap)
	l.cfg.publish()
	return linkTick
}
