package direct

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"

	"overlay/punch"
)

// Bounds of an answer of a STUN server over TCP: its header, and attributes.
const (
	stunHeader    = 20
	maxAttributes = 556
)

var errLength = errors.New("the answer is too long")

// askServers asks the first server of each family how it sees this port. The
// connections stay, so that the mappings do.
func (d *dialing) askServers(ctx context.Context) {
	var mu sync.Mutex
	var g sync.WaitGroup
	asked := map[bool]bool{}
	for _, server := range d.Servers {
		if is4 := server.Addr().Unmap().Is4(); asked[is4] {
			continue
		} else {
			asked[is4] = true
		}
		g.Go(func() {
			a, conn, err := askTCP(ctx, d.port, server)
			if err != nil {
				d.Log.Debug("server does not answer over tcp", "server", server, "err", err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			d.mapped, d.seen = append(d.mapped, a), append(d.seen, conn)
		})
	}
	g.Wait()
}

// askTCP has a STUN server tell how it sees a local TCP port. The length in the
// message's header is all the framing there is (RFC 8489 section 6.2.2).
func askTCP(ctx context.Context, port uint16, server netip.AddrPort) (netip.AddrPort, net.Conn, error) {
	conn, err := DialFrom(ctx, port, server)
	if err != nil {
		return netip.AddrPort{}, nil, err
	}
	a, err := ask(ctx, conn)
	if err != nil {
		return a, nil, errors.Join(err, conn.Close())
	}
	return a, conn, nil
}

func ask(ctx context.Context, conn net.Conn) (netip.AddrPort, error) {
	var none netip.AddrPort
	if end, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(end); err != nil {
			return none, err
		}
	}
	id, request, err := punch.BindingRequest()
	if err != nil {
		return none, err
	}
	if _, err := conn.Write(request); err != nil {
		return none, err
	}
	answer := make([]byte, stunHeader, stunHeader+maxAttributes)
	if _, err := io.ReadFull(conn, answer); err != nil {
		return none, err
	}
	size := int(binary.BigEndian.Uint16(answer[2:]))
	if size > maxAttributes {
		return none, errLength
	}
	answer = answer[:stunHeader+size]
	if _, err := io.ReadFull(conn, answer[stunHeader:]); err != nil {
		return none, err
	}
	return punch.MappedAddress(id, answer)
}
