package trust

import (
	"encoding/base64"
	"errors"
)

var errKeyText = errors.New("a key is 32 bytes in base64")

// String gives the key as wg(8) writes it: base64.
func (k Key) String() string { return base64.StdEncoding.EncodeToString(k[:]) }

// MarshalText is String as bytes.
func (k Key) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText reads what MarshalText wrote, and nothing else.
func (k *Key) UnmarshalText(b []byte) error {
	raw, err := base64.StdEncoding.Strict().DecodeString(string(b))
	// The decoder passes over line breaks.
	if err != nil || len(raw) != len(k) || Key(raw).String() != string(b) {
		return errKeyText
	}
	*k = Key(raw)
	return nil
}
