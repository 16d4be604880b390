package main

import (
	"context"
	"errors"
	"fmt"
	"os"
)

// place is a layout and what is measured in it.
type place struct {
	name   string
	layout layout
	cases  []testCase
}

// places are where the way is not one stream in one direction over IPv4
// between public hosts.
func (b *bench) places() []place {
	nat := flowCase{name: "nat-up", prefix: "natUp", label: "TCP from behind the NAT", congestion: bbr}
	back := flowCase{name: "nat-down", prefix: "natDown", label: "TCP to behind the NAT", congestion: bbr, args: []string{"-R"}}
	six := flowCase{name: "ipv6", prefix: "tcpIPv6", label: "TCP over IPv6 inside", congestion: bbr, ipv6: true}
	return []place{
		{"public", layout{peers: 2, ipv6: true}, []testCase{b.both(), b.twoPeers(), b.tcp(six)}},
		{"masquerade", layout{peers: 1, nat: true}, []testCase{b.tcp(nat), b.tcp(back)}},
	}
}

// comparePaths measures all places, each in a lab of its own.
func comparePaths(ctx context.Context, o *options) error {
	s := &series{}
	fmt.Fprintln(os.Stderr, "not among them: IPv6 outside, because the Internet of the lab has none")
	var err error
	for i := range (&bench{}).places() {
		err = inLab(ctx, o, func(b *bench) error { return b.comparePlace(ctx, b.places()[i], s) })
		if err != nil {
			break
		}
	}
	return errors.Join(err, s.finish(o))
}

func (b *bench) comparePlace(ctx context.Context, p place, s *series) error {
	cases, err := b.choose(p.cases)
	if err != nil || len(cases) == 0 {
		return err
	}
	if err := b.build(ctx, p.layout); err != nil {
		return err
	}
	r, err := b.measure(ctx, cases)
	if err != nil {
		return err
	}
	r.Setting = p.name
	s.Runs = append(s.Runs, r)
	return nil
}
