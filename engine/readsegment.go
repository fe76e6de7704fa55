package engine

import (
	"cmp"
	"context"
	"fmt"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/internal/extmap"
)

// segmentError says where something of the map is that could not be read.
type segmentError struct {
	part segmentPart
	key  string // of its map object
	at   uint32 // bytes
	err  error
}

func (e *segmentError) Error() string {
	return fmt.Sprintf("%v at byte %d of object %s: %v", e.part, e.at, e.key, e.err)
}

func (e *segmentError) Unwrap() error { return e.err }

// fetchSegment reads segment i from where it is stored, and calls fn in a later turn. Whoever
// waits for it waits for one read of the store: what has changed since the segment was stored
// is read beside it. An error is a *segmentError.
func (im *Image) fetchSegment(at places, i uint32, fn func(*extmap.Span, error)) {
	var span *extmap.Span
	if at[kindDelta].size == 0 {
		im.askStore(func(ctx context.Context) (err error) {
			span, err = readSegment(ctx, im.store, im.line, at, i, im.span.Load())
			return err
		}, func(err error) { fn(span, err) })
		return
	}
	whole, delta := places{kindWhole: at[kindWhole]}, []segmentExtent(nil)
	left, failed := 2, error(nil)
	done := func(err error) {
		failed = cmp.Or(failed, err)
		if left--; left > 0 {
			return
		}
		if failed != nil {
			fn(nil, failed)
			return
		}
		im.spawn(func() {
			enter := enterInto(span)
			for _, e := range delta {
				enter(e)
			}
		}, func() { fn(span, nil) })
	}
	im.askStore(func(ctx context.Context) (err error) {
		span, err = readSegment(ctx, im.store, im.line, whole, i, im.span.Load())
		return err
	}, done)
	im.askStore(func(ctx context.Context) error {
		return readPart(ctx, im.store, im.line, at[kindDelta], segmentPart{i, kindDelta}, im.span.Load(), func(e segmentExtent) { delta = append(delta, e) })
	}, done)
}

// readSegment reads a segment from where it is stored: all of it, and then what has changed
// since. An error is a *segmentError. Any goroutine may call it.
func readSegment(ctx context.Context, st backend.Store, line *lineage, at places, index uint32, sectors uint64) (*extmap.Span, error) {
	span := extmap.NewSpan(segmentStart(index), segmentPages)
	for kind := range segmentKinds {
		if at[kind].size == 0 {
			continue
		}
		if err := readPart(ctx, st, line, at[kind], segmentPart{index, kind}, sectors, enterInto(span)); err != nil {
			return nil, err
		}
	}
	return span, nil
}

// enterInto returns a function that enters extents, and holes, in span.
func enterInto(span *extmap.Span) func(segmentExtent) {
	return func(e segmentExtent) {
		if e.hole {
			span.Remove(e.Sector, uint64(e.N))
		} else {
			span.Insert(e.Sector, uint64(e.N), e.Loc)
		}
	}
}

// readPart reads and decodes a segment or a delta. An error is a *segmentError.
func readPart(ctx context.Context, st backend.Store, line *lineage, at place, p segmentPart, sectors uint64, fn func(segmentExtent)) error {
	b, err := readPartBytes(ctx, st, line, at)
	if err == nil {
		_, err = decodeSegment(b, line.of(at.object.at.Object), p, sectors, fn)
	}
	if err != nil {
		return &segmentError{p, line.mapKey(at.object.at, at.object.part), at.offset, err}
	}
	return nil
}

func readPartBytes(ctx context.Context, st backend.Store, line *lineage, at place) ([]byte, error) {
	key := line.mapKey(at.object.at, at.object.part)
	b := make([]byte, at.size)
	n, err := st.Get(ctx, key, b, int64(at.offset))
	if err != nil {
		return nil, err
	}
	if n != len(b) {
		return nil, fmt.Errorf("object %s: %w: it ends after %d bytes, it should have %d at least", key, ErrCorrupt, int(at.offset)+n, int(at.offset)+len(b))
	}
	return b, nil
}
