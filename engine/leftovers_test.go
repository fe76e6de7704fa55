package engine

import (
	"fmt"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/internal/racetest"
)

// unpublished is a checkpoint that does not come to its end, because the put of the last of
// its map objects, which are more than are put at one time, does not.
type unpublished struct {
	t  *testing.T
	st *faultstore.Store
	id uuid.UUID
	h  *host
	// late has the last map object come. Until then its put is under way.
	late func()
}

func newUnpublished(t *testing.T, parts int) *unpublished {
	t.Helper()
	u := &unpublished{t: t, st: faultstore.New(mem.New())}
	shared := NewShared(Limits{})
	u.h, u.id = attached(t, u.st, CreateOptions{Size: uint64(parts) * segmentSectors * SectorSize, ObjectSize: MinObjectSize}, shared)
	for i := range uint64(parts) {
		u.h.mustWrite(i*segmentSectors/8, i+1)
	}
	u.h.mustDestage()
	last := faultstore.All(faultstore.Method(faultstore.Put), faultstore.Key(fmt.Sprintf("*/m/*.%x", parts-1)))
	u.st.Inject(faultstore.If(last, faultstore.Fault{Late: func(effect func()) { u.late = effect }}))
	shared.Map.limit = 1 // from here on each segment is a map object
	u.h.im.checkpoint.begin(nil)
	u.h.run(time.Second)
	shared.Map.limit = DefaultMapMemory
	if n := objectsOf(t, u.st, u.id, "m"); n != parts-1 || u.late == nil {
		t.Fatalf("%d map objects, not all but the last of %d: this tests nothing", n, parts)
	}
	return u
}

// kill ends the process, and what it had under way, but for the last map object, with it.
func (u *unpublished) kill() {
	u.h.disk.Kill()
	u.h.im.Abandon()
	u.st.Inject()
}

// restart kills the process, and starts the next one, for which it takes a second to do what
// a start does at once.
func (u *unpublished) restart() {
	u.t.Helper()
	u.kill()
	u.h.again()
	if err := u.h.open(u.id, false); err != nil {
		u.t.Fatal(err)
	}
	u.h.run(time.Second)
}

// mustEndClean fails if the image is not as it was written, or if there is anything left
// when h, which has it, has had the time to remove it.
func (u *unpublished) mustEndClean(h *host) {
	u.t.Helper()
	h.run(2 * leftoverGrace)
	for i := range h.im.Sectors() / segmentSectors {
		h.mustRead(i*segmentSectors/8, i+1)
	}
	h.mustClose()
	mustBeClean(u.t, u.st)
}

// TestLateMapObjectGoes: a map object of a checkpoint that was never published, which comes
// when the next start has done what it does at once, is found when nothing can come any more,
// however many processes die until then.
func TestLateMapObjectGoes(t *testing.T) {
	for name, before := range map[string]func(u *unpublished){
		"killed once": func(u *unpublished) {
			u.restart()
			u.late()
		},
		"killed again": func(u *unpublished) {
			u.restart()
			u.restart()
			u.late()
			u.restart()
		},
		"killed again late": func(u *unpublished) {
			u.restart()
			u.h.run(leftoverGrace - 2*time.Second)
			u.late()
			u.restart()
		},
	} {
		t.Run(name, func(t *testing.T) {
			u := newUnpublished(t, checkpointPuts+1)
			before(u)
			u.mustEndClean(u.h)
		})
	}
}

// TestMapObjectsGoAfterInterruption: a process that dies while it removes the map objects of
// a checkpoint that was never published leaves none that the next one does not find; nor
// does a repair.
func TestMapObjectsGoAfterInterruption(t *testing.T) {
	const parts = 0x12
	for deletes := 0; deletes <= parts; deletes += 3 {
		for _, repair := range []bool{false, true} {
			t.Run(fmt.Sprintf("repair %v, after %d", repair, deletes), func(t *testing.T) {
				if deletes > 0 {
					racetest.Slow(t)
				}
				u := newUnpublished(t, parts)
				u.restart()
				u.late()
				if repair {
					u.h.mustClose()
				}
				before := objectsOf(t, u.st, u.id, "m")
				u.st.Inject(faultstore.If(faultstore.All(faultstore.Method(faultstore.Delete), faultstore.Key("*/m/*"), faultstore.AfterFirst(deletes)), faultstore.Fault{Before: backend.ErrTemporary}))
				if repair {
					_, err := Check(t.Context(), u.st, "disk", "mem:/disk", CheckOptions{Repair: true})
					if (err == nil) != (deletes == parts) {
						t.Fatalf("repair: %v", err)
					}
				} else {
					u.h.run(leftoverGrace)
				}
				if n := before - objectsOf(t, u.st, u.id, "m"); n != deletes {
					t.Fatalf("%d map objects have gone, not %d: this tests nothing", n, deletes)
				}
				u.restart()
				u.mustEndClean(u.h)
			})
		}
	}
}

// TestCutOffOwnersMapObjectsGo: an owner that was cut off and stands still may put what it had
// begun at any time. Its map objects go when the point at which it was cut off has been given
// up, however long after that point.
func TestCutOffOwnersMapObjectsGo(t *testing.T) {
	for name, x := range map[string]struct {
		late, forgotten time.Duration // after the take-over
		killed          time.Duration // after that
	}{
		"long after":       {time.Hour, time.Hour, 0},
		"meanwhile":        {time.Second, leftoverGrace - 30*time.Second, 0},
		"meanwhile, dying": {time.Second, leftoverGrace - 30*time.Second, time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			u := newUnpublished(t, checkpointPuts+1)
			b := newHost(t, "beta", u.st, 2)
			if err := b.open(u.id, true); err != nil {
				t.Fatal(err)
			}
			b.run(x.late)
			u.late()
			b.run(x.forgotten - x.late)
			if n, err := ForgetLogs(t.Context(), u.st, u.id, uuid.Nil); n != 1 || err != nil {
				t.Fatalf("%d forgotten, %v", n, err)
			}
			b.run(x.killed)
			if x.killed > 0 {
				u.h = b
				u.restart()
			}
			u.mustEndClean(b)
		})
	}
}

// TestUnseenMapObjectsGo: while the store refuses to tell which map objects of a checkpoint
// that was never published there are, none is forgotten. Seed 51392 of the simulation found it.
func TestUnseenMapObjectsGo(t *testing.T) {
	for _, killed := range []bool{false, true} {
		t.Run(fmt.Sprintf("killed %v", killed), func(t *testing.T) {
			u := newUnpublished(t, checkpointPuts+1)
			u.restart()
			u.late()
			u.st.Inject(faultstore.If(faultstore.All(faultstore.Method(faultstore.Stat), faultstore.Key("*/m/*")), faultstore.Fault{Before: backend.ErrPermanent}))
			u.h.run(3 * leftoverGrace)
			if n := objectsOf(t, u.st, u.id, "m"); n <= checkpointPuts {
				t.Fatalf("%d map objects: this tests nothing", n)
			}
			u.st.Inject()
			if killed {
				u.restart()
			}
			u.mustEndClean(u.h)
		})
	}
}
