package engine

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/backend/storetest"
)

// partsOfTwo is two map objects, and a reader of what is in them.
type partsOfTwo struct {
	partReader
	objects [2]mapObject
	data    [2][]byte
	gets    []int // bytes of each operation
}

func newPartsOfTwo(t *testing.T, fault func(faultstore.Op) faultstore.Fault) *partsOfTwo {
	inner := mem.New()
	st := faultstore.New(inner)
	p := &partsOfTwo{partReader: partReader{st: st, line: &lineage{image: uuid.New()}, timeout: time.Minute}}
	for i := range p.objects {
		p.objects[i] = mapObject{at: checkpointRef{Object: uint64(i + 1), Epoch: 1}, size: 10_000}
		p.data[i] = storetest.Pattern(uint64(i), 10_000)
		if err := inner.Put(context.Background(), p.line.mapKey(p.objects[i].at, 0), p.data[i]); err != nil {
			t.Fatal(err)
		}
	}
	st.Inject(func(op faultstore.Op) faultstore.Fault {
		p.gets = append(p.gets, op.Len)
		return fault(op)
	})
	return p
}

// at is n bytes at an offset of object i, what that lives of it be what it may.
func (p *partsOfTwo) at(i int, offset, n uint32) place {
	o := p.objects[i]
	o.live = offset
	return place{o, offset, n}
}

func (p *partsOfTwo) mustGive(t *testing.T, at place) {
	t.Helper()
	i := int(at.object.at.Object) - 1
	if b, err := p.read(t.Context(), at); err != nil || !bytes.Equal(b, p.data[i][at.offset:][:at.size]) {
		t.Errorf("%d bytes at %d of object %d: %d bytes, %v", at.size, at.offset, i, len(b), err)
	}
}

// TestPartReader: what is wanted of one map object comes by one operation, in whatever order it
// lies there, and what is passed by does no harm.
func TestPartReader(t *testing.T) {
	p := newPartsOfTwo(t, func(faultstore.Op) faultstore.Fault { return faultstore.Fault{} })
	p.soon = []place{p.at(0, 100, 50), p.at(1, 0, 10), p.at(0, 20, 30), p.at(0, 9000, 1000), p.at(1, 10, 20), p.at(0, 5000, 1)}
	for i, at := range slices.Clone(p.soon) {
		if i != 2 {
			p.mustGive(t, at)
		}
	}
	if want := []int{50 + 30 + 1000 + 1, 10 + 20}; !slices.Equal(p.gets, want) {
		t.Errorf("operations of %d bytes, want %d", p.gets, want)
	}
	p.mustGive(t, p.at(0, 1, 1)) // nobody has said that it would be wanted
	if len(p.gets) != 3 || len(p.soon) != 0 {
		t.Errorf("operations of %d bytes; %d are wanted", p.gets, len(p.soon))
	}
}

// TestPartReaderBounds: only so much is read ahead.
func TestPartReaderBounds(t *testing.T) {
	p := newPartsOfTwo(t, func(faultstore.Op) faultstore.Fault { return faultstore.Fault{} })
	for n := range uint32(2 * backend.MaxRanges) {
		p.soon = append(p.soon, p.at(0, n, 1))
	}
	for _, at := range slices.Clone(p.soon) {
		p.mustGive(t, at)
	}
	if want := []int{backend.MaxRanges, backend.MaxRanges}; !slices.Equal(p.gets, want) {
		t.Errorf("operations of %d bytes, want %d", p.gets, want)
	}
	p.gets, p.soon = nil, []place{p.at(0, 0, 10), p.at(0, 10, readAheadBytes+1), p.at(0, 20, 10)}
	p.mustGive(t, p.soon[0])
	if want := []int{20}; !slices.Equal(p.gets, want) {
		t.Errorf("operations of %d bytes, want %d", p.gets, want)
	}
}

// TestPartReaderFaults: where several cannot be read together each is read for itself, and where
// an object ends too early, only those beyond its end are lost.
func TestPartReaderFaults(t *testing.T) {
	bad := errors.New("a bad sector")
	p := newPartsOfTwo(t, func(op faultstore.Op) faultstore.Fault {
		if op.Off <= 20 && 20 < op.Off+int64(op.Len) {
			return faultstore.Fault{Before: &backend.Error{Op: "get", Class: backend.ErrPermanent, Cause: bad}}
		}
		return faultstore.Fault{}
	})
	p.soon = []place{p.at(0, 0, 10), p.at(0, 20, 10), p.at(0, 30, 10), p.at(1, 100, 5), p.at(1, 9990, 11)}
	all := slices.Clone(p.soon)
	p.mustGive(t, all[0])
	if _, err := p.read(t.Context(), all[1]); !errors.Is(err, bad) {
		t.Errorf("what cannot be read: %v", err)
	}
	p.mustGive(t, all[2])
	p.mustGive(t, all[3])
	if b, err := p.read(t.Context(), all[4]); !errors.Is(err, ErrCorrupt) {
		t.Errorf("what is beyond the object's end: %d bytes, %v", len(b), err)
	}
}

// TestPartReaderIsLate: after a read that has taken all of an operation's time no others are tried.
func TestPartReaderIsLate(t *testing.T) {
	p := newPartsOfTwo(t, func(faultstore.Op) faultstore.Fault { return faultstore.Fault{Delay: time.Hour} })
	p.timeout = 10 * time.Millisecond
	p.soon = []place{p.at(0, 0, 10), p.at(0, 20, 10), p.at(1, 0, 10)}
	for _, at := range slices.Clone(p.soon) {
		if _, err := p.read(t.Context(), at); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
	}
	if len(p.gets) != 1 {
		t.Errorf("%d reads were tried", len(p.gets))
	}
}
