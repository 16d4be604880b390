package portmap

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"strconv"
	"time"

	"github.com/huin/goupnp/soap"
)

// Error codes of a router (WANIPConnection:1 section 2.4, :2 section 2.5).
const (
	upnpInvalidAction = 401
	upnpInvalidArgs   = 402
	upnpActionFailed  = 501
	upnpNoSuchEntry   = 714
	upnpConflict      = 718
	upnpPermanentOnly = 725
	upnpConflictOther = 729
)

const (
	// addTries is how often a router is asked for a port in other words.
	addTries = 4
	// Ports that are drawn when ours is taken on the outside.
	firstRandomPort, randomPorts = 20000, 40000
	udpName                      = "UDP"
)

// upnp is UPnP IGD towards one router.
type upnp struct {
	route  Route
	port   uint16
	label  string
	client *http.Client
	found  []service  // by find
	used   service    // by ask
	told   netip.Addr // the router's outer address; zero: not since find
}

func newUPnP(r Route, port uint16, label string) *upnp {
	return &upnp{route: r, port: port, label: label, client: httpClient(r)}
}

func (*upnp) name() string { return UPnP }

func (u *upnp) find(ctx context.Context) error {
	u.told = netip.Addr{} // it may be another router by now
	b, err := search(ctx, u.route)
	if err != nil {
		return err
	}
	u.found, err = describe(ctx, u.client, b.location, u.route.Gateway)
	return err
}

// ask tries the services in turn: a router that once had a modem may describe a
// connection that it does not use.
func (u *upnp) ask(ctx context.Context, w want) (grant, error) {
	var errs []error
	for _, s := range u.found {
		ip, err := u.address(ctx, s)
		if err == nil {
			u.used = s
			var got grant
			if got, err = u.add(ctx, s, w); err == nil {
				return grant{netip.AddrPortFrom(ip, got.external.Port()), got.lifetime}, nil
			}
		}
		errs = append(errs, err)
	}
	return grant{}, errors.Join(errs...)
}

func (u *upnp) address(ctx context.Context, s service) (netip.Addr, error) {
	var out struct {
		IP string `xml:"NewExternalIPAddress"`
	}
	if err := u.call(ctx, s, "GetExternalIPAddress", nil, &out); err != nil {
		return netip.Addr{}, err
	}
	ip, err := netip.ParseAddr(out.IP)
	if err != nil || !ip.IsGlobalUnicast() { // that of no connection is 0.0.0.0, or empty
		return netip.Addr{}, errExternal
	}
	u.told = ip.Unmap()
	return u.told, nil
}

func (u *upnp) outer() netip.Addr { return u.told }

// entry names a mapping; its fields are as the router wants them, in order.
type entry struct {
	NewRemoteHost   string
	NewExternalPort string
	NewProtocol     string
}

func entryOf(port uint16) entry { return entry{"", strconv.Itoa(int(port)), udpName} }

// addition are the arguments of AddPortMapping and AddAnyPortMapping.
type addition struct {
	NewRemoteHost             string
	NewExternalPort           string
	NewProtocol               string
	NewInternalPort           string
	NewInternalClient         string
	NewEnabled                string
	NewPortMappingDescription string
	NewLeaseDuration          string
}

// add makes or renews the mapping, in the words that this router understands.
func (u *upnp) add(ctx context.Context, s service, w want) (grant, error) {
	port, lease, action := w.external.Port(), w.lifetime, "AddPortMapping"
	if port == 0 {
		port = w.port
	}
	if s.kind == wanIP2 {
		action = "AddAnyPortMapping"
	}
	var err error
	for range addTries {
		in := addition{
			"", strconv.Itoa(int(port)), udpName, strconv.Itoa(int(w.port)), u.route.Local.String(), "1", u.label,
			strconv.Itoa(int(lease / time.Second)),
		}
		var out struct {
			Port string `xml:"NewReservedPort"`
		}
		err = u.call(ctx, s, action, &in, &out)
		if err == nil {
			if n, err := strconv.ParseUint(out.Port, 10, 16); err == nil && n > 0 {
				port = uint16(n)
			}
			if lease == 0 { // for ever: look at it as often as at others
				lease = lifetime
			}
			return grant{netip.AddrPortFrom(netip.Addr{}, port), lease}, nil
		}
		switch code := faultCode(err); {
		case code == upnpInvalidAction && action == "AddAnyPortMapping":
			action = "AddPortMapping"
		case code == upnpConflict || code == upnpConflictOther:
			port = firstRandomPort + uint16(rand.N(randomPorts))
		case lease > 0 && (code == upnpPermanentOnly || code == upnpInvalidArgs || code == upnpActionFailed):
			lease = 0
		default:
			return grant{}, err
		}
	}
	return grant{}, err
}

// alive asks for our entry, and whether the outer address is the same.
func (u *upnp) alive(ctx context.Context, got grant) (bool, error) {
	ip, err := u.address(ctx, u.used)
	if err != nil {
		return false, err
	}
	ours, err := u.has(ctx, got.external.Port())
	switch code := faultCode(err); {
	case code == upnpNoSuchEntry:
		return false, nil
	case code != 0: // it does not tell; nothing says that it forgot
		return ip == got.external.Addr(), nil
	case err != nil:
		return false, err
	}
	return ours && ip == got.external.Addr(), nil
}

// has asks for the entry of an outer port, and whether it is ours.
func (u *upnp) has(ctx context.Context, port uint16) (bool, error) {
	in := entryOf(port)
	var out struct {
		Port   string `xml:"NewInternalPort"`
		Client string `xml:"NewInternalClient"`
	}
	err := u.call(ctx, u.used, "GetSpecificPortMappingEntry", &in, &out)
	return err == nil && out.Port == strconv.Itoa(int(u.port)) && out.Client == u.route.Local.String(), err
}

// remove looks first whose entry it is where the router has not said that it is
// ours: not every router asks who deletes it.
func (u *upnp) remove(ctx context.Context, got grant) error {
	port := got.external.Port()
	if port == 0 {
		port = u.port
		if u.used.control == nil {
			return nil // it was not asked for anything yet
		}
		if ours, err := u.has(ctx, port); !ours {
			return err
		}
	}
	in := entryOf(port)
	return u.call(ctx, u.used, "DeletePortMapping", &in, nil)
}

// call performs an action. A fault is the router's own word: a refusal.
func (u *upnp) call(ctx context.Context, s service, action string, in, out any) error {
	c := soap.SOAPClient{EndpointURL: *s.control, HTTPClient: *u.client}
	err := c.PerformActionCtx(ctx, s.kind, action, in, out)
	if err == nil {
		return nil
	}
	err = fmt.Errorf("%s: %w", action, err)
	if faultCode(err) != 0 {
		return &refusal{err: err}
	}
	return err
}

// faultCode is the code of a router's error; 0: it is none.
func faultCode(err error) int {
	fault, ok := errors.AsType[*soap.SOAPFaultError](err)
	if !ok {
		return 0
	}
	if code := fault.Detail.UPnPError.Errorcode; code != 0 {
		return code
	}
	return upnpActionFailed // one without a code
}
