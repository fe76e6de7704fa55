package writelog

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"unsafe"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/internal/parallel"
	"github.com/lsd-ceph/lsd/internal/simdisk"
)

// watchedFile notes which segments are read, and calls before, if it is set, ahead of each read.
type watchedFile struct {
	*simdisk.Disk
	before func(segment int64, into []byte) error

	mu   sync.Mutex
	read []int64 // owned by mu
}

func (f *watchedFile) ReadAt(p []byte, off int64) (int, error) {
	if len(p) != SegmentSize {
		return f.Disk.ReadAt(p, off)
	}
	n := (off - DataOffset) / SegmentSize
	f.mu.Lock()
	f.read = append(f.read, n)
	f.mu.Unlock()
	if f.before != nil {
		if err := f.before(n, p); err != nil {
			return 0, err
		}
	}
	return f.Disk.ReadAt(p, off)
}

// reads returns the segments that have been read, in order.
func (f *watchedFile) reads() []int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.read)
}

// filledLog returns the file of a log of so many segments, opened in that boot of its host, of which
// the first ones are full of records, seven in each, and one more is in the next.
func filledLog(t *testing.T, segments, full int, boot uuid.UUID) *watchedFile {
	t.Helper()
	d := simdisk.New(DataOffset+int64(segments)*SegmentSize, rand.New(rand.NewPCG(6, 6)))
	if err := Create(d, Header{Log: uuid.New(), Image: uuid.New(), Epoch: 1, FirstSeq: 1, Boot: boot, ImageURL: "mem:x"}); err != nil {
		t.Fatal(err)
	}
	l, err := Open(d)
	if err != nil {
		t.Fatal(err)
	}
	none := func(Record) error { return nil }
	if err := errors.Join(l.Recover(t.Context(), Start{Seq: 1}, RecoverOptions{Sectors: testSectors}, none), l.Adopt(2, 1, boot)); err != nil {
		t.Fatal(err)
	}
	l.Start(d.Device(), &client{}, make([]byte, 2*SegmentSize), nil, 8)
	for n := range uint64(7*full + 1) {
		w := written{n: n, sector: n * MaxData / Sector, count: MaxData / Sector}
		if _, st := l.Append(w.sector, w.data()); st != Appended {
			t.Fatalf("write %d: %v", n, st)
		}
		l.Commit()
		for d.Step() {
		}
	}
	return &watchedFile{Disk: d}
}

// recovered recovers a log and returns the number of its records.
func recovered(ctx context.Context, f File, boot uuid.UUID, ahead bool, visit func(Record) error) (records int, err error) {
	l, err := Open(f)
	if err != nil {
		return 0, err
	}
	err = l.Recover(ctx, Start{Seq: 1}, RecoverOptions{Sectors: testSectors, Boot: boot, ReadAhead: ahead}, func(r Record) error {
		records++
		return visit(r)
	})
	return records, err
}

func nothing(Record) error { return nil }

// TestReadAheadEnds: what is read ahead is no more than a recovery reads anyhow. So what cannot be
// read behind that is no obstacle.
func TestReadAheadEnds(t *testing.T) {
	boot := uuid.New()
	f := filledLog(t, 20, 3, boot)
	f.before = func(n int64, _ []byte) error {
		if n >= 13 { // 3 and a part, what can be in flight, and a segment
			return syscall.EIO
		}
		return nil
	}
	for _, ahead := range []bool{false, true} {
		f.read = nil
		n, err := recovered(t.Context(), f, boot, ahead, nothing)
		if err != nil || n != 22 {
			t.Errorf("ahead %v: %d records, %v", ahead, n, err)
		}
		// Without reading ahead, the last segment with a record is read once more.
		want := []int64{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}
		if got := slices.Compact(slices.Sorted(slices.Values(f.reads()))); !slices.Equal(got, want) || ahead && len(f.read) != len(got) {
			t.Errorf("ahead %v: segments %v were read, want %v", ahead, f.read, want)
		}
	}
	// After a reboot it is all of the log, once, and not what comes round again.
	f.before, f.read = nil, nil
	if n, err := recovered(t.Context(), f, uuid.New(), true, nothing); err != nil || n != 22 || len(f.read) != 20 {
		t.Errorf("after a reboot: %d records, %v, segments %v", n, err, f.read)
	}
}

