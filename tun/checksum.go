package tun

import (
	"encoding/binary"
	"math/bits"
)

// sum adds b, taken as big-endian 16-bit words, to a one's complement sum
// (RFC 1071) kept in 64 bits, eight bytes at a time. Byte order does not
// matter to the sum, so words are loaded as they lie and swapped once.
func sum(b []byte, initial uint64) uint64 {
	acc, carry := bits.ReverseBytes64(initial), uint64(0)
	for len(b) >= 64 {
		acc, carry = bits.Add64(acc, binary.LittleEndian.Uint64(b[0:8]), 0)
		acc, carry = bits.Add64(acc, binary.LittleEndian.Uint64(b[8:16]), carry)
		acc, carry = bits.Add64(acc, binary.LittleEndian.Uint64(b[16:24]), carry)
		acc, carry = bits.Add64(acc, binary.LittleEndian.Uint64(b[24:32]), carry)
		acc, carry = bits.Add64(acc, binary.LittleEndian.Uint64(b[32:40]), carry)
		acc, carry = bits.Add64(acc, binary.LittleEndian.Uint64(b[40:48]), carry)
		acc, carry = bits.Add64(acc, binary.LittleEndian.Uint64(b[48:56]), carry)
		acc, carry = bits.Add64(acc, binary.LittleEndian.Uint64(b[56:64]), carry)
		acc, carry = bits.Add64(acc, 0, carry)
		acc += carry
		b = b[64:]
	}
	for len(b) >= 8 {
		acc, carry = bits.Add64(acc, binary.LittleEndian.Uint64(b[:8]), 0)
		acc += carry
		b = b[8:]
	}
	if len(b) > 0 {
		var tail uint64
		for i, v := range b {
			tail |= uint64(v) << (8 * i)
		}
		acc, carry = bits.Add64(acc, tail, 0)
		acc += carry
	}
	return bits.ReverseBytes64(acc)
}

// fold reduces a sum to 16 bits.
func fold(s uint64) uint16 {
	s = s>>32 + s&0xffffffff
	s = s>>32 + s&0xffffffff
	s = s>>16 + s&0xffff
	s = s>>16 + s&0xffff
	return uint16(s)
}

// pseudoSum is the sum of the pseudo-header (RFC 9293 §3.1, RFC 8200 §8.1):
// addrs holds source and destination next to each other.
func pseudoSum(addrs []byte, proto uint8, length int) uint64 {
	return sum(addrs, uint64(proto)+uint64(length))
}
