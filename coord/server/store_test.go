package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"overlay/coord"
	"overlay/coord/store"
)

// countingStore counts look-ups of addresses.
type countingStore struct {
	store.Store
	addresses int
}

func (s *countingStore) Get(ctx context.Context, key string) (store.Entry, error) {
	if strings.HasPrefix(key, keyIP4) {
		s.addresses++
	}
	return s.Store.Get(ctx, key)
}

// brokenStore fails to save.
type brokenStore struct {
	store.Store
	err error
}

func (s brokenStore) Txn(context.Context, []store.Compare, []store.Op) (uint64, error) {
	return 0, s.err
}

// A full disk is said as such, nothing is promised, and once there is room the
// same request goes through.
func TestDiskFull(t *testing.T) {
	clock := time.Now()
	r, o := bareRegistry(t, netip.MustParsePrefix("100.70.0.0/16"), &clock)
	i := r.addInvite(t, o, nil)
	good := r.store
	r.store = brokenStore{good, fmt.Errorf("%w: %w", store.ErrFull, syscall.ENOSPC)}
	a := applicantOf(newNode(t), i, "bob")
	_, err := r.reserve(t.Context(), a)
	if e := asError(err, slog.New(slog.DiscardHandler)); e.Code != coord.CodeStorage || !strings.Contains(e.Message, "no space left") {
		t.Errorf("%+v", e)
	}
	r.store = good
	if _, err := r.reserve(t.Context(), a); err != nil {
		t.Error(err)
	}
}

// What a caller may not know stays in the log.
func TestInternalErrorsAreNotTold(t *testing.T) {
	var log strings.Builder
	e := asError(errors.New("secret path"), slog.New(slog.NewTextHandler(&log, nil)))
	if e.Code != coord.CodeInternal || strings.Contains(e.Message, "secret") || !strings.Contains(log.String(), "secret path") {
		t.Errorf("%+v, log %q", e, log.String())
	}
}
