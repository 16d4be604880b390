package portmap

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// igd is a UPnP router on loopback.
type igd struct {
	*httptest.Server
	addr netip.Addr

	mu        sync.Mutex
	kind      string // of its service
	external  string
	permanent bool           // only leases for ever
	taken     map[string]int // outer ports of others: error code
	entries   map[string][]string
	silent    bool // on SSDP
	redirect  bool
	long      bool // the description
	location  string
	actions   []string
}

func newIGD(t *testing.T) *igd {
	t.Helper()
	g := &igd{
		addr: loopback(), kind: wanIP1, external: outer().String(),
		taken: map[string]int{}, entries: map[string][]string{},
	}
	g.Server = httptest.NewUnstartedServer(g)
	l, err := net.Listen("tcp4", netip.AddrPortFrom(g.addr, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	_ = g.Listener.Close()
	g.Listener = l
	g.Start()
	t.Cleanup(g.Close)
	conn, err := net.ListenUDP("udp4", udpAddr(g.addr, ssdpPort))
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() { g.answerSearches(conn) })
	t.Cleanup(func() {
		_ = conn.Close()
		serving.Wait()
	})
	return g
}

func (g *igd) route() Route { return Route{Gateway: g.addr, Local: local()} }

func (g *igd) set(change func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	change()
}

const searchAnswer = "HTTP/1.1 200 OK\r\nCACHE-CONTROL: max-age=120\r\nST: urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\n" +
	"USN: uuid:1::urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\nEXT:\r\nSERVER: x\r\nLOCATION: %s\r\nBOOTID.UPNP.ORG: 7\r\n\r\n"

func (g *igd) answerSearches(conn *net.UDPConn) {
	b := make([]byte, 2048)
	for {
		_, from, err := conn.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		g.mu.Lock()
		location := g.location
		if location == "" {
			location = g.URL + "/desc.xml"
		}
		silent := g.silent
		g.mu.Unlock()
		if !silent {
			_, _ = conn.WriteToUDPAddrPort(fmt.Appendf(nil, searchAnswer, location), from)
		}
	}
}

const testDescription = `<?xml version="1.0"?>
<root xmlns="urn:schemas-upnp-org:device-1-0"><specVersion><major>1</major><minor>0</minor></specVersion>
<device><deviceType>urn:schemas-upnp-org:device:InternetGatewayDevice:1</deviceType>
<serviceList><service><serviceType>urn:schemas-upnp-org:service:Layer3Forwarding:1</serviceType><controlURL>/l3</controlURL></service></serviceList>
<deviceList><device><deviceList><device>
<serviceList><service><serviceType>%s</serviceType><controlURL>/ctl</controlURL></service></serviceList>
</device></deviceList></device></deviceList></device></root>`

func (g *igd) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.redirect && r.URL.Path != "/other":
		http.Redirect(w, r, "/other", http.StatusFound)
	case r.URL.Path == "/desc.xml" || r.URL.Path == "/other":
		if g.long {
			_, _ = io.WriteString(w, "<!--"+strings.Repeat(" ", maxXML)+"-->")
		}
		fmt.Fprintf(w, testDescription, g.kind)
	case r.URL.Path == "/ctl":
		g.act(w, r)
	default:
		http.NotFound(w, r)
	}
}

