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
	var err error
	s.mapper, err = s.newMapperOf("overlay", s.dev.Load().Port(), s.mapped)
	return err
}

// newMapperOf makes what asks the router for a way in to a port.
func (s *session) newMapperOf(name string, port uint16, tell func([]portmap.Mapping)) (*portmap.Mapper, error) {
	secret := sha256.Sum256(append([]byte("overlay port mapping "), s.keys.WireGuard[:]...))
	m, err := portmap.New(portmap.Config{Port: port, Name: name, Secret: secret[:], OnMapping: tell, Log: s.log})
	if err != nil {
		return nil, fmt.Errorf("prepare port mapping: %w", err)
	}
	return m, nil
}

// mapped hands on where routers let peers in: to the port of WireGuard, whatever
// else is mapped.
func (s *session) mapped(list []portmap.Mapping) {
	var addrs []netip.AddrPort
	var by []string
	for _, m := range list {
		if m.Port != s.dev.Load().Port() {
			continue
		}
		how := m.Protocol
		if m.DoubleNAT {
			how += " behind another NAT"
		}
		addrs, by = append(addrs, m.External), append(by, how)
	}
	s.log.Info("ports mapped", "by", by)
	s.agent.SetMapped(addrs)
	s.peerRelay.setMaps(len(list) > 0)
}

// lookAtRouters tells the mapper which routers there are now, and which port to
// map: sockets may have been opened anew at another one.
func (s *session) lookAtRouters() {
	if s.mapper == nil {
		return
	}
	s.mapper.SetPorts(s.dev.Load().Port())
	list, err := routes()
	if err != nil {
		s.log.Warn("routers not found", "err", err)
		return
	}
	s.mapper.SetRoutes(list)
	s.peerRelay.setRoutes(list)
}

// checkMapping has the router asked whether the mapped port is still the same.
func (s *session) checkMapping() {
	if s.mapper != nil {
		s.mapper.Check()
	}
	s.peerRelay.checkMapping()
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
