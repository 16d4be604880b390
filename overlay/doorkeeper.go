package overlay

import (
	"fmt"
	"sync"

	"overlay/coord/trust"
	"overlay/punch"
	"overlay/punch/relay"
)

// doorkeeper tells a relay whom to serve: nodes of the mesh that were not
// withdrawn, as far as was heard.
type doorkeeper struct {
	lock sync.Locker
	mesh *trust.Mesh // under lock
}

// verify says who shows these credentials. The netmap need not have it yet.
func (d doorkeeper) verify(credentials []byte) (relay.Identity, error) {
	invite, countersigned, err := trust.SplitCredentials(credentials)
	if err != nil {
		return relay.Identity{}, err
	}
	d.lock.Lock()
	defer d.lock.Unlock()
	cert, err := d.mesh.Admit(invite, countersigned)
	if err != nil {
		return relay.Identity{}, err
	}
	if cert.Role != trust.RoleNode {
		return relay.Identity{}, fmt.Errorf("%q is no node", cert.Name)
	}
	return relay.Identity{Device: cert.Device, WireGuard: punch.Key(cert.WireGuard)}, nil
}

// known says whether a device is a node of the mesh.
func (d doorkeeper) known(device trust.Key) bool {
	d.lock.Lock()
	defer d.lock.Unlock()
	cert, ok := d.mesh.Device(device)
	return ok && cert.Role == trust.RoleNode
}
