package natlab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"time"
)

const (
	proxyProgram  = "tinyproxy"
	proxyPort     = 8888
	proxyUser     = "laptop"
	proxyPassword = "let-me-out"

	proxyStartWait = 10 * time.Second
	proxyPoll      = 20 * time.Millisecond
)

// proxyConfig needs, in order, the port, the router's address in the LAN, the
// LAN, and a line for the user or none.
const proxyConfig = `Port %d
Listen %s
Allow %s
ConnectPort 443
Timeout 600
MaxClients 100
LogLevel Connect
DisableViaHeader Yes
%s
`

// startProxy runs the proxy of the home on its router. Close of the lab ends
// it.
func (h *Home) startProxy(ctx context.Context) error {
	user := ""
	if h.nat == ProxyAuth {
		user = fmt.Sprintf("BasicAuth %s %s", proxyUser, proxyPassword)
	}
	config := filepath.Join(h.dir, "proxy.conf")
	text := fmt.Sprintf(proxyConfig, proxyPort, h.router(), h.lan, user)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return fmt.Errorf("write the proxy's configuration: %w", err)
	}
	log, err := os.Create(filepath.Join(h.dir, "proxy.log"))
	if err != nil {
		return fmt.Errorf("make the proxy's log: %w", err)
	}
	defer log.Close()
	p := &Process{
		cmd: h.command(context.WithoutCancel(ctx), proxyProgram, "-d", "-c", config),
		log: log.Name(), done: make(chan struct{}),
	}
	p.cmd.Stdout, p.cmd.Stderr = log, log
	if err := h.lab.watch(p); err != nil {
		return fmt.Errorf("start the proxy: %w", err)
	}
	h.proxy = p
	return h.awaitProxy(ctx)
}

func (h *Home) awaitProxy(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, proxyStartWait)
	defer cancel()
	tick := time.NewTicker(proxyPoll)
	defer tick.Stop()
	for {
		err := h.inside(func() error {
			c, err := net.Dial("tcp", h.proxyAddr().String())
			if err != nil {
				return err
			}
			return c.Close()
		})
		if err == nil {
			return nil
		}
		select {
		case <-h.proxy.done:
			return fmt.Errorf("the proxy ended: %s", h.proxy.tail())
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("wait for the proxy: %w: %s", ctx.Err(), h.proxy.tail()), err)
		case <-tick.C:
		}
	}
}

func (h *Home) proxyAddr() netip.AddrPort { return netip.AddrPortFrom(h.router(), proxyPort) }

// Proxy is the URL of the home's proxy as programs want it, with the password
// where it needs one; nil where the home has none.
func (h *Home) Proxy() *url.URL {
	if !h.nat.proxied() {
		return nil
	}
	u := &url.URL{Scheme: "http", Host: h.proxyAddr().String()}
	if h.nat == ProxyAuth {
		u.User = url.UserPassword(proxyUser, proxyPassword)
	}
	return u
}