// act performs an action as a router does.
func (g *igd) act(w http.ResponseWriter, r *http.Request) {
	_, action, _ := strings.Cut(strings.Trim(r.Header.Get("Soapaction"), `"`), "#")
	g.actions = append(g.actions, action)
	body, _ := io.ReadAll(r.Body)
	args := arguments(body)
	port := args["NewExternalPort"]
	fail := func(code int) {
		w.WriteHeader(http.StatusInternalServerError)
		fmt.Fprintf(w, `<?xml version="1.0"?><s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"><s:Body><s:Fault><faultcode>s:Client</faultcode>`+
			`<faultstring>UPnPError</faultstring><detail><UPnPError xmlns="urn:schemas-upnp-org:control-1-0"><errorCode>%d</errorCode></UPnPError></detail></s:Fault></s:Body></s:Envelope>`, code)
	}
	say := func(text string) {
		fmt.Fprintf(w, `<?xml version="1.0"?><s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"><s:Body><u:%sResponse xmlns:u=%q>%s</u:%[1]sResponse></s:Body></s:Envelope>`,
			action, g.kind, text)
	}
	switch action {
	case "GetExternalIPAddress":
		say("<NewExternalIPAddress>" + g.external + "</NewExternalIPAddress>")
	case "AddAnyPortMapping", "AddPortMapping":
		switch code := g.taken[port]; {
		case action == "AddAnyPortMapping" && g.kind != wanIP2:
			fail(upnpInvalidAction)
		case g.permanent && args["NewLeaseDuration"] != "0":
			fail(upnpPermanentOnly)
		case code != 0 && action == "AddPortMapping":
			fail(code)
		case code != 0:
			port = "7000"
			fallthrough
		default:
			g.entries[port] = []string{args["NewInternalClient"], args["NewInternalPort"]}
			if action == "AddAnyPortMapping" {
				say("<NewReservedPort>" + port + "</NewReservedPort>")
			} else {
				say("")
			}
		}
	case "GetSpecificPortMappingEntry":
		if e, ok := g.entries[port]; ok {
			say("<NewInternalPort>" + e[1] + "</NewInternalPort><NewInternalClient>" + e[0] + "</NewInternalClient>")
		} else {
			fail(upnpNoSuchEntry)
		}
	case "DeletePortMapping":
		delete(g.entries, port)
		say("")
	default:
		fail(upnpInvalidAction)
	}
}

// arguments are the elements of an action.
func arguments(body []byte) map[string]string {
	args, name := map[string]string{}, ""
	for d := xml.NewDecoder(bytes.NewReader(body)); ; {
		token, err := d.Token()
		if err != nil {
			return args
		}
		switch x := token.(type) {
		case xml.StartElement:
			name = x.Name.Local
		case xml.CharData:
			args[name] = string(x)
		}
	}
}

func TestUPnP(t *testing.T) {
	for _, kind := range []string{wanIP1, wanIP2, wanPPP} {
		t.Run(kind, func(t *testing.T) {
			g := newIGD(t)
			g.set(func() { g.kind = kind })
			u := newUPnP(g.route(), testPort, "test")
			if err := u.find(timely(t)); err != nil {
				t.Fatal(err)
			}
			got := mustAsk(t, u, netip.AddrPortFrom(outer(), testPort))
			mustAsk(t, u, netip.AddrPortFrom(outer(), testPort))
			mustBe(t, u, got, true)
			g.set(func() { g.external = "203.0.113.8" })
			mustBe(t, u, got, false)
			g.set(func() { g.external = outer().String() })
			if err := u.remove(timely(t), got); err != nil {
				t.Fatal(err)
			}
			mustBe(t, u, got, false)
			g.set(func() {
				g.entries[strconv.Itoa(testPort)] = []string{"192.168.1.66", strconv.Itoa(testPort)}
			})
			mustBe(t, u, got, false)
		})
	}
}

