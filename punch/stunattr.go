package punch

import "github.com/pion/stun/v2"

// Attributes of our own in STUN messages, and the sizes both ends rely on.
const (
	// AttrToken is the server's proof that it saw an address, in the answer to
	// a Binding request with a user name. From the comprehension-optional range
	// (RFC 8489 section 14), so that other STUN servers and clients skip it.
	AttrToken stun.AttrType = 0xC056
	// AttrSequence orders the checks of one boot of the sender: boot id and
	// counter, 8 bytes each, big endian.
	AttrSequence stun.AttrType = 0xC057
	// AttrSessionLost, which is empty, says in a check that its sender has no
	// WireGuard session with the receiver.
	AttrSessionLost stun.AttrType = 0xC058
	// AttrChangeRequest asks for an answer from elsewhere (RFC 5780 section 7.2).
	AttrChangeRequest stun.AttrType = 0x0003
	// AttrPadding makes a Binding request to a server at least as long as the
	// answer (RFC 5780 section 7.6), and a check as long as the datagrams of which
	// is to be known whether they arrive.
	AttrPadding stun.AttrType = 0x0026

	// MaxToken is the longest token in bytes.
	MaxToken = 32
	// ServerAnswerSize is the longest answer a server may send: header, an IPv6
	// XOR-MAPPED-ADDRESS, a token of MaxToken and MESSAGE-INTEGRITY. Requests
	// with a user name are at least that long.
	ServerAnswerSize = stunHeader + (4 + 20) + (4 + MaxToken) + integritySize
)

const (
	stunHeader    = 20
	integritySize = 4 + 20
	userSize      = 8
	sequenceSize  = 16
	// maxMessage bounds a STUN datagram we look at: far more than we build, far
	// less than what would be worth an attacker's while.
	maxMessage = 576
	// maxPadded bounds one that is a padded check.
	maxPadded = 9000
	// checkSize is the length of a check without anything that is seldom.
	checkSize = stunHeader + 4 + userSize + 4 + sequenceSize + integritySize
	// bindingRequest is the first word of one.
	bindingRequest = 1
)
