package tun

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
	"golang.zx2c4.com/wireguard/device"
)

const (
	// warnings per second and at once that wireguard-go may write: a peer can
	// cause errors at the rate of its packets.
	warnRate  = 1
	warnBurst = 5
)

// newLogger lets wireguard-go write to log: what it tells at Debug, its errors
// at Warn. What it says about peers, keys and addresses is left out, so that a
// log can be shown to others.
func newLogger(log *slog.Logger) *device.Logger {
	warnings := rate.NewLimiter(warnRate, warnBurst)
	return &device.Logger{
		Verbosef: func(format string, args ...any) {
			if log.Enabled(context.Background(), slog.LevelDebug) {
				log.Debug("wireguard", "said", fmt.Sprintf(format, scrub(args)...))
			}
		},
		Errorf: func(format string, args ...any) {
			if warnings.Allow() {
				log.Warn("wireguard", "said", fmt.Sprintf(format, scrub(args)...))
			}
		},
	}
}

// scrub keeps numbers and the cause of errors; anything else could be a key or
// an address.
func scrub(args []any) []any {
	out := make([]any, len(args))
	for i, a := range args {
		switch v := a.(type) {
		case int, int32, int64, uint, uint16, uint32, uint64:
			out[i] = v
		case error:
			out[i] = cause(v)
		case *device.Peer:
			out[i] = "peer"
		default:
			out[i] = "…"
		}
	}
	return out
}

func cause(err error) string {
	var errno unix.Errno
	switch {
	case errors.As(err, &errno):
		return errno.Error()
	case errors.Is(err, os.ErrClosed):
		return os.ErrClosed.Error()
	}
	return fmt.Sprintf("%T", err)
}
