package main

import (
	"bytes"
	"compress/gzip"
	"os"
	"path/filepath"
	"runtime/pprof"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// ownProfile is a profile of this program doing checksums.
func ownProfile(t *testing.T) []byte {
	t.Helper()
	var out bytes.Buffer
	if err := pprof.StartCPUProfile(&out); err != nil {
		t.Skip("SKIP: somebody profiles the tests:", err)
	}
	sum, b := uint16(0), make([]byte, 1<<16)
	// So much time of a processor, which takes longer beside other work.
	for start, began := cpuTime(t), time.Now(); cpuTime(t)-start < 300*time.Millisecond && time.Since(began) < 10*time.Second; {
		for range 100 {
			sum += checksum(b)
		}
	}
	pprof.StopCPUProfile()
	t.Log(sum)
	return out.Bytes()
}

// cpuTime is what this process has used.
func cpuTime(t *testing.T) time.Duration {
	t.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano())
}

func TestReadProfile(t *testing.T) {
	text := ownProfile(t)
	stacks, err := readProfile(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	var all, here int64
	raced := false // the race detector's own functions have no callers
	for _, s := range stacks {
		all += s.nanos
		raced = raced || len(s.frames) > 0 && strings.HasPrefix(s.frames[0].function, "__tsan")
		for _, f := range s.frames {
			if strings.HasSuffix(f.function, ".checksum") && strings.HasSuffix(f.file, "ping.go") {
				here += s.nanos
				break
			}
		}
	}
	if all == 0 || here == 0 || !raced && float64(here) < 0.5*float64(all) {
		t.Errorf("%d of %d ns were found in checksum", here, all)
	}
	name := filepath.Join(t.TempDir(), "a.pprof")
	if err := os.WriteFile(name, text, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := sharesOf(name)
	if err != nil || s.all <= 0 || !raced && !strings.HasSuffix(s.top()[0], "checksum") && !strings.Contains(s.top()[0], "Uint16") {
		t.Errorf("%+v, %v", s, err)
	}
}

func TestReadProfileRefuses(t *testing.T) {
	if _, err := readProfile(strings.NewReader("no profile")); err == nil {
		t.Error("what is not packed passes")
	}
	unzipped, err := gzip.NewReader(bytes.NewReader(ownProfile(t)))
	if err != nil {
		t.Fatal(err)
	}
	var whole bytes.Buffer
	if _, err := whole.ReadFrom(unzipped); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string][]byte{
		"cut":              whole.Bytes()[:whole.Len()-3],
		"sample of no one": {profileSample<<3 | 2, 2, sampleValues << 3, 1},
		"bad kind":         {profileSample<<3 | 7},
		"too long":         {profileStrings<<3 | 2, 200, 1, 'x'},
	} {
		var packed bytes.Buffer
		w := gzip.NewWriter(&packed)
		if _, err := w.Write(text); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if got, err := readProfile(&packed); err == nil {
			t.Errorf("%s: %d stacks", name, len(got))
		}
	}
}

func TestGroupOf(t *testing.T) {
	const wg = "golang.zx2c4.com/wireguard"
	for _, c := range []struct {
		want   group
		frames []frame
	}{
		{groupCrypto, []frame{{"golang.org/x/crypto/chacha20poly1305.chacha20Poly1305Seal", ""}, {wg + "/device.(*Device).RoutineEncryption", ""}}},
		{groupTUN, []frame{
			{"internal/runtime/syscall/linux.Syscall6", ""},
			{"syscall.Syscall", ""},
			{"overlay/tun.(*writer).writev", "overlay/tun/tunnel_write.go"},
			{wg + "/device.(*Peer).RoutineSequentialReceiver", ""},
		}},
		{groupTUN, []frame{{"syscall.read", ""}, {"internal/poll.(*FD).Read", ""}, {"os.(*File).Read", "os/file.go"}, {wg + "/tun.(*NativeTun).Read", ""}}},
		{groupUDP, []frame{{"syscall.RawSyscall6", ""}, {"overlay/tun.(*train).sendmmsg", "overlay/tun/bind_send.go"}}},
		{groupUDP, []frame{{"syscall.Syscall6", ""}, {"golang.org/x/sys/unix.recvmsg", ""}, {"net.(*UDPConn).ReadMsgUDP", ""}}},
		{groupSchedule, []frame{{"internal/runtime/syscall/linux.Syscall6", ""}, {"internal/runtime/syscall/linux.EpollWait", ""}, {"runtime.netpoll", ""}}},
		{groupSchedule, []frame{{"runtime.casgstatus", ""}, {"runtime.mstart", ""}}},
		{groupSchedule, []frame{{"runtime.futex", ""}, {"runtime.futexwakeup", ""}, {"overlay/tun.(*tunnel).Read", "overlay/tun/tunnel.go"}}},
		{groupChecksum, []frame{{"overlay/tun.sum", "overlay/tun/checksum.go"}, {"overlay/tun.(*split).next", "overlay/tun/split.go"}}},
		{groupCopy, []frame{{"runtime.memmove", ""}, {"overlay/tun.(*split).next", "overlay/tun/split.go"}}},
		{groupMemory, []frame{{"runtime.nextFreeFast", ""}, {"runtime.mallocgc", ""}, {wg + "/device.(*Device).NewInboundElement", ""}}},
		{groupMemory, []frame{{"runtime.scanobject", ""}, {"runtime.gcBgMarkWorker", ""}}},
		{groupBind, []frame{{"overlay/tun.(*receiver).deliver", "overlay/tun/bind_receive.go"}}},
		{groupTunnel, []frame{{"overlay/tun.(*reader).cut", "overlay/tun/tunnel_read.go"}, {wg + "/device.(*Device).RoutineReadFromTUN", ""}}},
		{groupDevice, []frame{{"runtime.mapaccess2", ""}, {wg + "/device.(*IndexTable).Lookup", ""}}},
		{groupOther, []frame{{"overlay/overlay.(*Node).Run", "overlay/overlay/node.go"}}},
	} {
		if got := groupOf(stack{frames: c.frames}); got != c.want {
			t.Errorf("%v is %s, not %s", c.frames[0], got, c.want)
		}
	}
}
