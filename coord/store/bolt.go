package store

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

const (
	lockWait     = time.Second // another process may be about to end
	historyCount = 4096        // changes kept for watches
	historyBytes = 8 << 20
	revisionLen  = 8

	entriesBucket = "entries"
	metaBucket    = "meta"
	revisionKey   = "revision"
)

// bolt keeps the store in one bbolt file. A value on disk is
//
//	 0             8
//	+-------------+-----------+
//	| revision,   | value     |
//	| big endian  |           |
//	+-------------+-----------+
type bolt struct {
	db *bbolt.DB

	mu        sync.Mutex
	revision  uint64
	compacted uint64   // changes up to here are no longer in history
	history   []Change // oldest first
	size      int      // bytes held by history
	wake      chan struct{}
	closed    bool
}

// OpenBolt opens the store in the file at path and makes it when it does not
// exist. It fails with ErrLocked while another process has it open.
func OpenBolt(path string) (Store, error) {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: lockWait, FreelistType: bbolt.FreelistMapType})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, fmt.Errorf("open %s: %w", path, ErrLocked)
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, full(err))
	}
	b := &bolt{db: db, wake: make(chan struct{})}
	if err := errors.Join(b.load(), syncDir(filepath.Dir(path))); err != nil {
		return nil, errors.Join(fmt.Errorf("open %s: %w", path, full(err)), db.Close())
	}
	return b, nil
}

// load makes the buckets and reads the revision.
func (b *bolt) load() error {
	return b.db.Update(func(tx *bbolt.Tx) error {
		if _, err := tx.CreateBucketIfNotExists([]byte(entriesBucket)); err != nil {
			return err
		}
		meta, err := tx.CreateBucketIfNotExists([]byte(metaBucket))
		if err != nil {
			return err
		}
		if v := meta.Get([]byte(revisionKey)); len(v) == revisionLen {
			b.revision = binary.BigEndian.Uint64(v)
			b.compacted = b.revision
		}
		return nil
	})
}

// syncDir makes the file's own directory entry survive a crash.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Get implements Store.
func (b *bolt) Get(ctx context.Context, key string) (Entry, error) {
	e := Entry{Key: key}
	err := b.view(ctx, func(tx *bbolt.Tx) {
		if raw := tx.Bucket([]byte(entriesBucket)).Get([]byte(key)); raw != nil {
			e = decode([]byte(key), raw)
		}
	})
	return e, err
}

// List implements Store.
func (b *bolt) List(ctx context.Context, prefix string) ([]Entry, uint64, error) {
	var entries []Entry
	var revision uint64
	err := b.view(ctx, func(tx *bbolt.Tx) {
		if v := tx.Bucket([]byte(metaBucket)).Get([]byte(revisionKey)); v != nil {
			revision = binary.BigEndian.Uint64(v)
		}
		c := tx.Bucket([]byte(entriesBucket)).Cursor()
		for k, raw := c.Seek([]byte(prefix)); k != nil && bytes.HasPrefix(k, []byte(prefix)); k, raw = c.Next() {
			entries = append(entries, decode(k, raw))
		}
	})
	return entries, revision, err
}

func (b *bolt) view(ctx context.Context, read func(*bbolt.Tx)) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	err := b.db.View(func(tx *bbolt.Tx) error { read(tx); return nil })
	if errors.Is(err, bolterrors.ErrDatabaseNotOpen) {
		return ErrClosed
	}
	return err
}

func decode(key, raw []byte) Entry {
	return Entry{
		Key:      string(key),
		Value:    bytes.Clone(raw[revisionLen:]),
		Revision: binary.BigEndian.Uint64(raw),
	}
}

