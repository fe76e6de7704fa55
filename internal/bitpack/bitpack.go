// Package bitpack stores short lists of numbers, each of a list in as many bits as the
// farthest of them from the least one needs ("frame of reference": Goldstein, Ramakrishnan
// and Shaft, "Compressing relations and indexes", ICDE 1998, doi 10.1109/ICDE.1998.655800).
//
// A stored list is the least number, of variable length (LEB128); one byte, how many bits each
// number has, 0 to MaxBits; and what each exceeds the least by, in that many bits, the first
// in the lowest ones, up to a whole byte that is filled with zeroes. How many numbers there
// are is not stored.
package bitpack

import (
	"encoding/binary"
	"math/bits"
)

// MaxBits is how many bits the difference of two numbers of a list may have.
const MaxBits = 56

// frame returns the least of the numbers, and how many bits the others exceed it by.
func frame(v []uint64) (least uint64, width int) {
	if len(v) == 0 {
		return 0, 0
	}
	least, most := v[0], v[0]
	for _, x := range v[1:] {
		least, most = min(least, x), max(most, x)
	}
	return least, bits.Len64(most - least)
}

// packedBytes returns how many bytes n numbers of that many bits take.
func packedBytes(n, width int) int { return (n*width + 7) / 8 }

// Size returns how many bytes Append adds for v.
func Size(v []uint64) int {
	least, width := frame(v)
	return (bits.Len64(least|1)+6)/7 + 1 + packedBytes(len(v), width)
}

// Append appends the numbers to b. No two of them may differ by 2^MaxBits or more.
func Append(b []byte, v []uint64) []byte {
	least, width := frame(v)
	if width > MaxBits {
		panic("bitpack: numbers that differ by too much")
	}
	b = append(binary.AppendUvarint(b, least), byte(width))
	acc, have := uint64(0), 0
	for _, x := range v {
		acc |= (x - least) << have
		for have += width; have >= 8; have -= 8 {
			b = append(b, byte(acc))
			acc >>= 8
		}
	}
	if have > 0 {
		b = append(b, byte(acc))
	}
	return b
}

// Read reads as many numbers as v takes from the front of b, and returns what follows them.
// It returns false if b does not begin with so many; v is undefined then.
func Read(b []byte, v []uint64) (rest []byte, ok bool) {
	least, n := binary.Uvarint(b)
	if n <= 0 || n == len(b) || b[n] > MaxBits {
		return nil, false
	}
	width := int(b[n])
	b = b[n+1:]
	size := packedBytes(len(v), width)
	if size > len(b) {
		return nil, false
	}
	unpack(b[:size], v, least, width)
	return b[size:], true
}

// unpack reads numbers of width bits, and adds least to each.
func unpack(b []byte, v []uint64, least uint64, width int) {
	mask := uint64(1)<<width - 1
	i := 0
	for at := 0; i < len(v) && at/8+8 <= len(b); i++ {
		v[i] = least + binary.LittleEndian.Uint64(b[at/8:])>>(at%8)&mask
		at += width
	}
	var tail [16]byte // the last numbers have no eight bytes before the end
	from := i * width / 8
	copy(tail[:], b[from:])
	for ; i < len(v); i++ {
		at := i*width - 8*from
		v[i] = least + binary.LittleEndian.Uint64(tail[at/8:])>>(at%8)&mask
	}
}
