// Package store is a small compare-and-swap key-value store with watch: the
// contract the coordination server keeps its mesh in, and the engine on one
// local file.
//
// What every engine promises, and the conformance tests hold it to:
//
//   - Linearizable: a Get or List that begins after a Txn returned sees it.
//   - Durable: a Txn returns without error only when its changes survive the
//     death of the process and of the machine (fsync before acknowledge).
//   - Atomic: a Txn changes all its keys or none, also across a crash.
//   - Revisions are per store, grow by one with every Txn that commits, and
//     never go back, not even over a restart. An entry carries the revision of
//     the Txn that wrote it last.
//   - There are no unconditional read-modify-writes: whoever decides on what it
//     read puts the revisions it read into compare and repeats on ErrConflict.
//   - An error that is neither ErrConflict, ErrFull, ErrClosed nor ErrLimit
//     leaves the outcome open: read again before repeating.
package store

import (
	"context"
	"errors"
	"iter"
)

// Limits of an engine.
const (
	MaxKey   = 512     // bytes of a key; it has at least one
	MaxValue = 1 << 20 // bytes of a value
	MaxOps   = 128     // changes of one Txn
)

// Errors that callers branch on.
var (
	ErrConflict  = errors.New("store: a compared key has changed")
	ErrFull      = errors.New("no space left to save")
	ErrLocked    = errors.New("store is in use by another process")
	ErrClosed    = errors.New("store is closed")
	ErrCompacted = errors.New("store: the history does not reach back that far")
	ErrLimit     = errors.New("store: key, value or transaction too large")
)

// Store is the contract. It is safe for concurrent use.
type Store interface {
	// Get gives the entry of a key. A key that does not exist has Revision 0.
	Get(ctx context.Context, key string) (Entry, error)
	// List gives all entries whose key begins with prefix, in the order of
	// their keys, and the store's revision they were read at.
	List(ctx context.Context, prefix string) ([]Entry, uint64, error)
	// Txn applies ops, in order and all together, if every compare holds, and
	// gives the new revision. Otherwise it changes nothing: ErrConflict.
	Txn(ctx context.Context, compare []Compare, ops []Op) (uint64, error)
	// Watch yields every change of a key with this prefix after revision from,
	// in the order of revisions, and waits for more until ctx ends. It begins
	// with ErrCompacted when the history does not reach back to from: List
	// again. An error is the last thing it yields.
	Watch(ctx context.Context, prefix string, from uint64) iter.Seq2[Change, error]
	// Close frees what the store holds; watches end with ErrClosed.
	Close() error
}

// Entry is a key, its value, and the revision of the Txn that wrote it. The
// value is the caller's own copy and may be nil.
type Entry struct {
	Key      string
	Value    []byte
	Revision uint64
}

// Compare holds when the key's revision is Revision; 0 means that the key does
// not exist.
type Compare struct {
	Key      string
	Revision uint64
}

// Op puts a value under a key or deletes the key; deleting a key that does not
// exist is no error.
type Op struct {
	Key    string
	Value  []byte
	Delete bool
}

// Change is an entry as a Txn left it; of a deleted key only Key and Revision
// are set. Its value is shared and must not be changed.
type Change struct {
	Entry
	Deleted bool
}
