package backend

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

// A Range is a part of an immutable object, from Off on, that is read into P. N is how many bytes
// were read: less than len(P) only where the object ends.
type Range struct {
	Off int64
	P   []byte
	N   int
}

// A RangeGetter is a Store that reads several ranges of an object in one operation.
//
// It is no part of Store: what embeds a Store, and has a Get of its own, would be passed by.
type RangeGetter interface {
	// GetRanges is Get of each of the ranges, which CheckRanges accepts. They may overlap, and
	// be in any order.
	GetRanges(ctx context.Context, key string, ranges []Range) error
}

// MaxRanges bounds the ranges of one operation. They have MaxObject bytes in all at most.
const MaxRanges = 512

// GetRanges reads ranges of the immutable object key as Get would read each of them: up to
// MaxRanges in one operation if s is a RangeGetter, else one after the other.
func GetRanges(ctx context.Context, s Store, key string, ranges []Range) error {
	for some := range slices.Chunk(ranges, MaxRanges) {
		if err := GetOnce(ctx, s, key, some); err != nil {
			return err
		}
	}
	return nil
}

// GetOnce is GetRanges for ranges that CheckRanges accepts, and fails with ErrPermanent for others:
// what a RangeGetter does that has its objects from another Store.
func GetOnce(ctx context.Context, s Store, key string, ranges []Range) error {
	if g, ok := s.(RangeGetter); ok {
		return g.GetRanges(ctx, key, ranges)
	}
	if err := CheckRanges(key, ranges); err != nil {
		return &Error{Op: "get", Class: ErrPermanent, Cause: err}
	}
	for i := range ranges {
		r := &ranges[i]
		n, err := s.Get(ctx, key, r.P, r.Off)
		if err != nil {
			return err
		}
		r.N = n
	}
	return nil
}

// CheckRanges returns nil if one operation may read the ranges of an object of that key, or an
// error of one line without a class.
func CheckRanges(key string, ranges []Range) error {
	if err := CheckKey(key); err != nil {
		return err
	}
	if n := len(ranges); n == 0 || n > MaxRanges {
		return fmt.Errorf("%d ranges: there must be 1 to %d", n, MaxRanges)
	}
	for _, r := range ranges {
		switch {
		case len(r.P) == 0:
			return errors.New("a range of no bytes")
		case r.Off < 0 || r.Off > MaxObject-int64(len(r.P)):
			return fmt.Errorf("a range of %d bytes at offset %d: objects have up to %d", len(r.P), r.Off, MaxObject)
		}
	}
	if n := SizeOf(ranges); n > MaxObject {
		return fmt.Errorf("ranges of %d bytes: the limit is %d", n, MaxObject)
	}
	return nil
}

// SizeOf returns how many bytes are to be read of all ranges.
func SizeOf(ranges []Range) (n int) {
	for _, r := range ranges {
		n += len(r.P)
	}
	return n
}
