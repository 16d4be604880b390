package server

import (
	"testing"

	"overlay/coord"
)

// TestAddress tells members where they come from, and nobody else.
func TestAddress(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	c := o.dial(t, o.server)
	got, err := c.Address(t.Context())
	if err != nil || got != c.LocalAddr() {
		t.Errorf("seen at %v, %v; want %v", got, err, c.LocalAddr())
	}
	_, err = newNode(t).dial(t, o.server).Address(t.Context())
	wantCode(t, err, coord.CodeNotMember)
}
