package tun

import (
	"bufio"
	"errors"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
)

// startHelper runs the test binary as another process in the namespace, and
// returns the line it prints.
func startHelper(t *testing.T, s *space, what, name string, attr *syscall.SysProcAttr) (*exec.Cmd, string) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), helperEnv+"="+what, helperName+"="+name)
	cmd.Stderr, cmd.SysProcAttr = os.Stderr, attr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	s.do(t, cmd.Start)
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("helper: %v", err)
	}
	return cmd, strings.TrimSpace(line)
}

func TestTakenByAnotherProcess(t *testing.T) {
	s := newSpace(t)
	name := linkName()
	cmd, line := startHelper(t, s, "hold", name, nil)
	if line != "open" {
		t.Fatalf("helper: %s", line)
	}
	pid := "pid " + strconv.Itoa(cmd.Process.Pid)

	if err := tryOpen(t, s, name, 0); !errors.Is(err, ErrInterfaceTaken) || !strings.Contains(err.Error(), pid) {
		t.Errorf("same name: got %v, want %v by %s", err, ErrInterfaceTaken, pid)
	}
	if err := tryOpen(t, s, linkName(), helperPort); !errors.Is(err, ErrPortTaken) || !strings.Contains(err.Error(), pid) {
		t.Errorf("same port: got %v, want %v by %s", err, ErrPortTaken, pid)
	}
	// Another namespace shares nothing but the folder of UAPI sockets.
	other := newSpace(t)
	if err := tryOpen(t, other, name, 0); !errors.Is(err, ErrInterfaceTaken) || !strings.Contains(err.Error(), pid) {
		t.Errorf("same uapi socket: got %v, want %v by %s", err, ErrInterfaceTaken, pid)
	}
	if hasLink(t, other, name) {
		t.Error("a failed Open left its interface")
	}

	// What SIGKILL leaves does not stop the next one.
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if _, err := os.Lstat(uapiFolder + "/" + name + ".sock"); err != nil {
		t.Errorf("the killed process left no socket file, nothing is tested: %v", err)
	}
	if err := tryOpen(t, s, name, helperPort); err != nil {
		t.Errorf("after SIGKILL: %v", err)
	}
}

// The interface's coming up may bring wireguard-go up before it has its port:
// then it is not Up that finds the port taken.
func TestPortTakenWhenUp(t *testing.T) {
	s := newSpace(t)
	d := newNode(t, s, 1)
	taken := listenIn(t, s, "127.0.0.1:0")
	d.config.Port = taken.LocalAddr().(*net.UDPAddr).AddrPort().Port()
	var err error
	s.do(t, func() error {
		err = d.listen()
		return nil
	})
	if !errors.Is(err, ErrPortTaken) || !strings.Contains(err.Error(), "pid "+strconv.Itoa(os.Getpid())) {
		t.Errorf("got %v, want %v by this process", err, ErrPortTaken)
	}
}

func TestTakenByLink(t *testing.T) {
	s := newSpace(t)
	bridge := linkName()
	a := netlink.NewLinkAttrs()
	a.Name = bridge
	s.addLink(t, &netlink.Bridge{LinkAttrs: a})
	if err := tryOpen(t, s, bridge, 0); !errors.Is(err, ErrInterfaceTaken) || !strings.Contains(err.Error(), "a bridge interface") {
		t.Errorf("got %v, want %v by a bridge", err, ErrInterfaceTaken)
	}
	persistent := linkName()
	a.Name = persistent
	s.addLink(t, &netlink.Tuntap{LinkAttrs: a, Mode: netlink.TUNTAP_MODE_TUN})
	if err := tryOpen(t, s, persistent, 0); !errors.Is(err, ErrInterfaceTaken) || !strings.Contains(err.Error(), "no running process") {
		t.Errorf("got %v, want %v by nobody's tun", err, ErrInterfaceTaken)
	}
}

func TestOpenWithoutDeviceOrRight(t *testing.T) {
	s := newSpace(t)
	if _, line := startHelper(t, s, "without tun", linkName(), &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}); line != "no tun" {
		t.Errorf("without /dev/net/tun: %s", line)
	}
	nobody := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if _, line := startHelper(t, s, "without right", linkName(), nobody); line != "permission" {
		t.Errorf("without root: %s", line)
	}
}

// tryOpen opens a Device and closes it again.
func tryOpen(t *testing.T, s *space, name string, port uint16) error {
	t.Helper()
	var d *Device
	var opened error
	s.do(t, func() error {
		d, opened = Open(Config{Name: name, PrivateKey: newKey(t), Port: port, MTU: 1400})
		return nil
	})
	if opened != nil {
		return opened
	}
	return d.Close()
}

func hasLink(t *testing.T, s *space, name string) (found bool) {
	t.Helper()
	s.do(t, func() error {
		_, err := netlink.LinkByName(name)
		found = err == nil
		return nil
	})
	return found
}
