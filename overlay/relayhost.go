package overlay

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"

	"overlay/coord"
	"overlay/coord/trust"
)

// Defaults and bounds of a standalone relay, and the tag of an invite for one.
const (
	DefaultRelayDir    = "/var/lib/overlay-relay"
	DefaultRelayListen = ":443"
	MaxRelayRate       = 1_000_000 // Mbit/s
	RelayTag           = trust.RelayTag
)

// RelayConfig says how to run a standalone relay. Empty fields mean the
// defaults.
type RelayConfig struct {
	StateDir string
	Listen   string // [HOST]:PORT, TCP and UDP
	Public   string // HOST[:PORT] that nodes reach it at; empty: found out
	Name     string // of this member; empty: the machine's
	Server   string // host:port to join at, instead of the invite's
	Proxy    string // http://[USER:PASSWORD@]HOST:PORT for the server; empty: none
	Version  string
	Rate     int          // Mbit/s of one flow; 0: as fast as it goes
	Log      *slog.Logger // nil: silent
}

func (c *RelayConfig) setDefaults() {
	c.StateDir, c.Listen = cmp.Or(c.StateDir, DefaultRelayDir), cmp.Or(c.Listen, DefaultRelayListen)
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
}

// Check refuses, without the network, what no relay can do; its error is for
// people.
func (c RelayConfig) Check() error {
	c.setDefaults()
	if c.Rate < 0 || c.Rate > MaxRelayRate {
		return fail(Usage, fmt.Sprintf("use a number from 1 to %d, in Mbit/s", MaxRelayRate), "--rate %d is out of range", c.Rate)
	}
	if _, _, err := splitListen(c.Listen); err != nil {
		return err
	}
	if c.Public != "" {
		if _, err := publicOfRelay(c.Public, 1); err != nil {
			return fail(Usage, "for example: --public relay.example.org:443", "--public %q is not HOST[:PORT]: %v", c.Public, err)
		}
	}
	return UpRequest{Name: c.Name, Server: c.Server, Proxy: &c.Proxy}.Check()
}

// ServeRelay runs a relay until ctx ends. It joins the mesh with invite unless
// it is a member already; then invite may be empty. ready is called with the
// relay's name once it serves.
func ServeRelay(ctx context.Context, c RelayConfig, invite string, ready func(name string)) error {
	c.setDefaults()
	if err := c.Check(); err != nil {
		return err
	}
	st := store{c.StateDir}
	unlock, err := openRelayDir(ctx, st, invite)
	if err != nil {
		return relayError(err, c)
	}
	defer unlock()
	sockets, err := listenRelay(c.Listen) // first: an invite works once
	if err != nil {
		return err
	}
	defer sockets.close()
	m, err := joinRelay(ctx, c, st, invite)
	if err != nil {
		return relayError(err, c)
	}
	h, err := newRelayHost(c, m, sockets)
	if err != nil {
		return relayError(err, c)
	}
	if ready != nil {
		ready(h.name)
	}
	return h.run(ctx)
}

// openRelayDir takes the state directory for this process. Without an invite it
// makes none.
func openRelayDir(ctx context.Context, st store, invite string) (unlock func(), err error) {
	if _, err := os.Stat(st.dir); invite == "" && os.IsNotExist(err) {
		return nil, errRelayNotJoined()
	}
	if err := st.open(); err != nil {
		return nil, err
	}
	unlock, err = st.lock(ctx)
	if e, ok := errors.AsType[*Error](err); ok {
		return nil, &Error{Kind: e.Kind, Message: e.Message, Hint: "stop it, or use another --state DIR"}
	}
	return unlock, err
}

func errRelayNotJoined() *Error {
	return fail(Refused, "on the machine that founded the mesh: overlay invite --tag "+RelayTag+", then here: overlay relay ovl1_...",
		"this relay has not joined a mesh")
}

// joinRelay gives the membership: the saved one, or that of a new member with
// the role of a relay.
func joinRelay(ctx context.Context, c RelayConfig, st store, invite string) (*membership, error) {
	var m membership
	joined, err := st.load(meshFile, &m)
	if err != nil {
		return nil, err
	}
	if joined {
		return &m, checkRelayMember(&m, c, invite)
	}
	if invite == "" {
		return nil, errRelayNotJoined()
	}
	inv, err := parseInvite(invite)
	if err != nil {
		return nil, err
	}
	if inv.Kind == coord.InviteOwner {
		return nil, fail(Refused, "found it first, with the same invite: sudo overlay up; there: overlay invite --tag "+RelayTag,
			"this is the invite for the first machine of a mesh; a relay joins a mesh that there is")
	}
	cfg, err := relayJoin(c, st, inv)
	if err != nil {
		return nil, err
	}
	got, err := coord.Join(ctx, cfg, func(step, detail string) { c.Log.Info("joining", step, detail) })
	if err != nil {
		return nil, serverError(err, inv.Server)
	}
	m = membership(got)
	return &m, st.save(meshFile, m)
}

func relayJoin(c RelayConfig, st store, inv coord.Invite) (coord.JoinConfig, error) {
	k, err := st.loadKeys()
	if err != nil {
		return coord.JoinConfig{}, err
	}
	name := c.Name
	if name == "" {
		host, _ := os.Hostname()
		name = trust.NormalizeName(host)
	}
	proxy, err := parseProxy(c.Proxy)
	return coord.JoinConfig{
		Invite: inv, Device: k.Device, WireGuard: k.WireGuard,
		Name: name, Exact: c.Name != "", Server: c.Server,
		Role: trust.RoleRelay, Proxy: proxy, Log: c.Log,
	}, err
}

// checkRelayMember refuses a state directory of a node, and flags and invites
// that want to make another member of this one.
func checkRelayMember(m *membership, c RelayConfig, invite string) error {
	cert, err := ownCert(m)
	if err != nil {
		return err
	}
	if cert.Role != trust.RoleRelay {
		return fail(Refused, "use another --state DIR", "the state directory %s is that of the node %q, not of a relay", c.StateDir, cert.Name)
	}
	return store{c.StateDir}.sameMesh(m, UpRequest{Invite: invite, Name: c.Name})
}

// relayError words for a relay what is worded for a node: whoever gives a
// relay's identity up does it by hand.
func relayError(err error, c RelayConfig) error {
	e, ok := errors.AsType[*Error](err)
	if !ok || !strings.Contains(e.Hint, "overlay leave") {
		return err
	}
	hint := fmt.Sprintf("use another --state DIR, or move %s away and join again: overlay relay ovl1_...", c.StateDir)
	if strings.HasPrefix(e.Hint, "restore") {
		hint = "restore it from a backup, " + hint
	}
	return &Error{Kind: e.Kind, Message: e.Message, Hint: hint}
}

// publicOfRelay gives the host and the port of HOST[:PORT].
func publicOfRelay(public string, port uint16) (address string, err error) {
	address = public
	if _, _, err := net.SplitHostPort(public); err != nil {
		address = net.JoinHostPort(strings.Trim(public, "[]"), fmt.Sprint(port))
	}
	return address, trust.ValidServer(address)
}
