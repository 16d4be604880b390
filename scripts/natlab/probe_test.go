package natlab

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"testing"
)

// claims are what the kinds that pass UDP on make of it.
func claims() map[NAT]Behaviour {
	masquerade := Behaviour{Mapping: EndpointIndependent, Filtering: AddressAndPortDependent, Preserves: true}
	hard := Behaviour{Mapping: AddressAndPortDependent, Filtering: AddressAndPortDependent}
	return map[NAT]Behaviour{
		Public:         {Mapping: EndpointIndependent, Filtering: EndpointIndependent, Preserves: true, Hairpin: true},
		Firewall:       {Mapping: EndpointIndependent, Filtering: AddressAndPortDependent, Preserves: true, Hairpin: true},
		Masquerade:     masquerade,
		FullCone:       {Mapping: EndpointIndependent, Filtering: EndpointIndependent, Preserves: true},
		Restricted:     {Mapping: EndpointIndependent, Filtering: AddressDependent, Preserves: true},
		PortRestricted: masquerade,
		OtherPort:      {Mapping: EndpointIndependent, Filtering: AddressAndPortDependent},
		OpenInput:      {Mapping: EndpointIndependent, Filtering: AddressAndPortDependent, Preserves: true, Poisoned: true},
		Hairpin:        {Mapping: EndpointIndependent, Filtering: AddressAndPortDependent, Preserves: true, Hairpin: true},
		DMZ:            {Mapping: EndpointIndependent, Filtering: EndpointIndependent, Preserves: true},
		OneToOne:       masquerade,
		Reset:          masquerade,
		Sequential:     hard,
		SequentialDown: hard,
		Random:         hard,
		Block512:       hard,
		Block:          hard,
		Block2048:      hard,
		AddressMapped:  {Mapping: AddressDependent, Filtering: AddressDependent},
		RandomOpen:     {Mapping: AddressAndPortDependent, Filtering: EndpointIndependent, Hairpin: true},
		Stride:         hard,
		ShortTimeouts:  masquerade,
		SmallMTU:       masquerade,
		Policed:        masquerade,
	}
}

func TestNATsAreWhatTheyClaim(t *testing.T) {
	lab := newLab(t, Options{})
	all := claims()
	nats := slices.SortedFunc(maps.Keys(all), func(a, b NAT) int {
		routed := map[bool]int{true: -1} // there are few public prefixes, for the first homes
		return cmp.Or(cmp.Compare(routed[a.routed()], routed[b.routed()]), cmp.Compare(a, b))
	})
	for _, nat := range nats {
		want := all[nat]
		home := mustHome(t, lab, string(nat), nat)
		laptop := mustLaptop(t, home, "laptop-"+string(nat))
		want.Public = home.WAN()
		if nat.routed() {
			want.Public = laptop.Addr()
		}
		t.Run(string(nat), func(t *testing.T) {
			t.Parallel()
			// Twice: what the first run left in the router must not
			// change what the second sees.
			for range 2 {
				got, err := laptop.Probe(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if got != want {
					t.Errorf("got  %+v\nwant %+v", got, want)
				}
			}
		})
	}
}

func TestUnknownNAT(t *testing.T) {
	lab := newLab(t, Options{})
	if _, err := lab.Home(t.Context(), "home", "carrier-pigeon"); err == nil {
		t.Error("a home behind a NAT that does not exist")
	}
}

func TestServerIsPublic(t *testing.T) {
	lab := newLab(t, Options{})
	server := mustServer(t, lab, "server")
	got, err := server.Probe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := Behaviour{Public: server.Addr(), Mapping: EndpointIndependent, Filtering: EndpointIndependent, Preserves: true, Hairpin: true}
	if got != want {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestSetWAN(t *testing.T) {
	lab := newLab(t, Options{})
	for _, nat := range []NAT{Masquerade, Public} {
		home := mustHome(t, lab, string(nat), nat)
		laptop := mustLaptop(t, home, "laptop-"+string(nat))
		want := netip.MustParseAddr("203.0.113.240")
		if nat == Public {
			want = netip.MustParseAddr("203.0.113.241")
		}
		if err := home.SetWAN(t.Context(), want); err != nil {
			t.Fatal(err)
		}
		if home.WAN() != want {
			t.Errorf("WAN is %s, want %s", home.WAN(), want)
		}
		if nat == Public {
			want = laptop.Addr()
		}
		got, err := laptop.Probe(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if got.Public != want {
			t.Errorf("%s: the world sees %s, want %s", nat, got.Public, want)
		}
	}
}

func TestMoveTo(t *testing.T) {
	lab := newLab(t, Options{})
	from, to := mustHome(t, lab, "from", Masquerade), mustHome(t, lab, "to", FullCone)
	laptop := mustLaptop(t, from, "laptop")
	if err := laptop.MoveTo(t.Context(), to); err != nil {
		t.Fatal(err)
	}
	got, err := laptop.Probe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got.Public != to.WAN() || got.Filtering != EndpointIndependent {
		t.Errorf("after the move: %+v", got)
	}
	// And back, with the cable out for a moment.
	if err := laptop.MoveTo(t.Context(), from); err != nil {
		t.Fatal(err)
	}
	for _, up := range []bool{false, true} {
		if err := laptop.SetLink(t.Context(), up); err != nil {
			t.Fatal(err)
		}
		got, err := laptop.Probe(t.Context())
		if up && (err != nil || got.Public != from.WAN()) {
			t.Errorf("link is up again: %+v, %v", got, err)
		}
		if !up && err == nil {
			t.Errorf("link is down: %+v", got)
		}
	}
}

// TestReboot keeps one socket over a reboot of a full cone: the world's
// packets pass before, and no longer after.
func TestReboot(t *testing.T) {
	lab := newLab(t, Options{})
	home := mustHome(t, lab, "home", FullCone)
	laptop := mustLaptop(t, home, "laptop")
	p := &probe{host: laptop}
	defer p.close()
	if err := p.listen(); err != nil {
		t.Fatal(err)
	}
	conn, err := p.socket()
	if err != nil {
		t.Fatal(err)
	}
	// One request by hand opens the mapping; the server does not answer.
	if _, err := conn.WriteToUDPAddrPort(probeRequest(0, 1), p.server(0, 0)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, probeMaxLen)
	_, mapped, err := p.servers[0][0].ReadFromUDPAddrPort(buf)
	if err != nil {
		t.Fatal(err)
	}
	reaches := func() bool {
		t.Helper()
		if _, err := p.servers[1][1].WriteToUDPAddrPort([]byte("hello"), mapped); err != nil {
			t.Fatal(err)
		}
		_, ok, err := receive(conn)
		if err != nil {
			t.Fatal(err)
		}
		return ok
	}
	if !reaches() {
		t.Error("before the reboot the mapping is closed")
	}
	if err := home.Reboot(t.Context()); err != nil {
		t.Fatal(err)
	}
	if reaches() {
		t.Error("after the reboot the mapping is open")
	}
}
