package portmap

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
)

const (
	// maxXML bounds a description and an answer to an action.
	maxXML      = 256 << 10
	maxHeader   = 16 << 10
	maxServices = 8
	maxDepth    = 8 // of devices in devices: a router has three
)

// The services that map ports, those to be asked first at the top.
const (
	wanIP2 = "urn:schemas-upnp-org:service:WANIPConnection:2"
	wanIP1 = "urn:schemas-upnp-org:service:WANIPConnection:1"
	wanPPP = "urn:schemas-upnp-org:service:WANPPPConnection:1"
)

var (
	errRedirect  = errors.New("the router sends elsewhere")
	errTooLong   = errors.New("the router's answer is too long")
	errNoService = errors.New("the router maps no ports")
)

// httpClient speaks with the router from our address of that link: without
// proxy, without redirects, and with an end to every answer.
func httpClient(r Route) *http.Client {
	dialer := &net.Dialer{LocalAddr: &net.TCPAddr{IP: r.Local.AsSlice()}}
	return &http.Client{
		Transport: bounded{&http.Transport{
			DialContext:            dialer.DialContext,
			DisableKeepAlives:      true,
			DisableCompression:     true,
			MaxResponseHeaderBytes: maxHeader,
		}},
		CheckRedirect: func(*http.Request, []*http.Request) error { return errRedirect },
		Timeout:       askTimeout,
	}
}

// bounded cuts answers that are too long.
type bounded struct{ http.RoundTripper }

// RoundTrip makes one request.
func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	answer, err := b.RoundTripper.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	answer.Body = &boundedBody{answer.Body, maxXML}
	return answer, nil
}

type boundedBody struct {
	io.ReadCloser
	left int
}

// Read fails where the answer goes on beyond the bound.
func (b *boundedBody) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, errTooLong
	}
	n, err := b.ReadCloser.Read(p[:min(len(p), b.left)])
	b.left -= n
	return n, err
}

// service is something of a router that maps ports.
type service struct {
	kind    string
	control *url.URL
}

// describe fetches and reads the description of a router.
func describe(ctx context.Context, c *http.Client, at *url.URL, gateway netip.Addr) ([]service, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, at.String(), nil)
	if err != nil {
		return nil, fmt.Errorf("fetch description: %w", err)
	}
	answer, err := c.Do(r)
	if err != nil {
		return nil, fmt.Errorf("fetch description: %w", err)
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("fetch description: %s", answer.Status)
	}
	return parseDescription(answer.Body, at, gateway)
}

// description is a device description (UPnP Device Architecture 1.1 section
// 2.3) as far as it matters.
type description struct {
	Base   string `xml:"URLBase"`
	Device device `xml:"device"`
}

type device struct {
	Devices  []device `xml:"deviceList>device"`
	Services []struct {
		Type    string `xml:"serviceType"`
		Control string `xml:"controlURL"`
	} `xml:"serviceList>service"`
}

func parseDescription(text io.Reader, at *url.URL, gateway netip.Addr) ([]service, error) {
	d := xml.NewDecoder(text)
	d.Strict = false // routers are not
	d.CharsetReader = func(_ string, in io.Reader) (io.Reader, error) { return in, nil }
	var got description
	if err := d.Decode(&got); err != nil {
		return nil, fmt.Errorf("read description: %w", err)
	}
	base := at
	if u, err := routerURL(nil, got.Base, gateway); err == nil {
		base = u
	}
	list := got.Device.collect(nil, base, gateway, 0)
	if len(list) == 0 {
		return nil, errNoService
	}
	order := []string{wanIP2, wanIP1, wanPPP}
	slices.SortStableFunc(list, func(x, y service) int {
		return slices.Index(order, x.kind) - slices.Index(order, y.kind)
	})
	return list, nil
}

// collect adds the services of a device and of those in it.
func (d *device) collect(list []service, base *url.URL, gateway netip.Addr, depth int) []service {
	if depth == maxDepth {
		return list
	}
	for _, s := range d.Services {
		if len(list) == maxServices || s.Type != wanIP2 && s.Type != wanIP1 && s.Type != wanPPP {
			continue
		}
		if u, err := routerURL(base, s.Control, gateway); err == nil {
			list = append(list, service{s.Type, u})
		}
	}
	for i := range d.Devices {
		list = d.Devices[i].collect(list, base, gateway, depth+1)
	}
	return list
}
