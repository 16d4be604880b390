package tun

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
)

// checkName refuses names that the kernel would refuse, or expand ("wg%d"), or
// that are no file name for the UAPI socket.
func checkName(name string) error {
	const longest = 15 // IFNAMSIZ with its final zero
	if name == "" || len(name) > longest || name == "." || name == ".." || strings.ContainsAny(name, "/%: \t\n") {
		return fmt.Errorf("interface name %q: not 1 to %d characters without space, slash, colon and percent sign", name, longest)
	}
	return nil
}

// CheckInterface fails, as Open would, when the name is not usable or an
// interface has it.
func CheckInterface(name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	return checkFree(name)
}

// checkFree fails when an interface of that name exists. CreateTUN cannot tell:
// it would take over a persistent TUN without a word.
func checkFree(name string) error {
	l, err := netlink.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for interface %s: %w", name, err)
	}
	return fmt.Errorf("interface %q: %w by %s", name, ErrInterfaceTaken, occupant(l))
}

func occupant(l netlink.Link) string {
	name := l.Attrs().Name
	if !isTUN(l) {
		return "a " + l.Type() + " interface"
	}
	if by := findProcess(func(proc string) bool { return sameNetwork(proc) && holdsTUN(proc, name) }); by != "" {
		return "the tun device of " + by
	}
	return "a tun device that no running process holds"
}

// portOwner names the process bound to the UDP port, " by pid 812 (wg)", or
// returns nothing when it cannot be found.
func portOwner(port uint16) string {
	sockets := make(map[string]bool)
	for _, table := range []string{"udp", "udp6"} {
		b, err := os.ReadFile("/proc/thread-self/net/" + table)
		if err != nil {
			continue
		}
		for inode := range udpInodes(b, port) {
			sockets["socket:["+inode+"]"] = true
		}
	}
	by := findProcess(func(proc string) bool {
		files, err := os.ReadDir(filepath.Join(proc, "fd"))
		if err != nil {
			return false
		}
		for _, f := range files {
			if to, err := os.Readlink(filepath.Join(proc, "fd", f.Name())); err == nil && sockets[to] {
				return true
			}
		}
		return false
	})
	if by == "" {
		return ""
	}
	return " by " + by
}

// udpInodes reads a table in the format of /proc/net/udp and yields the inodes
// of the sockets bound to port:
//
//	sl  local_address rem_address st tx:rx tr:tm retrnsmt uid timeout inode …
//	7:  00000000:0D96 00000000:0000 07 …
func udpInodes(table []byte, port uint16) map[string]bool {
	const localField, inodeField = 1, 9
	list := make(map[string]bool)
	for s := bufio.NewScanner(bytes.NewReader(table)); s.Scan(); {
		f := strings.Fields(s.Text())
		if len(f) <= inodeField {
			continue
		}
		_, hex, _ := strings.Cut(f[localField], ":")
		if n, err := strconv.ParseUint(hex, 16, 16); err == nil && uint16(n) == port {
			list[f[inodeField]] = true
		}
	}
	return list
}

// findProcess returns "pid 812 (wg)" for the first process whose /proc folder
// matches.
func findProcess(match func(proc string) bool) string {
	procs, err := filepath.Glob("/proc/[1-9]*")
	if err != nil {
		return ""
	}
	for _, proc := range procs {
		if match(proc) {
			return describeProcess(filepath.Base(proc))
		}
	}
	return ""
}

func describeProcess(pid string) string {
	comm, err := os.ReadFile(filepath.Join("/proc", pid, "comm"))
	if err != nil {
		return "pid " + pid
	}
	return fmt.Sprintf("pid %s (%s)", pid, strings.TrimSpace(string(comm)))
}

// sameNetwork tells whether the process lives in this thread's network
// namespace: interface names mean nothing across them.
func sameNetwork(proc string) bool {
	ours, err1 := os.Readlink("/proc/thread-self/ns/net")
	theirs, err2 := os.Readlink(filepath.Join(proc, "ns/net"))
	return err1 == nil && err2 == nil && ours == theirs
}
