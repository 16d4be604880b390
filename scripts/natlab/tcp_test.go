package natlab

import (
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	tcpBar    = 5 * time.Second
	tcpRate   = 0.9
	tcpRuns   = 30 // of the cell that the bar is for
	tcpBeside = 5  // of each other cell
	whatTCP   = "tcp direct after"
)

// TestTCPDirect has laptops that no UDP reaches meet over TCP, again and again:
// the first replies come over a relay.
func TestTCPDirect(t *testing.T) {
	needLab(t)
	var all figures
	for _, x := range []mix{
		{UDPBlocked, UDPBlocked, false},
		{UDPBlocked, Masquerade, false},
		{UDPBlocked, Public, false},
	} {
		t.Run(x.String(), func(t *testing.T) {
			_, a, b := x.pair(t, Options{})
			r := &race{t: t, all: &all, a: a, b: b, cell: x.String()}
			count, met := runs(1, tcpBeside), 0
			if x.two == UDPBlocked {
				count = runs(2, tcpRuns)
			}
			for i := range count {
				if r.meetTCP(i) {
					met++
				}
			}
			t.Logf("%s: %d of %d within %v", x, met, count, tcpBar)
			if float64(met) < tcpRate*float64(count) {
				t.Errorf("%s: %d of %d within %v, less than %v", x, met, count, tcpBar, tcpRate)
			}
		})
	}
	all.report(t)
	all.of(whatReply).atMost(t, relayMedian, relayWorst)
}

// meetTCP restarts both nodes and pings; it reports whether those without UDP used
// TCP in time. The other side may find a relay as near.
func (r *race) meetTCP(run int) bool {
	r.t.Helper()
	r.restart(0)
	ping := startPing(r.t, r.a.Host, r.b.addr, fastPing)
	defer ping.stop(r.t)
	start := time.Now()
	took, err := r.a.await(r.t.Context(), 2*tcpBar, viaTCP(r.b.nodeName))
	if err != nil {
		r.t.Logf("run %d: %v", run, err)
		return false
	}
	if r.b.home.nat == UDPBlocked {
		if _, err := r.b.await(r.t.Context(), 2*tcpBar, viaTCP(r.a.nodeName)); err != nil {
			r.t.Logf("run %d: %v", run, err)
			return false
		}
		took = time.Since(start)
	}
	reply, err := ping.firstReply(directWait)
	if err != nil {
		r.t.Error(err)
	}
	r.all.add(r.cell, whatReply, reply)
	r.all.add(r.cell, whatTCP, took)
	r.t.Logf("run %d: reply %v, tcp %v", run, reply, took)
	return took <= tcpBar
}

// TestTCPLost cuts a direct TCP path under an ssh session, which goes on over the
// relay.
func TestTCPLost(t *testing.T) {
	var all figures
	m, a, b := mix{UDPBlocked, UDPBlocked, false}.pair(t, Options{})
	if err := b.StartSSHD(t.Context()); err != nil {
		t.Fatal(err)
	}
	cut := make(chan struct{})
	ping := startPing(t, a.Host, b.addr, quickPing)
	var g errgroup.Group
	g.Go(func() error { return chat(t.Context(), a.Host, b, cut) })
	if _, err := a.await(t.Context(), 2*tcpBar, viaTCP(b.nodeName)); err != nil {
		t.Error(err)
	}
	time.Sleep(2 * time.Second)
	closed := ping.now()
	m.cut(t, a.Host, b.Host)
	if _, err := a.await(t.Context(), directWait, relayedTo(b.nodeName)); err != nil {
		t.Error(err)
	}
	time.Sleep(2 * time.Second)
	close(cut)
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	gap := longestGap(answeredSince(ping.stop(t), closed-inFlight))
	all.add("fall-back", whatGap, gap)
	all.report(t)
	all.of(whatGap).atMost(t, fallBackBar, fallBackBar)
}
