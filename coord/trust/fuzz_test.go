package trust

import (
	"testing"
)

// fuzzOpen looks for bytes that open as the document with that name and are
// not that document: nobody else holds the keys, so there must be none.
func fuzzOpen(f *testing.F, name string) {
	var real document
	for _, d := range documents(f) {
		f.Add([]byte(d.doc))
		if d.name == name {
			real = d
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		v, err := real.open(b)
		if (err == nil) != (string(b) == string(real.doc)) {
			t.Errorf("%x opens as %+v: %v", b, v, err)
		}
	})
}

func FuzzOpenGenesis(f *testing.F)       { fuzzOpen(f, "genesis") }
func FuzzOpenState(f *testing.F)         { fuzzOpen(f, "state") }
func FuzzOpenInviteCap(f *testing.F)     { fuzzOpen(f, "invite-cap") }
func FuzzOpenNodeCert(f *testing.F)      { fuzzOpen(f, "node-cert") }
func FuzzOpenCountersigned(f *testing.F) { fuzzOpen(f, "countersigned") }
func FuzzOpenRecord(f *testing.F)        { fuzzOpen(f, "record") }
func FuzzOpenRevocation(f *testing.F)    { fuzzOpen(f, "revocation") }

// FuzzBody gives bodies to the readers without a signature in the way. What is
// accepted must be in bounds, and encode to nothing longer than a document.
func FuzzBody(f *testing.F) {
	for _, d := range documents(f) {
		signed, _, err := split(d.doc, kind(d.doc[0]))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(d.doc[0], signed[headerSize:])
	}
	f.Fuzz(func(t *testing.T, k uint8, body []byte) {
		signed := []byte(forge(kind(k), body))
		var m message
		var err error
		switch kind(k) {
		case kindGenesis:
			m, err = decode(signed, readGenesis)
		case kindState:
			m, err = decode(signed, readState)
		case kindInviteCap:
			m, err = decode(signed, readInviteCap)
		case kindNodeCert:
			m, err = decode(signed, readNodeCert)
		case kindCountersigned:
			m, err = decode(signed, readCountersigned)
		case kindRecord:
			m, err = decode(signed, readRecord)
		case kindRevocation:
			m, err = decode(signed, readRevocation)
		default:
			return
		}
		if err != nil {
			return
		}
		d, err := seal(m, nil)
		if err != nil || string(d) != string(signed) || len(d) > MaxDocument-2*64 {
			t.Errorf("%x was read as %+v, which is sealed as %x: %v", signed, m, d, err)
		}
	})
}
