package engine

import (
	"log/slog"
	"strings"
	"syscall"
	"testing"

	"github.com/lsd-ceph/lsd/backend/mem"
)

// TestDiscardsShareAnObject: discards have no data, so that many fit one object, however
// large they are.
func TestDiscardsShareAnObject(t *testing.T) {
	st := mem.New()
	h := newHost(t, "alpha", st, 1)
	if err := h.open(newImageIn(t, st), false); err != nil {
		t.Fatal(err)
	}
	h.mustWrite(1, 1)
	h.mustDestage()
	before := h.im.accepted.object
	const n = 2 * MinObjectSize / SectorSize
	for i := range uint64(10) {
		var err error
		h.im.Submit(&Request{Op: Discard, Sector: i * n, Sectors: n, Done: doneFunc(func(r *Request) {
			if r.Err != 0 {
				err = r.Err
			}
		})})
		if h.run(0); err != nil {
			t.Fatal(err)
		}
	}
	h.mustDestage()
	if k := h.im.accepted.object - before; k != 1 {
		t.Errorf("ten discards are %d objects", k)
	}
	h.mustRead(1, 0)
}

// TestNumbersUsedUp: an image that has used up its numbers for objects takes no changes
// any more, says so once, and can be read.
func TestNumbersUsedUp(t *testing.T) {
	st := mem.New()
	h := newHost(t, "alpha", st, 1)
	if err := h.open(newImageIn(t, st), false); err != nil {
		t.Fatal(err)
	}
	h.mustWrite(1, 1)
	var log strings.Builder
	h.im.logger = slog.New(slog.NewTextHandler(&log, nil))
	h.im.sealed.object = lastWritten
	for _, op := range []Op{Write, Discard, WriteZeroes} {
		if err, ended, _ := h.do(op, 2, 2, 0); err != syscall.EIO || !ended {
			t.Errorf("operation %d: %v, ended %v, want EIO", op, err, ended)
		}
	}
	if err, ended, _ := h.do(Flush, 0, 0, 0); err != 0 || !ended {
		t.Errorf("flush: %v, ended %v", err, ended)
	}
	h.mustRead(1, 1)
	if n := strings.Count(log.String(), "used up its numbers"); n != 1 {
		t.Errorf("it was logged %d times", n)
	}
}
