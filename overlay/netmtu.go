package overlay

import (
	"context"
	"net"

	"overlay/punch"
	"overlay/tun"
)

// packetSizes are the IP packets of which one may be the largest on a path, in
// bytes: those of old and new lines, of tunnels and carriers, and the least of
// IPv6.
func packetSizes() []int {
	return []int{668, 1040, 1240, 1280, 1300, 1340, 1360, 1380, 1400, 1420, 1440, 1460, 1480, 1492, 1500}
}

// pathMTU finds the largest packet that arrives at a server uncut; 0: none of them
// does. What comes back is small, so this is the way there.
func pathMTU(ctx context.Context, network string, server punch.Server) (int, error) {
	s, err := openSpare(network)
	if err != nil {
		return 0, err
	}
	defer closeAll([]*spare{s})
	if err := tun.DontFragment(s.conn); err != nil {
		return 0, err
	}
	overhead := headers4
	if network == "udp6" {
		overhead = headers6
	}
	var list []*pending
	for _, size := range packetSizes() {
		q, err := punch.NewQuestion(server, punch.Ask{Size: size - overhead})
		if err != nil {
			return 0, err
		}
		list = append(list, &pending{Question: q, to: server.Addr})
	}
	if _, err := s.askAll(ctx, list); err != nil {
		return 0, err
	}
	largest := 0
	for i, p := range list {
		if p.got {
			largest = packetSizes()[i]
		}
	}
	return largest, nil
}

// linkMTU is that of the interface which the default route takes; nil: there is
// none.
func linkMTU() *int {
	list, err := tun.Gateways()
	if err != nil || len(list) == 0 {
		return nil
	}
	link, err := net.InterfaceByIndex(list[0].Link)
	if err != nil {
		return nil // it has just gone
	}
	return &link.MTU
}
