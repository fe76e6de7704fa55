package engine

import (
	"context"
	"time"

	"github.com/lsd-ceph/lsd/backend"
)

// partReader reads segments and deltas as they are stored, in the order in which they are wanted:
// with one of them it reads those of the same map object that are wanted soon after, in one
// operation of the store. One goroutine uses it.
type partReader struct {
	st      backend.Store
	line    *lineage
	timeout time.Duration // of each read
	late    error         // of a read that took as long
	soon    []place       // what will be wanted, in order
	ahead   map[partAt][]byte
}

// partAt is where a segment or a delta is, as far as that tells it from others.
type partAt struct {
	checkpoint   checkpointRef
	part, offset uint32
}

func (p *place) partAt() partAt { return partAt{p.object.at, p.object.part, p.offset} }

// readAheadBytes bounds what a partReader reads ahead of what is wanted.
const readAheadBytes = 1 << 20

// read returns what is stored at a place, which is the caller's. There may be thousands to be
// read, so each has the time of an operation; but after one that took all of it, no more are tried.
func (r *partReader) read(ctx context.Context, at place) ([]byte, error) {
	for len(r.soon) > 0 && r.soon[0].partAt() != at.partAt() {
		r.soon = r.soon[1:] // was not wanted after all
	}
	if b, ok := r.ahead[at.partAt()]; ok {
		delete(r.ahead, at.partAt())
		return b, nil
	}
	if r.late == nil {
		if b, ok := r.readSome(ctx, at); ok {
			return b, nil
		}
	}
	var b []byte
	err := r.try(ctx, func(ctx context.Context) (err error) {
		b, err = readPartBytes(ctx, r.st, r.line, at)
		return err
	})
	return b, err
}

// readSome reads what is at a place together with what is wanted soon, if there is such in the
// same map object. Without what is there it reports false: that is to be read by itself.
func (r *partReader) readSome(ctx context.Context, at place) (b []byte, ok bool) {
	list := []place{at}
	size := 0
	for _, p := range r.soon[:min(len(r.soon), backend.MaxRanges)] {
		if p.object.at != at.object.at || p.object.part != at.object.part || p.offset == at.offset {
			continue
		}
		if _, there := r.ahead[p.partAt()]; there || size+int(p.size) > readAheadBytes || len(list) == backend.MaxRanges {
			continue
		}
		list, size = append(list, p), size+int(p.size)
	}
	if len(list) == 1 {
		return nil, false
	}
	ranges := make([]backend.Range, len(list))
	for i, p := range list {
		ranges[i] = backend.Range{Off: int64(p.offset), P: make([]byte, p.size)}
	}
	err := r.try(ctx, func(ctx context.Context) error {
		return backend.GetRanges(ctx, r.st, r.line.mapKey(at.object.at, at.object.part), ranges)
	})
	if err != nil {
		return nil, false // it may be one of them that cannot be read
	}
	for i, got := range ranges {
		switch {
		case got.N < len(got.P): // whoever wants it learns why
		case i == 0:
			b, ok = got.P, true
		default:
			if r.ahead == nil {
				r.ahead = make(map[partAt][]byte)
			}
			r.ahead[list[i].partAt()] = got.P
		}
	}
	return b, ok
}

// try runs a read in the time of an operation.
func (r *partReader) try(ctx context.Context, read func(context.Context) error) error {
	if r.late != nil {
		return r.late
	}
	ctx, stop := context.WithTimeout(ctx, r.timeout)
	defer stop()
	err := read(ctx)
	if err != nil && ctx.Err() != nil {
		r.late = err
	}
	return err
}
