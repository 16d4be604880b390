package tun

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// How the number of processors is chosen.
const (
	procsInterval = 250 * time.Millisecond
	procsSamples  = 2 // that must agree on a change
	// procsHold is how many samples pass before a processor that was taken away
	// because the machine was full is tried again.
	procsHold = 40

	statPath  = "/proc/stat"
	statSize  = 512 // bytes read of it: the first line, of at most 10 numbers
	statTicks = 100 // per second, for programs on every architecture of ours
)

var errStat = errors.New("parse " + statPath + ": not as expected")

// procs adapts the number of processors that run Go code (GOMAXPROCS) to load:
// one is faster as long as it suffices, because no cache line and no wake-up
// goes between two. GOMAXPROCS belongs to the whole process: a program has one
// procs at most, and close puts the number back. A nil procs does nothing. Safe
// for concurrent use.
type procs struct {
	base time.Time
	next atomic.Int64 // of the next sample, ns since base
	log  *slog.Logger

	mu     sync.Mutex
	stat   *os.File // nil: closed
	line   [statSize]byte
	last   spent
	pace   pace
	before int // GOMAXPROCS, to be put back
}

// spent is what was used until a moment.
type spent struct {
	at   time.Duration
	own  time.Duration // processor time of this process
	idle time.Duration // of all the machine's processors
}

// newProcs starts with one processor. It returns nil where the number is not
// ours to choose: there is only one, or the environment says how many.
func newProcs(log *slog.Logger) *procs {
	before := runtime.GOMAXPROCS(0) // processors, or the quota of a container
	if before == 1 || os.Getenv("GOMAXPROCS") != "" {
		return nil
	}
	stat, err := os.Open(statPath)
	if err != nil {
		log.Debug("processors stay as they are", "number", before, "err", err)
		return nil
	}
	p := &procs{base: time.Now(), log: log, stat: stat, pace: pace{now: 1, most: before}, before: before}
	if p.last, err = p.measure(); err != nil {
		log.Debug("processors stay as they are", "number", before, "err", err)
		_ = stat.Close()
		return nil
	}
	p.next.Store(int64(procsInterval))
	runtime.GOMAXPROCS(1)
	return p
}

// sample looks at the load when that was not done for procsInterval. It costs
// one reading of the clock otherwise, and is called where packets pass: without
// packets nothing changes.
func (p *procs) sample() {
	if p == nil {
		return
	}
	now, next := int64(time.Since(p.base)), p.next.Load()
	if now < next || !p.next.CompareAndSwap(next, now+int64(procsInterval)) {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stat == nil {
		return
	}
	s, err := p.measure()
	if err != nil || s.at-p.last.at < procsInterval/2 { // two callers, one held up
		return
	}
	was, took := p.pace.now, (s.at - p.last.at).Seconds()
	own, idle := (s.own-p.last.own).Seconds()/took, (s.idle-p.last.idle).Seconds()/took
	p.last = s
	if n := p.pace.step(own, idle); n != was {
		runtime.GOMAXPROCS(n)
		p.log.Debug("processors change", "number", n, "own", own, "idle", idle)
	}
}

// measure reads the clocks. Call with mu held.
func (p *procs) measure() (spent, error) {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		return spent{}, os.NewSyscallError("getrusage", err)
	}
	n, err := p.stat.ReadAt(p.line[:], 0)
	if n == 0 {
		return spent{}, err
	}
	idle, err := parseIdle(p.line[:n])
	if err != nil {
		return spent{}, err
	}
	return spent{at: time.Since(p.base), own: time.Duration(r.Utime.Nano() + r.Stime.Nano()), idle: idle}, nil
}

// close puts GOMAXPROCS back.
func (p *procs) close() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stat == nil {
		return
	}
	_ = p.stat.Close() // only read
	p.stat = nil
	runtime.GOMAXPROCS(p.before)
}

// parseIdle reads the time the machine's processors had nothing to do, waiting
// for a disk included, from the beginning of /proc/stat:
//
//	cpu  user nice system idle iowait irq softirq steal guest guest_nice
func parseIdle(b []byte) (time.Duration, error) {
	line, _, whole := bytes.Cut(b, []byte("\n"))
	fields := bytes.Fields(line)
	if !whole || len(fields) < 6 || string(fields[0]) != "cpu" {
		return 0, errStat
	}
	var ticks uint64
	for _, f := range fields[4:6] {
		n, err := strconv.ParseUint(string(f), 10, 48)
		if err != nil {
			return 0, errStat
		}
		ticks += n
	}
	return time.Duration(ticks) * (time.Second / statTicks), nil
}

// pace decides on the number of processors.
type pace struct {
	now, most int
	up, down  int // samples in a row that ask for one more, one less
	hold      int // samples during which there is not one more
}

// step takes one sample, in processors: how many this process used, and how many
// the machine had left. It returns the number from now on.
func (p *pace) step(own, idle float64) int {
	n := float64(p.now)
	full := idle < 0.1
	p.hold = max(0, p.hold-1)
	p.up, p.down = p.up+1, p.down+1
	if own <= 0.9*n || idle <= 0.5 || p.hold > 0 || p.now == p.most {
		p.up = 0
	}
	if !full && own >= 0.8*(n-1) || p.now == 1 {
		p.down = 0
	}
	switch {
	case p.up == procsSamples:
		p.now++
	case p.down == procsSamples:
		p.now--
		if full {
			p.hold = procsHold
		}
	default:
		return p.now
	}
	p.up, p.down = 0, 0
	return p.now
}