// TestReadAheadError: a segment that cannot be read is told of when it is needed, after all that is
// before it, and in the same words; what ends a recovery before counts.
func TestReadAheadError(t *testing.T) {
	f := filledLog(t, 20, 6, uuid.Nil)
	f.before = func(n int64, _ []byte) error {
		if n == 2 {
			return syscall.EIO
		}
		return nil
	}
	wrong := errors.New("enough")
	for _, c := range []struct {
		at, records int
		want        error
	}{{-1, 14, syscall.EIO}, {14, 14, wrong}, {1, 1, wrong}} {
		var said [2]string
		for i, ahead := range []bool{false, true} {
			seen := 0
			n, err := recovered(t.Context(), f, uuid.Nil, ahead, func(Record) error {
				if seen++; seen == c.at {
					return wrong
				}
				return nil
			})
			if n != c.records || !errors.Is(err, c.want) {
				t.Errorf("ahead %v: %v after %d records; want %v after %d", ahead, err, n, c.want, c.records)
			}
			said[i] = fmt.Sprint(err)
		}
		if said[0] != said[1] {
			t.Errorf("%q, and ahead %q", said[0], said[1])
		}
	}
}

// TestReadAheadOrder: who asks for segments in order, goes back by one, or jumps, gets each as it is,
// and keeps it until it asks again. No more are read than may be.
func TestReadAheadOrder(t *testing.T) {
	const count = 12
	d := simdisk.New(DataOffset+count*SegmentSize, rand.New(rand.NewPCG(7, 7)))
	b := make([]byte, BlockSize)
	for n := range uint64(count) {
		for _, at := range [2]int64{0, SegmentSize - BlockSize} {
			binary.LittleEndian.PutUint64(b, n+1)
			if _, err := d.WriteAt(b, DataOffset+int64(n*SegmentSize)+at); err != nil {
				t.Fatal(err)
			}
		}
	}
	f := &watchedFile{Disk: d}
	l := &Log{file: f, hdr: Header{Size: count * SegmentSize}}
	s, err := newSegments(t.Context(), l, 0, 9)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	var most atomic.Int64         // that may have been read so far
	var held atomic.Pointer[byte] // what is being looked at
	f.before = func(n int64, into []byte) error {
		if n > most.Load() {
			t.Errorf("segment %d is read when those up to %d may be", n, most.Load())
		}
		if unsafe.SliceData(into) == held.Load() {
			t.Errorf("segment %d is read into memory that is looked at", n)
		}
		return nil
	}
	for _, n := range []uint64{0, 1, 2, 1, 2, 3, 6, 5, 6, 7, 8, 0, 1, 0, 9, 10, 11, 10, 3} {
		held.Store(nil)
		most.Store(max(most.Load(), int64(n), min(int64(n)+segmentsAhead, 8)))
		b, err := s.get(n)
		if err != nil {
			t.Fatal(err)
		}
		held.Store(unsafe.SliceData(b))
		for range 1000 { // what is ahead is read meanwhile
			for _, at := range [2]int{0, SegmentSize - BlockSize} {
				if got := binary.LittleEndian.Uint64(b[at:]); got != n+1 {
					t.Fatalf("segment %d: at %d there is %d", n, at, got)
				}
			}
		}
		if !bytes.Equal(b[BlockSize:2*BlockSize], make([]byte, BlockSize)) {
			t.Fatalf("segment %d has something that nobody wrote", n)
		}
	}
}

// TestReadAheadWaited: a recovery that ends early does so when nothing reads any more.
func TestReadAheadWaited(t *testing.T) {
	f := filledLog(t, 20, 6, uuid.Nil)
	synctest.Test(t, func(t *testing.T) {
		begun, goOn := make(chan struct{}), make(chan struct{})
		f.before = func(n int64, _ []byte) error {
			if n == 1 {
				close(begun)
				<-goOn
			}
			return nil
		}
		ended := make(chan error, 1)
		wrong := errors.New("enough")
		go func() {
			_, err := recovered(t.Context(), f, uuid.Nil, true, func(Record) error {
				<-begun // segment 1 is being read
				return wrong
			})
			ended <- err
		}()
		synctest.Wait()
		if len(ended) > 0 {
			t.Error("ended while segment 1 is read")
		}
		close(goOn)
		if err := <-ended; err != wrong {
			t.Error(err)
		}
		if r := f.reads(); len(r) != 2 {
			t.Errorf("segments %v were read; the last one was not begun when it ended", r)
		}
	})
}

// TestReadAheadPanic: a panic of what reads ahead is that of who needs what it reads.
func TestReadAheadPanic(t *testing.T) {
	f := filledLog(t, 20, 6, uuid.Nil)
	f.before = func(n int64, _ []byte) error {
		if n == 2 {
			panic("this one")
		}
		return nil
	}
	n := 0
	err := parallel.Catch(func() error {
		_, err := recovered(t.Context(), f, uuid.Nil, true, func(Record) error { n++; return nil })
		return err
	})
	if p := (*parallel.Panicked)(nil); !errors.As(err, &p) || n != 14 {
		t.Errorf("%v after %d records", err, n)
	}
}