// Txn implements Store.
func (b *bolt) Txn(ctx context.Context, compare []Compare, ops []Op) (uint64, error) {
	if err := checkLimits(compare, ops); err != nil {
		return 0, err
	}
	// Held over the commit so that history is in the order of revisions.
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return 0, ErrClosed
	}
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	next := b.revision + 1
	err := b.db.Update(func(tx *bbolt.Tx) error { return apply(tx, next, compare, ops) })
	if errors.Is(err, ErrConflict) {
		return 0, ErrConflict
	}
	if err != nil {
		return 0, fmt.Errorf("save %d changes: %w", len(ops), full(err))
	}
	b.revision = next
	b.remember(ops)
	return next, nil
}

func checkLimits(compare []Compare, ops []Op) error {
	if len(ops) == 0 || len(ops) > MaxOps || len(compare) > MaxOps {
		return ErrLimit
	}
	for _, o := range ops {
		if o.Key == "" || len(o.Key) > MaxKey || len(o.Value) > MaxValue {
			return ErrLimit
		}
	}
	return nil
}

// apply is the body of a transaction: an error rolls everything back.
func apply(tx *bbolt.Tx, revision uint64, compare []Compare, ops []Op) error {
	entries := tx.Bucket([]byte(entriesBucket))
	for _, c := range compare {
		var have uint64
		if raw := entries.Get([]byte(c.Key)); raw != nil {
			have = binary.BigEndian.Uint64(raw)
		}
		if have != c.Revision {
			return ErrConflict
		}
	}
	head := binary.BigEndian.AppendUint64(nil, revision)
	for _, o := range ops {
		var err error
		if o.Delete {
			err = entries.Delete([]byte(o.Key))
		} else {
			err = entries.Put([]byte(o.Key), append(bytes.Clone(head), o.Value...))
		}
		if err != nil {
			return err
		}
	}
	return tx.Bucket([]byte(metaBucket)).Put([]byte(revisionKey), head)
}

// full tells a full disk, which the operator can mend, from other failures.
func full(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: %w", ErrFull, err)
	}
	return err
}

// remember adds committed changes to the history and wakes the watches. The
// caller holds mu.
func (b *bolt) remember(ops []Op) {
	for _, o := range ops {
		c := Change{Entry: Entry{Key: o.Key, Revision: b.revision}, Deleted: o.Delete}
		if !o.Delete {
			c.Value = bytes.Clone(o.Value)
		}
		b.history = append(b.history, c)
		b.size += len(c.Key) + len(c.Value)
	}
	drop := 0
	for ; len(b.history)-drop > historyCount || b.size > historyBytes; drop++ {
		b.size -= len(b.history[drop].Key) + len(b.history[drop].Value)
		b.compacted = b.history[drop].Revision
	}
	b.history = b.history[drop:]
	close(b.wake)
	b.wake = make(chan struct{})
}

// Watch implements Store.
func (b *bolt) Watch(ctx context.Context, prefix string, from uint64) iter.Seq2[Change, error] {
	return func(yield func(Change, error) bool) {
		for {
			changes, seen, wake, err := b.after(from)
			if err != nil {
				yield(Change{}, err)
				return
			}
			for _, c := range changes {
				if strings.HasPrefix(c.Key, prefix) && !yield(c, nil) {
					return
				}
			}
			from = seen
			select {
			case <-ctx.Done():
				yield(Change{}, ctx.Err())
				return
			case <-wake:
			}
		}
	}
}

// after gives the changes after a revision, the revision they reach to, and
// what is closed when there are more.
func (b *bolt) after(from uint64) ([]Change, uint64, <-chan struct{}, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil, 0, nil, ErrClosed
	}
	if from < b.compacted {
		return nil, 0, nil, ErrCompacted
	}
	first := len(b.history)
	for first > 0 && b.history[first-1].Revision > from {
		first--
	}
	return b.history[first:len(b.history):len(b.history)], max(from, b.revision), b.wake, nil
}

// Close implements Store.
func (b *bolt) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil
	}
	b.closed = true
	close(b.wake)
	if err := b.db.Close(); err != nil {
		return fmt.Errorf("close store: %w", err)
	}
	return nil
}
