package trust

import (
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// MaxCredentials bounds the length in bytes of Credentials: an invite
// capability and a countersigned certificate with the longest names and tags
// stay below it.
const MaxCredentials = 2 << 10

// sizeOfCap is the field that says how long the InviteCap is.
const sizeOfCap = 2

// Credentials are the two documents that admit a device, as it shows them to a
// relay. SplitCredentials takes them apart.
//
//	+---------------+-----------+--------------------+
//	| length of cap | InviteCap | countersigned      |
//	|       2       | Document  | NodeCert, Document |
//	+---------------+-----------+--------------------+
func Credentials(invite, cert Document) []byte {
	return slices.Concat(binary.BigEndian.AppendUint16(nil, uint16(len(invite))), invite, cert)
}

// SplitCredentials takes Credentials apart. It looks only at their form: whether
// they admit anybody is decided by Mesh.Admit. The documents share b's memory.
func SplitCredentials(b []byte) (invite, cert Document, err error) {
	if len(b) < sizeOfCap || len(b) > MaxCredentials {
		return nil, nil, fmt.Errorf("split credentials: %w: length %d", ErrEncoding, len(b))
	}
	n := int(binary.BigEndian.Uint16(b))
	b = b[sizeOfCap:]
	if n > len(b) {
		return nil, nil, fmt.Errorf("split credentials: %w: invite of %d octets in %d", ErrEncoding, n, len(b))
	}
	invite, cert = b[:n:n], b[n:]
	_, signed, err := split(invite, kindInviteCap)
	_, seen, errCert := split(cert, kindCountersigned)
	if err := errors.Join(err, errCert); err != nil {
		return nil, nil, fmt.Errorf("split credentials: %w: %w", ErrEncoding, err)
	}
	if len(signed) != ed25519.SignatureSize || len(seen) != ed25519.SignatureSize {
		return nil, nil, fmt.Errorf("split credentials: %w: signatures of %d and %d octets", ErrEncoding, len(signed), len(seen))
	}
	return invite, cert, nil
}
