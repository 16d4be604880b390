package portmap

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
)

// probeTime bounds Probe: all searches, and a request to each protocol.
const probeTime = 5 * time.Second

// Report is what became of one port of ours at one router. Mapping is zero where
// there is none, and Refusals say why. Outer is the router's own outer address, as
// it says, also where it maps nothing; zero: it does not say.
type Report struct {
	Gateway  netip.Addr
	Port     uint16
	Mapping  Mapping
	Outer    netip.Addr
	Refusals []Refusal
	Settled  bool // the router was asked by all protocols, or there is a mapping
}

// Refusal is a protocol by which the router maps nothing. Words are its own, or
// what is wrong with its answer; empty: it does not answer by that protocol.
type Refusal struct {
	Protocol string
	Words    string
}

// said is what a site heard in the place of a mapping.
type said struct {
	outer    netip.Addr
	refusals []Refusal
}

// Reports gives what became of every port at every router so far.
func (m *Mapper) Reports() []Report {
	m.mu.Lock()
	defer m.mu.Unlock()
	var list []Report
	for _, at := range m.places() {
		got, mapped := m.held[at]
		what, tried := m.said[at]
		r := Report{
			Gateway: at.Gateway, Port: at.port, Mapping: got, Outer: what.outer,
			Refusals: slices.Clone(what.refusals), Settled: mapped || tried,
		}
		if mapped {
			r.Outer = got.External.Addr()
		}
		list = append(list, r)
	}
	return list
}

// note takes what a site heard in the place of a mapping.
func (m *Mapper) note(at place, what said) {
	m.mu.Lock()
	if slices.Contains(m.places(), at) {
		m.said[at] = what
	}
	m.mu.Unlock()
	m.notify()
}

// Probe has every router map Config.Port for a moment, and gives what they say.
// Nothing is left there when it returns, which it does within some seconds.
// Config.OnMapping is not called. The error is a Config without a port.
func Probe(ctx context.Context, c Config, routes []Route) ([]Report, error) {
	found := make(chan struct{}, 1)
	c.OnMapping = nil
	m, err := New(c)
	if err != nil {
		return nil, err
	}
	m.told = func() {
		select {
		case found <- struct{}{}:
		default:
		}
	}
	ctx, end := context.WithTimeout(ctx, probeTime)
	defer end()
	var running errgroup.Group
	running.Go(func() error { return m.Run(ctx) })
	m.SetRoutes(routes)
	var list []Report
	for settled := false; !settled && ctx.Err() == nil; {
		list = m.Reports()
		settled = !slices.ContainsFunc(list, func(r Report) bool { return !r.Settled })
		if settled {
			break
		}
		select {
		case <-found:
		case <-ctx.Done():
			list = m.Reports()
		}
	}
	end()
	return list, running.Wait()
}

// failures notes what protocols answer in the place of a mapping.
type failures map[string]error

// inOrder lists them as they were tried.
func (f failures) inOrder(order []protocol) []Refusal {
	var list []Refusal
	for _, p := range order {
		if err, ok := f[p.name()]; ok {
			list = append(list, Refusal{p.name(), words(err)})
		}
	}
	return list
}

// outerOf is the router's outer address, as far as a protocol was told.
func outerOf(order []protocol) netip.Addr {
	for _, p := range order {
		if teller, ok := p.(interface{ outer() netip.Addr }); ok && teller.outer().IsValid() {
			return teller.outer()
		}
	}
	return netip.Addr{}
}

// words are what the router says, without addresses; empty: nothing.
func words(err error) string {
	_, refused := errors.AsType[*refusal](err)
	if refused || errors.Is(err, errExternal) || errors.Is(err, errNoService) || errors.Is(err, errRedirect) {
		return strings.ReplaceAll(err.Error(), "\n", "; ")
	}
	return ""
}

// resultText names a result of PCP (RFC 6887 section 7.4) or NAT-PMP (RFC 6886
// section 3.5), as far as people can do something about it.
func resultText(protocol string, code int) string {
	text := map[int]string{2: "not authorized", 3: "network failure", 4: "out of resources"}
	if protocol == PCP {
		text = map[int]string{2: "not authorized", 7: "network failure", 8: "no resources", 10: "over quota", 11: "cannot provide that address"}
	}
	if text[code] == "" {
		return fmt.Sprintf("result %d", code)
	}
	return fmt.Sprintf("result %d, %s", code, text[code])
}
