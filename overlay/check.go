package overlay

import (
	"cmp"
	"strings"

	"overlay/coord/trust"
)

// Check refuses, without the network, what no node can do; its error is for
// people. An empty invite is not looked at.
func (r UpRequest) Check() error {
	if r.Server != "" {
		if err := trust.ValidServer(r.Server); err != nil {
			return fail(Usage, "for example: --server vpn.example.org:443", "--server %s", strings.TrimPrefix(err.Error(), "server "))
		}
	}
	c := settings{
		Name:       r.Name,
		Interface:  cmp.Or(r.Interface, DefaultInterface),
		MTU:        cmp.Or(r.MTU, DefaultMTU),
		ListenPort: cmp.Or(r.ListenPort, firstPort),

		PortMapping: r.PortMapping,
		PeerRelay:   r.PeerRelay,
	}
	if r.Offloads != nil {
		c.Offloads = *r.Offloads
	}
	if r.Proxy != nil {
		c.Proxy = *r.Proxy
	}
	return c.check()
}

// CheckState finds out, before anything is started, whether a node can start
// from a state directory: no key readable by others, every file whole, and a
// membership unless an invite is at hand. It changes nothing.
func CheckState(cfg Config, invited bool) error {
	cfg.setDefaults()
	st := store{cfg.StateDir}
	if err := st.checkModes(); err != nil {
		return err
	}
	var (
		k keys
		m membership
		c settings
	)
	if _, err := st.load(keysFile, &k); err != nil {
		return err
	}
	if _, err := st.load(settingsFile, &c); err != nil {
		return err
	}
	joined, err := st.load(meshFile, &m)
	if err == nil && !joined && !invited {
		return errNotJoined()
	}
	return err
}

func errNotJoined() *Error {
	return fail(Refused, "ask its owner for an invite, then: overlay up ovl1_...", "this machine has not joined a mesh")
}
