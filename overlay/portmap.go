package overlay

import (
	"crypto/sha256"
	"fmt"
	"net/netip"
	"slices"

	"overlay/punch"
	"overlay/punch/portmap"
)

// The values of the setting that says whether routers are asked for a port.
const (
	portMappingOn  = "on"
	portMappingOff = "off"
)

// newMapper makes what asks the router for a way in; nil: it shall not be asked.
func (s *session) newMapper() error {
	if s.settings.PortMapping == portMappingOff {
		return nil
	}
	secret := sha256.Sum256(append([]byte("overlay port mapping "), s.keys.WireGuard[:]...))
	var err error
	s.mapper, err = portmap.New(portmap.Config{
		Port: s.dev.Load().Port(), Name: "overlay", Secret: secret[:], OnMapping: s.mapped, Log: s.log,
	})
	if err != nil {
		return fmt.Errorf("prepare port mapping: %w", err)
	}
	return nil
}

// mapped hands on where routers let peers in: to the port of WireGuard, and to that
// of the relay.
func (s *session) mapped(list []portmap.Mapping) {
	port := s.dev.Load().Port()
	var addrs []netip.AddrPort
	var by []string
	var others []portmap.Mapping
	for _, m := range list {
		if m.Port != port {
			others = append(others, m)
			continue
		}
		how := m.Protocol
		if m.DoubleNAT {
			how += " behind another NAT"
		}
		addrs, by = append(addrs, m.External), append(by, how)
	}
	s.log.Info("ports mapped", "by", by, "others", len(others))
	s.agent.SetMapped(addrs)
	s.peerRelay.setMapped(others, len(addrs) > 0)
}

// mapPorts tells the mapper which of our ports to map: the sockets may have been
// opened anew at another one, and the relay may have come or gone.
func (s *session) mapPorts() {
	if s.mapper == nil {
		return
	}
	s.mapper.SetPorts(s.dev.Load().Port(), s.peerRelay.toMap())
}

// lookAtRouters tells the mapper which routers there are now, and which ports to
// map.
func (s *session) lookAtRouters() {
	if s.mapper == nil {
		return
	}
	s.mapPorts()
	s.peerRelay.look() // it may have decided otherwise at the same moment
	list, err := routes()
	if err != nil {
		s.log.Warn("routers not found", "err", err)
		return
	}
	s.mapper.SetRoutes(list)
}

// checkMapping has the router asked whether the mapped ports are still the same.
func (s *session) checkMapping() {
	if s.mapper != nil {
		s.mapper.Check()
	}
}

// publishable leaves out the mapped ports that the server would refuse: those on
// an address of which it has not given a token. They travel in signals.
func publishable(list []punch.Candidate) []punch.Candidate {
	return slices.DeleteFunc(slices.Clone(list), func(c punch.Candidate) bool {
		return c.Type == punch.PortMapped && !slices.ContainsFunc(list, func(o punch.Candidate) bool {
			return o.Type == punch.ServerReflexive && len(o.Token) > 0 && o.Addr.Addr() == c.Addr.Addr()
		})
	})
}
