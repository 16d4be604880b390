package main

import (
	"bufio"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"overlay/coord"
	"overlay/coord/trust"
)

// serversKey finds the servers of a script among its values.
type serversKey struct{}

func servers(ts *testscript.TestScript) map[string]*exec.Cmd {
	return ts.Value(serversKey{}).(map[string]*exec.Cmd)
}

const serverWait = 10 * time.Second

// coord NAME ARG... runs a server until the script ends. It sets NAME_addr to
// its address and NAME_invite to the line it printed, and NAME.log is its log.
func startServer(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, len(args) < 1, "coord NAME ARG...")
	name := args[0]
	host := ts.Getenv("HOST")
	if host == "" {
		host = "127.0.0.1"
	}
	// Flags of the script come last, where they win.
	cmd := exec.Command("/proc/self/exe", append([]string{
		"coord", "--listen", host + ":0", "--stun", host + ":0", "--state", ts.MkAbs(name),
	}, args[1:]...)...)
	cmd.Args[0] = "overlay"
	log, err := os.Create(ts.MkAbs(name + ".log"))
	ts.Check(err)
	defer log.Close()
	out, err := cmd.StdoutPipe()
	ts.Check(err)
	cmd.Stderr = log
	ts.Check(cmd.Start())
	servers(ts)[name] = cmd
	ts.Defer(func() {
		if servers(ts)[name] == cmd {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	})
	ts.Setenv(name+"_addr", waitServing(ts, name))
	ts.Setenv(name+"_invite", "")
	if strings.Contains(ts.ReadFile(name+".log"), "no owner yet") {
		line, err := bufio.NewReader(out).ReadString('\n')
		ts.Check(err)
		ts.Setenv(name+"_invite", strings.TrimSpace(line))
	}
}

// waitServing waits until a server's log says that it serves, and where.
func waitServing(ts *testscript.TestScript, name string) string {
	serving := regexp.MustCompile(`msg=serving listen=(\S+)`)
	for end := time.Now().Add(serverWait); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if m := serving.FindStringSubmatch(ts.ReadFile(name + ".log")); m != nil {
			return m[1]
		}
	}
	ts.Fatalf("the server does not serve: %s", ts.ReadFile(name+".log"))
	return ""
}

// end NAME ends a server as a user does and wants it to end well.
func endServer(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, len(args) != 1, "end NAME")
	cmd := servers(ts)[args[0]]
	delete(servers(ts), args[0])
	ts.Check(cmd.Process.Signal(os.Interrupt))
	ts.Check(cmd.Wait())
}

// listen VAR TEXT accepts connections that say TEXT and end. VAR is the address.
func listenPlain(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, len(args) != 2, "listen VAR TEXT")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Read(make([]byte, 4096))
			_, _ = io.WriteString(c, args[1]+"\r\n\r\n")
			_ = c.Close()
		}
	})
	ts.Defer(func() {
		_ = l.Close()
		wg.Wait()
	})
	ts.Setenv(args[0], l.Addr().String())
}

// forge VAR SERVER makes an invite that only names a server.
func forgeInvite(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, len(args) != 2, "forge VAR SERVER")
	inv, err := coord.NewInvite(coord.InviteMember, trust.Hash{1}, args[1])
	ts.Check(err)
	ts.Setenv(args[0], inv.String())
}

// signer is a node's identity and its connection to the server.
type signer struct {
	Device ed25519.PrivateKey `json:"device"`
	Signer ed25519.PrivateKey `json:"signer"`

	conn   *coord.Conn
	public trust.Key
}

// asSigner connects as the node that founded the mesh of the server at addr.
func asSigner(ctx context.Context, ts *testscript.TestScript, node, addr string) *signer {
	var s signer
	ts.Check(json.Unmarshal([]byte(ts.ReadFile(node+"/keys.json")), &s))
	s.public = trust.Key(s.Signer.Public().(ed25519.PublicKey))
	d := coord.Dialer{
		Servers: []string{addr}, Device: s.Device,
		Verify: func(trust.Hash) error { return nil }, Log: slog.New(slog.DiscardHandler),
	}
	var err error
	s.conn, err = d.Dial(ctx)
	ts.Check(err)
	return &s
}

// brief VAR NODE SERVER makes an invite that expires within two seconds, which
// no flag would allow.
func briefInvite(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, len(args) != 3, "brief VAR NODE SERVER")
	ctx, cancel := context.WithTimeout(context.Background(), serverWait)
	defer cancel()
	s := asSigner(ctx, ts, args[1], args[2])
	defer s.conn.Close()
	var m struct {
		TrustHash trust.Hash `json:"trustHash"`
	}
	ts.Check(json.Unmarshal([]byte(ts.ReadFile(args[1]+"/mesh.json")), &m))
	inv, err := coord.NewInvite(coord.InviteMember, m.TrustHash, args[2])
	ts.Check(err)
	now := time.Now().UTC().Truncate(time.Second)
	doc, err := trust.SignInviteCap(trust.InviteCap{
		Invite: trust.Key(inv.Key().Public().(ed25519.PublicKey)), Signer: s.public,
		NotBefore: now.Add(-time.Minute), NotAfter: now.Add(2 * time.Second), Uses: 1,
	}, s.Signer)
	ts.Check(err)
	ts.Check(s.conn.Invite(ctx, coord.InviteRequest{Cap: doc}))
	ts.Setenv(args[0], inv.String())
}

// withdraw VAR NODE SERVER revokes the invite in VAR.
func withdrawInvite(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, len(args) != 3, "withdraw VAR NODE SERVER")
	ctx, cancel := context.WithTimeout(context.Background(), serverWait)
	defer cancel()
	s := asSigner(ctx, ts, args[1], args[2])
	defer s.conn.Close()
	inv, err := coord.ParseInvite(ts.Getenv(args[0]))
	ts.Check(err)
	doc, err := trust.SignRevocation(trust.Revocation{
		Target: trust.Key(inv.Key().Public().(ed25519.PublicKey)), By: s.public, From: time.Now().UTC().Truncate(time.Second),
	}, s.Signer)
	ts.Check(err)
	ts.Check(s.conn.Revoke(ctx, coord.RevokeRequest{Revocation: doc}))
}
