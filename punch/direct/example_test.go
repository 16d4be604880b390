package direct_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sync/errgroup"

	"overlay/punch"
	"overlay/punch/direct"
)

// Two programs that share a secret find a path to each other. Here they run on
// one machine, and what passes their signals is a pair of channels.
func ExampleDial() {
	secret := []byte("128 bits or more that both know")
	server, stop := stunServer()
	defer stop()
	toAlice, toBob := make(chan direct.Signal, 16), make(chan direct.Signal, 16)

	program := func(name, peer string, out, in chan direct.Signal) (net.Conn, error) {
		theirs, err := punch.PublicKey(direct.SecretKey(secret, peer))
		if err != nil {
			return nil, err
		}
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		return direct.Dial(ctx, direct.Config{
			PrivateKey: direct.SecretKey(secret, name),
			Address:    netip.MustParseAddrPort("127.0.0.1:0"), // without it: all of this machine's
			Servers:    []netip.AddrPort{server},
			Send:       func(s direct.Signal) error { return post(out, s.Body) },
			Signals:    in,
		}, theirs)
	}

	var both errgroup.Group
	both.Go(func() error {
		conn, err := program("alice", "bob", toBob, toAlice)
		if err != nil {
			return err
		}
		defer conn.Close()
		fmt.Fprint(conn, "hello bob")
		return answer(conn)
	})
	both.Go(func() error {
		conn, err := program("bob", "alice", toAlice, toBob)
		if err != nil {
			return err
		}
		defer conn.Close()
		if err := answer(conn); err != nil {
			return err
		}
		_, err = fmt.Fprint(conn, "hello alice")
		return err
	})
	if err := both.Wait(); err != nil {
		fmt.Println(err)
	}
	// Output:
	// hello bob
	// hello alice
}

// post puts a signal into the other program's mailbox, if there is room.
func post(mailbox chan<- direct.Signal, body []byte) error {
	select {
	case mailbox <- direct.Signal{Body: body}:
		return nil
	default:
		return errors.New("the mailbox is full")
	}
}

// answer prints what the other program says. Datagrams may be lost, so nobody
// should wait for one without end.
func answer(conn net.Conn) error {
	if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	b := make([]byte, 1200)
	n, err := conn.Read(b)
	if err == nil {
		fmt.Printf("%s\n", b[:n])
	}
	return err
}

// stunServer is a STUN server on this machine; any other does as well.
func stunServer() (netip.AddrPort, func()) {
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		panic(err)
	}
	var serving errgroup.Group
	serving.Go(func() error {
		b := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFromUDPAddrPort(b)
			if err != nil {
				return nil
			}
			anybody := func([]byte) (key, token []byte, ok bool) { return nil, nil, true }
			if reply := punch.AnswerBinding(b[:n], from, anybody); reply != nil {
				conn.WriteToUDPAddrPort(reply, from)
			}
		}
	})
	return conn.LocalAddr().(*net.UDPAddr).AddrPort(), func() {
		conn.Close()
		serving.Wait()
	}
}
