package engine

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/internal/simdisk"
)

// watchedLog is a log that calls read before a segment is read.
type watchedLog struct {
	*simdisk.Disk
	read func()
}

func (f watchedLog) ReadAt(p []byte, off int64) (int, error) {
	if len(p) == writelog.SegmentSize {
		f.read()
	}
	return f.Disk.ReadAt(p, off)
}

// rebooted returns the log of a host that lost its power, in an image of its own.
func rebooted(t *testing.T, seed uint64) (backend.Store, uuid.UUID, *simdisk.Disk) {
	st := mem.New()
	id := newImageIn(t, st)
	h := newHost(t, "a", st, seed)
	if err := h.open(id, false); err != nil {
		t.Fatal(err)
	}
	h.mustWrite(1, 1)
	h.disk.CutPower()
	return st, id, h.disk
}

func reopen(ctx context.Context, st backend.Store, id uuid.UUID, log writelog.File, shared *Shared) error {
	_, err := Open(ctx, st, id, OpenOptions{Log: log, URL: "mem:/disk", Host: "a", Boot: uuid.New(), Config: Config{Logger: quiet, Shared: shared}})
	return err
}

// TestLargeLog: however long it takes to read a log after a reboot, the time that the
// store has for its answers does not end it.
func TestLargeLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st, id, disk := rebooted(t, 1)
		log := watchedLog{disk, func() { time.Sleep(time.Hour) }}
		if err := reopen(context.Background(), st, id, log, nil); err != nil {
			t.Fatal(err)
		}
		if sb, _, err := loadSuperblock(context.Background(), st, id); err != nil || sb.Epoch != 2 {
			t.Errorf("epoch %d (%v), want one for each attach", sb.Epoch, err)
		}
	})
}

// TestHangingStore: a store that does not answer ends an attempt to open an image.
func TestHangingStore(t *testing.T) {
	for _, method := range []string{faultstore.Load, faultstore.Get, faultstore.Swap} {
		synctest.Test(t, func(t *testing.T) {
			st, id, disk := rebooted(t, 1)
			hangs := faultstore.New(st, faultstore.If(faultstore.Method(method), faultstore.Fault{Gate: faultstore.NewGate()}))
			err := reopen(context.Background(), hangs, id, disk, nil)
			if !errors.Is(err, backend.ErrTemporary) || !strings.Contains(fmt.Sprint(err), "no answer within 20s") {
				t.Errorf("%s: %v", method, err)
			}
			if err := reopen(context.Background(), st, id, disk, nil); err != nil {
				t.Errorf("%s: the store answers again: %v", method, err)
			}
		})
	}
}

// TestLargeLogCancelled: the end of the context ends the reading of a log, both of
// the image's present one and of one that is to be made anew.
func TestLargeLogCancelled(t *testing.T) {
	for _, present := range []bool{true, false} {
		st, id, disk := rebooted(t, 1)
		if !present {
			_, _, err := changeSuperblock(context.Background(), st, id, func(sb *superblock) error { sb.Owner = nil; return nil })
			if err != nil {
				t.Fatal(err)
			}
		}
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		reads := 0
		log := watchedLog{disk, func() {
			if reads++; reads == 3 {
				cancel()
			}
		}}
		if err := reopen(ctx, st, id, log, nil); !errors.Is(err, context.Canceled) || reads != 3 {
			t.Errorf("present %v: after %d reads: %v", present, reads, err)
		}
	}
}

// TestLogsInTurn: of many logs that are to be read only some are at one time.
func TestLogsInTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shared := NewShared(Limits{})
		const images = 2*maxScans + 1
		begun, goOn := make(chan int, 100*images), make(chan struct{})
		ended := make(chan error, images+1)
		start := func(ctx context.Context, i int) {
			st, id, disk := rebooted(t, uint64(i+1))
			log := watchedLog{disk, func() { begun <- i; <-goOn }}
			go func() { ended <- reopen(ctx, st, id, log, shared) }()
		}
		for i := range images {
			start(context.Background(), i)
		}
		synctest.Wait()
		if len(begun) != maxScans {
			t.Errorf("%d logs are being read, want %d", len(begun), maxScans)
		}
		ctx, cancel := context.WithCancel(context.Background())
		start(ctx, images)
		synctest.Wait()
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("an attach that waits for its turn, and is cancelled: %v", err)
		}
		close(goOn)
		for range images {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
	})
}