// What routers object to is said in other words.
func TestUPnPObjections(t *testing.T) {
	port := strconv.Itoa(testPort)
	for _, kind := range []string{wanIP1, wanIP2} {
		g := newIGD(t)
		g.set(func() { g.kind, g.permanent, g.taken[port] = kind, true, upnpConflict })
		u := newUPnP(g.route(), testPort, "test")
		if err := u.find(timely(t)); err != nil {
			t.Fatal(err)
		}
		got, err := u.ask(timely(t), wanted())
		if err != nil {
			t.Fatal(err)
		}
		if got.external.Port() == testPort || got.external.Addr() != outer() || got.lifetime != lifetime {
			t.Errorf("%s: %+v", kind, got)
		}
		if kind == wanIP2 && got.external.Port() != 7000 {
			t.Errorf("the port that the router chose is not taken: %v", got.external)
		}
		mustBe(t, u, got, true)
	}
	g := newIGD(t)
	g.set(func() { g.taken[port] = 606 })
	u := newUPnP(g.route(), testPort, "test")
	if err := u.find(timely(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := u.ask(timely(t), wanted()); !isRefusal(err) || len(g.entries) > 0 {
		t.Errorf("not authorized gives %v", err)
	}
	for _, none := range []string{"", "0.0.0.0", "x", "127.0.0.1", "255.255.255.255"} {
		g.set(func() { g.external = none })
		if _, err := u.ask(timely(t), wanted()); !errors.Is(err, errExternal) {
			t.Errorf("outer address %q gives %v", none, err)
		}
	}
}

func TestUPnPRefusesWhatLeadsElsewhere(t *testing.T) {
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		t.Error("another host was asked")
	}))
	defer other.Close()
	for name, change := range map[string]func(*igd){
		"location elsewhere": func(g *igd) { g.location = other.URL },
		"https":              func(g *igd) { g.location = strings.Replace(g.URL, "http:", "https:", 1) },
		"a name":             func(g *igd) { g.location = "http://localhost:1/" },
		"redirect":           func(g *igd) { g.redirect = true },
		"too long":           func(g *igd) { g.long = true },
		"no service":         func(g *igd) { g.kind = "urn:schemas-upnp-org:service:Printing:1" },
		"silent":             func(g *igd) { g.silent = true },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := newIGD(t)
			g.set(func() { change(g) })
			if err := newUPnP(g.route(), testPort, "test").find(timely(t)); err == nil {
				t.Error("found")
			}
		})
	}
}

// Another host of the network that answers a search is not listened to, even
// when it names the router.
func TestSearchAnswersOfOthers(t *testing.T) {
	g := newIGD(t)
	g.set(func() { g.silent = true })
	conn, err := net.ListenUDP("udp4", udpAddr(local(), 0))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	stop := make(chan struct{})
	var forging sync.WaitGroup
	forging.Go(func() {
		for port := 32768; ; port++ { // wherever the search is sent from
			select {
			case <-stop:
				return
			default:
			}
			if port > 60999 {
				port = 32768
			}
			_, _ = conn.WriteToUDPAddrPort(fmt.Appendf(nil, searchAnswer, g.URL+"/desc.xml"), netip.AddrPortFrom(local(), uint16(port)))
		}
	})
	_, err = search(timely(t), g.route())
	close(stop)
	forging.Wait()
	if !errors.Is(err, errNoDevice) {
		t.Errorf("search gives %v", err)
	}
}

func TestRouterURL(t *testing.T) {
	gateway := netip.MustParseAddr("192.168.1.1")
	base, err := url.Parse("http://192.168.1.1:5000/a/desc.xml")
	if err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]string{
		"http://192.168.1.1/":         "http://192.168.1.1/",
		" http://192.168.1.1:80/x ":   "http://192.168.1.1:80/x",
		"/ctl":                        "http://192.168.1.1:5000/ctl",
		"ctl":                         "http://192.168.1.1:5000/a/ctl",
		"http://192.168.1.2/":         "",
		"//192.168.1.2/x":             "",
		"https://192.168.1.1/":        "",
		"ftp://192.168.1.1/":          "",
		"http://u:p@192.168.1.1/":     "",
		"http://192.168.1.1.example/": "",
		"http://[::1]/":               "",
		"http://192.168.1.1/" + strings.Repeat("x", maxURL): "",
		"http://192.168.1.1:99999999/\x7f":                  "",
	} {
		u, err := routerURL(base, text, gateway)
		if got := fmt.Sprint(u); err == nil && got != want || err != nil && want != "" {
			t.Errorf("%q gives %q, %v", text, got, err)
		}
	}
}

