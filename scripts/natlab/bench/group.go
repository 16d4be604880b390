package main

import "strings"

// group is a kind of work.
type group string

const (
	groupCrypto   group = "crypto"
	groupTUN      group = "tun syscalls"
	groupUDP      group = "udp syscalls"
	groupCopy     group = "copies"
	groupChecksum group = "checksum"
	groupSchedule group = "scheduling, locks"
	groupMemory   group = "allocation, pools, GC"
	groupDevice   group = "device"
	groupBind     group = "bind"
	groupTunnel   group = "tunnel"
	groupOther    group = "other"
)

// groups are in the order of the table.
func groups() []group {
	return []group{
		groupCrypto, groupTUN, groupUDP, groupCopy, groupChecksum, groupSchedule,
		groupMemory, groupDevice, groupBind, groupTunnel, groupOther,
	}
}

// groupOf names the work a stack was found at: the innermost frame that says
// it. A system call is named by who makes it.
func groupOf(s stack) group {
	syscall := false
	onlyRuntime := true
	for _, f := range s.frames {
		if isSyscall(f.function) {
			syscall = true
			continue
		}
		g := f.group()
		switch {
		case g == "":
			onlyRuntime = onlyRuntime && isRuntime(f.function)
		case !syscall:
			return g
		case g == groupTunnel:
			return groupTUN
		case g == groupBind:
			return groupUDP
		case g == groupSchedule:
			return g // futex, epoll and sleep
		}
	}
	if onlyRuntime && !syscall {
		return groupSchedule
	}
	return groupOther
}

func isSyscall(function string) bool {
	return strings.HasPrefix(function, "syscall.") || strings.HasPrefix(function, "golang.org/x/sys/unix.") ||
		strings.HasPrefix(function, "internal/runtime/syscall") || strings.HasPrefix(function, "runtime/internal/syscall") ||
		strings.HasPrefix(function, "internal/poll.") || function == "runtime.entersyscall" || function == "runtime.exitsyscall"
}

func isRuntime(function string) bool {
	return strings.HasPrefix(function, "runtime.") || strings.HasPrefix(function, "internal/runtime/")
}

// group is what one frame says by itself; empty is nothing.
func (f frame) group() group {
	for _, rule := range rules() {
		for _, part := range rule.parts {
			if strings.HasPrefix(f.function, part) || strings.Contains(f.file, part) {
				return rule.group
			}
		}
	}
	return ""
}

// rule says what beginnings of function names, or parts of the names of files,
// mean.
type rule struct {
	group group
	parts []string
}

// rules are tried in order.
func rules() []rule {
	const wireguard = "golang.zx2c4.com/wireguard"
	return []rule{
		{groupCrypto, []string{"golang.org/x/crypto/", "crypto/", "vendor/golang.org/x/crypto/"}},
		{groupChecksum, []string{"/tun/checksum.go", wireguard + "/tun.checksum"}},
		{groupCopy, []string{"runtime.memmove", "runtime.typedmemmove"}},
		{groupMemory, []string{
			"runtime.mallocgc", "runtime.gc", "runtime.bgsweep", "runtime.bgscavenge", "runtime.memclr", "runtime.growslice",
			"runtime.newobject", "runtime.makeslice", "runtime.(*mheap)", "runtime.(*mcache)", "runtime.(*mspan)",
			"runtime.wbBuf", "runtime.madvise", "sync.(*Pool)", "sync.runtime_procPin", wireguard + "/device.(*WaitPool)",
		}},
		{groupSchedule, []string{
			"runtime.futex", "runtime.epoll", "runtime.netpoll", "runtime.usleep", "runtime.osyield", "runtime.nanosleep", "runtime.lock",
			"runtime.unlock", "runtime.chan", "runtime.selectgo", "runtime.gopark", "runtime.goready", "runtime.ready", "runtime.schedule",
			"runtime.findRunnable", "runtime.mcall", "runtime.park_m", "runtime.sem", "runtime.note", "runtime.wake", "runtime.sysmon",
			"runtime.sysUsed", "sync.", "internal/sync.", "internal/runtime/syscall.Epoll",
		}},
		{groupBind, []string{
			"/tun/bind", "/tun/endpoint.go", "/tun/fragment", "/tun/loss.go", wireguard + "/conn.", "golang.org/x/net/", "net.",
		}},
		{groupDevice, []string{wireguard + "/device.", wireguard + "/replay.", wireguard + "/ratelimiter."}},
		{groupTunnel, []string{"overlay/tun.", "overlay/tun/filter.", wireguard + "/tun.", "os."}},
	}
}
