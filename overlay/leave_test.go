package overlay

import (
	"testing"

	"overlay/coord"
)

// Keys drawn for a founding go when it is refused for certain, and only those.
func TestRefusedFoundingKeepsNoRoot(t *testing.T) {
	for name, c := range map[string]struct {
		err   error
		older bool
		gone  bool
	}{
		"used":            {err: &coord.Error{Code: coord.CodeInviteUsed}, gone: true},
		"another server":  {err: &coord.PinError{}, gone: true},
		"server failed":   {err: &coord.Error{Code: coord.CodeInternal}},
		"not reached":     {err: &coord.ReachError{}},
		"not its mesh":    {err: coord.ErrMesh},
		"drawn long ago":  {err: &coord.Error{Code: coord.CodeInviteUsed}, older: true},
		"limited, not no": {err: &coord.Error{Code: coord.CodeRateLimited}},
	} {
		s := store{t.TempDir()}
		k := must[*keys](t)(s.loadKeys())
		if err := s.found(k, nil); err != nil {
			t.Fatal(err)
		}
		if c.older {
			k = must[*keys](t)(s.loadKeys())
		}
		if err := s.unfound(k, c.err); err != nil {
			t.Fatal(err)
		}
		saved := must[*keys](t)(s.loadKeys())
		if gone := saved.Root == nil && saved.Signer == nil && saved.Founding == nil; gone != c.gone || !saved.Device.Equal(k.Device) {
			t.Errorf("%s: gone is %v", name, gone)
		}
	}
}