func FuzzSSDP(f *testing.F) {
	gateway := netip.MustParseAddr("192.168.1.1")
	f.Add(fmt.Appendf(nil, searchAnswer, "http://192.168.1.1:5000/desc.xml"))
	f.Add([]byte("NOTIFY * HTTP/1.1\r\nHOST: 239.255.255.250:1900\r\nNT: urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\nNTS: ssdp:alive\r\n" +
		"LOCATION: http://192.168.1.1:5000/d\r\nBOOTID.UPNP.ORG: 1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, parse := range []func([]byte, netip.Addr) (beacon, error){parseSearchAnswer, parseNotify} {
			if got, err := parse(b, gateway); err == nil && (got.location.Hostname() != gateway.String() || got.location.Scheme != "http") {
				t.Errorf("%q leads to %v", b, got.location)
			}
		}
	})
}

func FuzzDescription(f *testing.F) {
	gateway := netip.MustParseAddr("192.168.1.1")
	at := &url.URL{Scheme: "http", Host: "192.168.1.1:5000", Path: "/desc.xml"}
	f.Add(fmt.Appendf(nil, testDescription, wanIP2))
	f.Add([]byte(`<?xml version="1.0" encoding="ISO-8859-1"?><root><URLBase>http://192.168.1.9/</URLBase><device><serviceList><service>` +
		`<serviceType>urn:schemas-upnp-org:service:WANPPPConnection:1</serviceType><controlURL>http://192.168.1.1/x</controlURL></service></serviceList></device></root>`))
	f.Fuzz(func(t *testing.T, b []byte) {
		list, err := parseDescription(bytes.NewReader(b), at, gateway)
		if err == nil && (len(list) == 0 || len(list) > maxServices) {
			t.Errorf("%d services", len(list))
		}
		for _, s := range list {
			if s.control.Hostname() != gateway.String() || s.control.Scheme != "http" {
				t.Errorf("%q leads to %v", b, s.control)
			}
		}
	})
}

// canned answers every request with the same bytes.
type canned struct {
	status int
	body   []byte
}

func (c canned) RoundTrip(*http.Request) (*http.Response, error) {
	return &http.Response{
		StatusCode: c.status, Status: strconv.Itoa(c.status), Header: http.Header{}, ContentLength: int64(len(c.body)),
		Body: io.NopCloser(bytes.NewReader(c.body)),
	}, nil
}

func FuzzSOAP(f *testing.F) {
	for _, body := range []string{
		`<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"><s:Body><u:AddAnyPortMappingResponse xmlns:u="x"><NewReservedPort>7</NewReservedPort></u:AddAnyPortMappingResponse></s:Body></s:Envelope>`,
		`<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"><s:Body><u:R xmlns:u="x"><NewExternalIPAddress>203.0.113.7</NewExternalIPAddress><NewInternalPort>41641</NewInternalPort><NewInternalClient>127.0.0.1</NewInternalClient></u:R></s:Body></s:Envelope>`,
		`<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"><s:Body><s:Fault><detail><UPnPError><errorCode>725</errorCode></UPnPError></detail></s:Fault></s:Body></s:Envelope>`,
	} {
		f.Add(200, []byte(body))
		f.Add(500, []byte(body))
	}
	f.Fuzz(func(t *testing.T, status int, body []byte) {
		u := newUPnP(Route{Gateway: loopback(), Local: local()}, testPort, "test")
		u.client = &http.Client{Transport: bounded{canned{status, body}}}
		s := service{wanIP2, &url.URL{Scheme: "http", Host: "127.0.0.1", Path: "/"}}
		u.found, u.used = []service{s}, s
		if got, err := u.ask(t.Context(), wanted()); err == nil && (!got.external.IsValid() || got.lifetime <= 0) {
			t.Errorf("granted %+v", got)
		}
		if got, err := u.add(t.Context(), s, wanted()); err == nil && got.external.Port() == 0 {
			t.Errorf("granted %+v", got)
		}
		_, _ = u.alive(t.Context(), grant{netip.AddrPortFrom(outer(), testPort), time.Hour})
	})
}
