package natlab

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/crypto/ssh"
)

const (
	sshdStartWait = 10 * time.Second
	sshdPoll      = 20 * time.Millisecond
	sshdPID       = "/run/sshd.pid"
)

// sshdConfig needs, in order, the paths of the host key and of the
// authorised keys.
const sshdConfig = `Port 22
AddressFamily any
HostKey %s
PidFile ` + sshdPID + `
AuthorizedKeysFile %s
StrictModes no
UsePAM no
UseDNS no
PasswordAuthentication no
PermitRootLogin prohibit-password
`

// sshConfig is every host's ~/.ssh/config; it needs the path of the known
// hosts, which are listed by host name: connect with HostKeyAlias.
const sshConfig = `Host *
	BatchMode yes
	ConnectTimeout 10
	StrictHostKeyChecking yes
	GlobalKnownHostsFile none
	UserKnownHostsFile %s
`

// shadow lets sshd accept a key for root where the machine has root locked.
const shadow = "root:*:19000:0:99999:7:::\nsshd:!:19000::::::\n"

// clientKey is the one key all hosts of a lab log in with.
type clientKey struct{ private, public []byte }

func newClientKey() (clientKey, error) {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return clientKey{}, fmt.Errorf("make ssh key: %w", err)
	}
	block, err := ssh.MarshalPrivateKey(private, "natlab")
	if err != nil {
		return clientKey{}, fmt.Errorf("encode ssh key: %w", err)
	}
	line, err := ssh.NewPublicKey(public)
	if err != nil {
		return clientKey{}, fmt.Errorf("encode ssh key: %w", err)
	}
	return clientKey{pem.EncodeToMemory(block), ssh.MarshalAuthorizedKey(line)}, nil
}

func (l *Lab) knownHosts() string { return filepath.Join(l.dir, "known_hosts") }

// installKeys gives a host the means to log in to the others.
func (l *Lab) installKeys(n *node) error {
	dir := filepath.Join(n.dir, "root", ".ssh")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("make ssh folder of %s: %w", n.name, err)
	}
	return writeFiles(dir, map[string]string{
		"id_ed25519":      string(l.keys.private),
		"authorized_keys": string(l.keys.public),
		"config":          fmt.Sprintf(sshConfig, l.knownHosts()),
	})
}

func writeFiles(dir string, files map[string]string) error {
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
	}
	return nil
}

// StartSSHD runs the system's sshd on every address of the host, those that
// come later included, and returns when it listens. Root of every host of the
// lab may log in: ssh -o HostKeyAlias=NAME ADDRESS.
func (h *Host) StartSSHD(ctx context.Context) error {
	key, err := newClientKey()
	if err != nil {
		return err
	}
	dir := filepath.Join(h.dir, "sshd")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("make sshd folder of %s: %w", h.name, err)
	}
	err = writeFiles(dir, map[string]string{
		"host_key": string(key.private),
		"shadow":   shadow,
		"config":   fmt.Sprintf(sshdConfig, filepath.Join(dir, "host_key"), "/root/.ssh/authorized_keys"),
	})
	if err != nil {
		return err
	}
	if err := h.lab.trust(h.name, key.public); err != nil {
		return err
	}
	var s script
	s.add("mkdir -p /run/sshd")
	s.add("mount --bind '%s/shadow' /etc/shadow", dir)
	if err := h.sh(ctx, s); err != nil {
		return err
	}
	return h.runSSHD(ctx, filepath.Join(dir, "config"))
}

func (l *Lab) trust(name string, public []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	f, err := os.OpenFile(l.knownHosts(), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("open known hosts: %w", err)
	}
	defer f.Close()
	if _, err := fmt.Fprintf(f, "%s %s", name, public); err != nil {
		return fmt.Errorf("write known hosts: %w", err)
	}
	return nil
}

func (h *Host) runSSHD(ctx context.Context, config string) error {
	sshd, err := h.Start(context.WithoutCancel(ctx), nil, "/usr/sbin/sshd", "-D", "-e", "-f", config)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, sshdStartWait)
	defer cancel()
	tick := time.NewTicker(sshdPoll)
	defer tick.Stop()
	for {
		// sshd writes its pid file once it listens.
		if _, err := os.Stat(fmt.Sprintf("/proc/%d/root%s", h.pid, sshdPID)); err == nil {
			return nil
		}
		select {
		case <-sshd.done:
			return fmt.Errorf("sshd on %s ended: %s", h.name, sshd.tail())
		case <-ctx.Done():
			return fmt.Errorf("wait for sshd on %s: %w: %s", h.name, ctx.Err(), sshd.tail())
		case <-tick.C:
		}
	}
}
