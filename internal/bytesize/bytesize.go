// Package bytesize reads and writes sizes as people do: 4K, 20G, 1.5 GiB.
package bytesize

import (
	"fmt"
	"math"
	"math/bits"
	"strconv"
	"strings"
)

// units are the suffixes of sizes, each 1024 times the one before.
const units = "KMGTPE"

// A Size is a number of bytes, as a flag: 512, 4K, 1.5G, 20GiB. Units are powers
// of 1024.
type Size uint64

// String implements pflag.Value; it is the shortest that Set takes.
func (s *Size) String() string {
	v, unit := uint64(*s), ""
	for i := 0; i < len(units) && v != 0 && v%1024 == 0; i++ {
		v /= 1024
		unit = units[i : i+1]
	}
	return strconv.FormatUint(v, 10) + unit
}

// Type implements pflag.Value.
func (s *Size) Type() string { return "size" }

// Set implements pflag.Value.
func (s *Size) Set(text string) error {
	v, err := Parse(text)
	if err != nil {
		return err
	}
	*s = Size(v)
	return nil
}

// Parse parses a size; the error tells the rule.
func Parse(text string) (uint64, error) {
	bad := fmt.Errorf("%q is not a size: write 512, 4K, 20G or 1T (units of 1024)", text)
	num, shift := text, 0
	if up := strings.ToUpper(text); up != "" {
		up = strings.TrimSuffix(strings.TrimSuffix(up, "B"), "I")
		if i := strings.IndexByte(units, lastByte(up)); i >= 0 {
			shift, up = 10*(i+1), up[:len(up)-1]
		} else if len(up) != len(text) {
			return 0, bad // "512B", "512i"
		}
		num = up
	}
	whole, fraction, hasFraction := strings.Cut(num, ".")
	v, err := strconv.ParseUint(whole, 10, 64)
	if err != nil || strings.HasPrefix(whole, "+") {
		return 0, bad
	}
	if v > math.MaxUint64>>shift {
		return 0, fmt.Errorf("size %s is beyond all limits", text)
	}
	v <<= shift
	if !hasFraction {
		return v, nil
	}
	f, err := strconv.ParseUint(fraction, 10, 32)
	if err != nil || shift == 0 || len(fraction) > 9 {
		return 0, bad
	}
	ten := uint64(1)
	for range fraction {
		ten *= 10
	}
	hi, lo := bits.Mul64(f, 1<<shift)
	q, rem := bits.Div64(hi, lo, ten)
	if rem != 0 {
		return 0, fmt.Errorf("size %s is not a whole number of bytes", text)
	}
	return v + q, nil
}

func lastByte(s string) byte {
	if s == "" {
		return ' '
	}
	return s[len(s)-1]
}

// Human returns a size for people, to three digits.
func Human(n uint64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	v, i := float64(n)/1024, 0
	for v >= 999.5 && i < len(units)-1 {
		v /= 1024
		i++
	}
	s := strconv.FormatFloat(v, 'f', 2, 64)
	switch {
	case v >= 100:
		s = strconv.FormatFloat(v, 'f', 0, 64)
	case v >= 10:
		s = strconv.FormatFloat(v, 'f', 1, 64)
	}
	if strings.Contains(s, ".") {
		s = strings.TrimRight(strings.TrimRight(s, "0"), ".")
	}
	return s + " " + units[i:i+1] + "iB"
}
