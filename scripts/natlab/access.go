package natlab

import (
	"context"
	"errors"
	"fmt"
)

const (
	accessTable = delayTable + maxLegs + 1 // the first of them
	maxAccesses = 100
)

// AccessLine is what one home hangs on: a delay line for each direction, before the
// Internet. Its methods may be used from several goroutines.
type AccessLine struct{ up, down *DelayLine }

// StartAccess puts an access line between a home and the Internet, both ways alike.
// The lab must have been made with a delay, and the home keeps its public address
// from then on. Close of what it returns ends the lines, which cuts the home off,
// and must come before that of the lab.
func (l *Lab) StartAccess(ctx context.Context, h *Home, line Line) (*AccessLine, error) {
	if l.opts.Delay <= 0 || h.nat.routed() || h.site.Carrier != nil {
		return nil, errors.New("an access line needs a lab with a delay, and a home with one public address")
	}
	l.mu.Lock()
	l.accesses++
	index := l.accesses
	l.mu.Unlock()
	if index > maxAccesses {
		return nil, fmt.Errorf("access line %d of a lab is one too many", index)
	}
	names := [2]string{fmt.Sprintf("up%d", index), fmt.Sprintf("down%d", index)}
	a := &AccessLine{}
	var s script
	for i, d := range []**DelayLine{&a.up, &a.down} {
		var err error
		if *d, err = l.startLine(ctx, names[i], line); err != nil {
			return nil, errors.Join(err, a.Close())
		}
		s = append(s, lineSetup(names[i], accessTable+2*index+i)...)
	}
	s.add("ip rule add iif %s lookup %d", h.port, accessTable+2*index)
	s.add("ip rule add iif %s lookup %d", names[0], delayTable)
	s.add("ip rule add iif %s to %s lookup %d", delayDevice, h.WAN(), accessTable+2*index+1)
	if err := l.core.sh(ctx, s); err != nil {
		return nil, errors.Join(err, a.Close())
	}
	a.Set(line)
	return a, nil
}

// Set changes what the line does from now on. The two directions have nothing in
// common but that.
func (a *AccessLine) Set(line Line) {
	a.up.Set(line)
	line.Seed++
	a.down.Set(line)
}

// Close ends both lines.
func (a *AccessLine) Close() error {
	var errs []error
	for _, d := range []*DelayLine{a.up, a.down} {
		if d != nil {
			errs = append(errs, d.Close())
		}
	}
	return errors.Join(errs...)
}
