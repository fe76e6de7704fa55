package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/internal/extmap"
	"github.com/lsd-ceph/lsd/internal/racetest"
)

// checkedImage is an image with a history: random writes, cleaning, a forced
// take-over whose point is still there, and a clean end.
type checkedImage struct {
	t  *testing.T
	st backend.Store
	id uuid.UUID
}

func newCheckedImage(t *testing.T) *checkedImage {
	t.Helper()
	return newCheckedImageIn(t, mem.New())
}

func newCheckedImageIn(t *testing.T, st backend.Store) *checkedImage {
	t.Helper()
	id, err := Create(context.Background(), st, "disk", CreateOptions{Size: 256 << 20, ObjectSize: MinObjectSize})
	if err != nil {
		t.Fatal(err)
	}
	a, b := newHost(t, "alpha", st, 1), newHost(t, "beta", st, 2)
	if err := a.open(id, false); err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 1))
	a.scatter(rng, 2000, 4096)
	a.scatter(rng, 2000, 1024)
	a.mustGoAhead()
	a.mustWrite(7, 7) // only in the log
	if err := b.open(id, true); err != nil {
		t.Fatal(err)
	}
	b.scatter(rng, 7000, 2048)
	for n := uint64(1); n < 10; n++ {
		b.mustWrite(n, n) // so that the last objects of the point die
	}
	b.mustClose()
	if b.im.clean.moved == 0 {
		t.Fatal("nothing was cleaned")
	}
	return &checkedImage{t, st, id}
}

// scatter writes n blocks, among the first of each segment.
func (h *host) scatter(rng *rand.Rand, n int, blocks uint64) {
	h.t.Helper()
	for i := range n {
		k := rng.Uint64N(blocks)
		h.mustWrite(k%4*(segmentSectors/8)+k/4, uint64(i)+1)
		if i%500 == 0 {
			h.run(time.Second)
		}
	}
}

// mustGoAhead destages, and leaves objects after the last checkpoint, the last one of
// a single block.
func (h *host) mustGoAhead() {
	h.t.Helper()
	h.mustDestage()
	for n := uint64(1); n < 10; n++ {
		h.mustWrite(n, n)
		h.mustDestage()
		if h.im.checkpoint.idle() && h.im.checkpoint.since() > 1 {
			return
		}
	}
	h.t.Fatal("checkpoints are always up to date")
}

func (h *host) mustDestage() {
	h.t.Helper()
	err := errors.New("not ended")
	h.im.Destage(func(e error) { err = e })
	h.run(0)
	if err != nil {
		h.t.Fatal(err)
	}
}

// mustCheckpoint destages everything, and has a checkpoint of it.
func (h *host) mustCheckpoint() {
	h.t.Helper()
	h.mustDestage()
	err := errors.New("it has not ended")
	h.im.checkpoint.now(func(e error) { err = e })
	h.run(time.Second)
	if err != nil {
		h.t.Fatalf("%s: checkpoint: %v", h.name, err)
	}
}

func (h *host) mustClose() {
	h.t.Helper()
	err := errors.New("not ended")
	h.im.Close(func(e error) { err = e })
	h.run(time.Second)
	if err != nil {
		h.t.Fatal(err)
	}
}

// copy returns the image in a store of its own.
func (c *checkedImage) copy(t *testing.T) *checkedImage {
	t.Helper()
	ctx, st := context.Background(), mem.New()
	for _, key := range c.keys("") {
		if b, _, err := c.st.Load(ctx, key); err == nil {
			if _, err := st.Swap(ctx, key, backend.NoVersion, b); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := st.Put(ctx, key, c.get(key)); err != nil {
			t.Fatal(err)
		}
	}
	return &checkedImage{t, st, c.id}
}

// keys returns the keys of the image's objects that begin with kind, sorted.
func (c *checkedImage) keys(kind string) (keys []string) {
	c.t.Helper()
	prefix := ""
	if kind != "" {
		prefix = c.id.String() + "/" + kind
	}
	if err := c.st.List(context.Background(), prefix, func(key string) error { keys = append(keys, key); return nil }); err != nil {
		c.t.Fatal(err)
	}
	slices.Sort(keys)
	return keys
}

func (c *checkedImage) get(key string) []byte {
	c.t.Helper()
	b, err := readWhole(context.Background(), c.st, key)
	if err != nil {
		c.t.Fatal(err)
	}
	return b
}

func (c *checkedImage) put(key string, b []byte) {
	c.t.Helper()
	if err := c.st.Put(context.Background(), key, b); err != nil {
		c.t.Fatal(err)
	}
}

func (c *checkedImage) remove(key string) {
	c.t.Helper()
	if err := c.st.Delete(context.Background(), key); err != nil {
		c.t.Fatal(err)
	}
}

// corrupt changes an object.
func (c *checkedImage) corrupt(key string, change func([]byte) int) {
	c.t.Helper()
	if err := damage(context.Background(), c.st, key, change); err != nil {
		c.t.Fatal(err)
	}
}

// change changes the superblock.
func (c *checkedImage) change(fn func(*superblock)) {
	c.t.Helper()
	if _, _, err := changeSuperblock(context.Background(), c.st, c.id, func(sb *superblock) error { fn(sb); return nil }); err != nil {
		c.t.Fatal(err)
	}
}

// reach returns the state of the image.
func (c *checkedImage) reach() *reach {
	c.t.Helper()
	sb, _, err := loadSuperblock(context.Background(), c.st, c.id)
	if err != nil {
		c.t.Fatal(err)
	}
	im := newImage(context.Background(), c.st, sb, &OpenOptions{ReadOnly: true, Parallel: 1})
	defer im.cancel()
	r, err := loadReach(context.Background(), im, sb)
	if err != nil {
		c.t.Fatal(err)
	}
	return r
}

// rewrite changes the last checkpoint's manifest, and keeps its checksum right.
func (c *checkedImage) rewrite(change func(*manifest)) {
	m := c.reach().head.m
	change(m)
	key := manifestKey(c.id, m.ref(), 0)
	c.remove(key)
	c.put(key, m.encode())
}

// remap moves the extent at the beginning of the first segment, and keeps all
// checksums right.
func (c *checkedImage) remap(move func(loc uint64) uint64) {
	m := c.reach().head.m
	s := m.segment(kindWhole, 0)
	span, err := readSegment(context.Background(), c.st, &lineage{image: c.id}, m.places(0), 0, 256<<20/SectorSize)
	if err != nil {
		c.t.Fatal(err)
	}
	e, _ := span.Next(0)
	n := extmap.NewSpan(0, segmentPages)
	for x, ok := e, true; ok; x, ok = span.Next(x.End()) {
		loc := x.Loc
		if x == e {
			loc = move(loc)
		}
		n.Insert(x.Sector, uint64(x.N), loc)
	}
	b := encodeSegment(nil, c.id, segmentHead{}, extentsOf(n, 0))
	c.put(mapKey(c.id, m.ref(), 99), b)
	c.rewrite(func(m *manifest) {
		m.maps[s.object].live -= s.size
		m.maps = append(m.maps, mapObject{at: m.ref(), part: 99, size: uint32(len(b)), live: uint32(len(b))})
		m.set(kindWhole, 0, storedSegment{uint32(len(m.maps) - 1), 0, uint32(len(b))})
	})
}

// sectorAt returns the sector whose data an object has at off, in sectors, or -1.
func (c *checkedImage) sectorAt(o objectInfo, off int) int64 {
	c.t.Helper()
	h, err := decodeObjectHeader(c.get(dataKey(c.id, uint64(o.number), uint64(o.epoch)))[:o.headerBytes()], MaxSize/SectorSize)
	if err != nil {
		c.t.Fatal(err)
	}
	for _, e := range h.extents {
		switch {
		case e.zero:
		case off < int(e.n):
			return int64(e.sector) + int64(off)
		default:
			off -= int(e.n)
		}
	}
	return -1
}

func (c *checkedImage) check(o CheckOptions) *CheckReport {
	c.t.Helper()
	rep, err := Check(context.Background(), c.st, "disk", "mem:/disk", o)
	if err != nil {
		c.t.Fatal(err)
	}
	return rep
}

// lines returns what a report says, with ID for the image's id.
func (c *checkedImage) lines(r *CheckReport) string {
	var b strings.Builder
	for _, f := range r.Errors {
		fmt.Fprintln(&b, strings.ReplaceAll(f.String(), c.id.String(), "ID"))
	}
	return b.String()
}

func flipLast(b []byte) int  { b[len(b)-1] ^= 1; return len(b) }
func flipFirst(b []byte) int { b[40] ^= 1; return len(b) }
func cutLast(b []byte) int   { return len(b) - 1 }
func cutAll([]byte) int      { return 0 }

func TestCheckClean(t *testing.T) {
	c := newCheckedImage(t)
	for _, o := range []CheckOptions{{}, {Deep: true}, {Parallel: 1}, {memory: 1}, {memory: 20000, Deep: true}} {
		rep := c.check(o)
		if !rep.Clean() || len(rep.Errors)+len(rep.Dead)+len(rep.Pending)+len(rep.Repairs) > 0 {
			t.Errorf("%+v: %s%+v", o, c.lines(rep), rep)
		}
		if rep.Objects < 10 || rep.Segments != 4 || rep.Points != 1 {
			t.Errorf("%+v: it has looked at %d objects, %d segments, %d points", o, rep.Objects, rep.Segments, rep.Points)
		}
	}
	if rep, err := CheckStore(context.Background(), c.st, "mem:", false); err != nil || !rep.Clean() {
		t.Errorf("store: %v, %v", rep, err)
	}
	// One whose owner has died, with objects after its checkpoint.
	h := newHost(t, "gamma", c.st, 3)
	if err := h.open(c.id, false); err != nil {
		t.Fatal(err)
	}
	h.scatter(rand.New(rand.NewPCG(2, 2)), 1000, 2048)
	h.mustGoAhead()
	rep := c.check(CheckOptions{Deep: true, Repair: true})
	if !rep.Clean() || rep.AttachedBy != "gamma" || len(c.reach().head.tail) == 0 {
		t.Errorf("attached: %s%+v", c.lines(rep), rep)
	}
}

// TestCheckProgress: it is told of more and more, of a total that is known at the
// beginning and reached at the end, also if something cannot be read.
func TestCheckProgress(t *testing.T) {
	whole := newCheckedImage(t)
	damaged := whole.copy(t)
	o := whole.reach().head.m.objects[0]
	damaged.remove(dataKey(whole.id, uint64(o.number), uint64(o.epoch)))
	for _, x := range []struct {
		name  string
		c     *checkedImage
		o     CheckOptions
		fixed bool // the total never changes
	}{
		{"headers", whole, CheckOptions{}, true},
		{"data", whole, CheckOptions{Deep: true}, true},
		{"one by one", whole, CheckOptions{Deep: true, Parallel: 1}, true},
		{"little memory", whole, CheckOptions{memory: 1}, false},
		{"damaged", damaged, CheckOptions{Deep: true}, false},
	} {
		t.Run(x.name, func(t *testing.T) {
			var calls int
			var first, done, total uint64
			x.o.Progress = func(d, n uint64) {
				if calls++; calls == 1 {
					first = n
				}
				if d < done || d > n || x.fixed && n != first {
					t.Errorf("%d of %d after %d of %d", d, n, done, total)
				}
				done, total = d, n
			}
			rep := x.c.check(x.o)
			if calls < 10 || done == 0 || done != total || done != rep.Read {
				t.Errorf("%d calls, the last with %d of %d; %d read", calls, done, total, rep.Read)
			}
		})
	}
}

// TestCheckDamage: what is wrong is found, and named, and nothing else is.
func TestCheckDamage(t *testing.T) {
	whole := newCheckedImage(t)
	r := whole.reach()
	var live []objectInfo
	for _, o := range r.head.m.objects {
		if o.live > 0 && !r.holds.object(uint64(o.number), 0) {
			live = append(live, o)
		}
	}
	last := live[slices.IndexFunc(live, func(o objectInfo) bool { return o.live > 1 && o.live < o.sectors })]
	data := dataKey(whole.id, uint64(last.number), uint64(last.epoch))
	next := live[0]
	if next.number == last.number {
		next = live[1]
	}
	other := dataKey(whole.id, uint64(next.number), uint64(next.epoch))
	checkpoint := manifestKey(whole.id, *r.head.ref, 0)
	point := manifestKey(whole.id, *r.views[1].ref, 0)
	tail := r.views[1].tail
	if len(tail) == 0 {
		t.Fatal("the point has no objects after its checkpoint")
	}
	// One that only the point needs.
	only := slices.IndexFunc(tail, func(o tailObject) bool {
		i := r.head.find(o.seq)
		return i < 0 || r.head.info(i).live == 0
	})
	if only < 0 {
		t.Fatal("the image needs all objects of the point")
	}
	kept := dataKey(whole.id, tail[only].seq, tail[only].epoch)
	first := r.head.m.place(kindWhole, 0)
	segments := mapKey(whole.id, first.object.at, first.object.part)
	short := func(key string) string { return strings.ReplaceAll(key, whole.id.String(), "ID") }
	for i, x := range []struct {
		name   string
		damage func(c *checkedImage)
		want   string // in the one error, or in each
		deep   bool   // only found by Deep
		mended bool   // by Repair
	}{
		{"superblock missing", func(c *checkedImage) { c.remove(SuperblockKey(c.id)) }, "ID/super: the superblock is missing", false, false},
		{"superblock flipped", func(c *checkedImage) { c.corrupt(SuperblockKey(c.id), flipLast) }, "ID/super: corrupt", false, false},
		{"superblock empty", func(c *checkedImage) { c.corrupt(SuperblockKey(c.id), cutAll) }, "ID/super: corrupt", false, false},
		{"data missing", func(c *checkedImage) { c.remove(data) }, short(data) + ": not found", false, false},
		{"data cut", func(c *checkedImage) { c.corrupt(data, cutLast) }, short(data) + ": corrupt: it has", false, false},
		{"data empty", func(c *checkedImage) { c.corrupt(data, cutAll) }, short(data) + ": corrupt", false, false},
		{"data header flipped", func(c *checkedImage) { c.corrupt(data, flipFirst) }, short(data) + ": corrupt: checksum of its header", false, false},
		{"data flipped", func(c *checkedImage) { c.corrupt(data, flipLast) }, short(data) + ": corrupt: checksum of block", true, false},
		{"data swapped", func(c *checkedImage) { b := c.get(other); c.remove(data); c.put(data, b) }, short(data) + ": corrupt: ", false, false},
		{"manifest missing", func(c *checkedImage) { c.remove(checkpoint) }, short(checkpoint) + ": not found", false, false},
		{"manifest cut", func(c *checkedImage) { c.corrupt(checkpoint, cutLast) }, short(checkpoint) + ": corrupt", false, false},
		{"manifest flipped", func(c *checkedImage) { c.corrupt(checkpoint, flipLast) }, short(checkpoint) + ": corrupt", false, false},
		{"manifest swapped", func(c *checkedImage) { b := c.get(point); c.remove(checkpoint); c.put(checkpoint, b) }, short(checkpoint) + ": corrupt: it is another checkpoint", false, false},
		{"map object missing", func(c *checkedImage) { c.remove(segments) }, short(segments) + ": ", false, false},
		{"map object cut", func(c *checkedImage) { c.corrupt(segments, cutLast) }, short(segments) + ": ", false, false},
		{"map object flipped", func(c *checkedImage) {
			c.corrupt(segments, func(b []byte) int { b[first.offset+50] ^= 1; return len(b) })
		}, short(segments) + ": map segment 0", false, false},
		{"point's manifest missing", func(c *checkedImage) { c.remove(point) }, short(point) + ": not found", false, false},
		{"point's object missing", func(c *checkedImage) { c.remove(kept) }, short(kept) + ": not found (the state kept for log", false, false},
		{"orphaned data object", func(c *checkedImage) { c.put(dataKey(c.id, 3, 77), c.get(data)) }, "ID/d/00000003.4d: orphan", false, true},
		{"orphaned manifest", func(c *checkedImage) { c.put(manifestKey(c.id, checkpointRef{3, 1}, 0), []byte("x")) }, "ID/c/00000003.1.0: orphan", false, true},
		{"orphaned part of a manifest", func(c *checkedImage) { c.put(manifestKey(c.id, *r.head.ref, 1), []byte("x")) }, "1: orphan", false, true},
		{"orphaned map object", func(c *checkedImage) { c.put(mapKey(c.id, checkpointRef{3, 1}, 5), []byte("x")) }, "ID/m/00000003.1.5: orphan", false, true},
		{"strange name", func(c *checkedImage) { c.put(c.id.String()+"/d/3.1", []byte("x")) }, "ID/d/3.1: no object of an image", false, false},
		{"object after a gap", func(c *checkedImage) { c.put(dataKey(c.id, r.head.end()+2, r.sb.epochOf(r.head.end())), c.get(data)) }, "is missing: the image ends at object", false, false},
		{"count too high", func(c *checkedImage) {
			c.rewrite(func(m *manifest) { m.objects[at(m, last)].live++ })
		}, short(checkpoint) + ": the table has", false, true},
		{"count too low", func(c *checkedImage) {
			c.rewrite(func(m *manifest) { m.objects[at(m, last)].live-- })
		}, short(checkpoint) + ": the table has", false, true},
		{"counted as dead", func(c *checkedImage) {
			c.rewrite(func(m *manifest) { o := &m.objects[at(m, last)]; o.live, o.died = 0, uint32(m.at.object) })
		}, short(checkpoint) + ": the table has 0 live sectors", false, true},
		{"extent at the wrong place", func(c *checkedImage) { c.remap(func(loc uint64) uint64 { return refOf(loc).loc(offsetOf(loc) ^ 8) }) }, "which does not hold them there", false, false},
		{"extent in the wrong object", func(c *checkedImage) {
			c.remap(func(loc uint64) uint64 {
				// Not one that has an older version of the same sector there: that is another damage.
				off := offsetOf(loc)
				own := slices.IndexFunc(live, func(o objectInfo) bool { return refOfSeq(uint64(o.number)) == refOf(loc) })
				wrong := slices.IndexFunc(live, func(o objectInfo) bool { return c.sectorAt(o, off) != c.sectorAt(live[own], off) })
				return refOfSeq(uint64(live[wrong].number)).loc(off)
			})
		}, "which does not hold them there", false, false},
		{"extent in no object", func(c *checkedImage) { c.remap(func(uint64) uint64 { return refOfSeq(r.head.end()).loc(0) }) }, "which ", false, false},
		{"object unknown to the table", func(c *checkedImage) {
			c.rewrite(func(m *manifest) { i := at(m, last); m.objects = slices.Delete(m.objects, i, i+1) })
		}, "", false, false},
	} {
		t.Run(x.name, func(t *testing.T) {
			if i%8 > 0 {
				racetest.Slow(t)
			}
			c := whole.copy(t)
			x.damage(c)
			before := fmt.Sprint(c.keys(""))
			for _, o := range []CheckOptions{{}, {Deep: true}, {Deep: true, memory: 1, Parallel: 1}} {
				rep := c.check(o)
				if x.deep && !o.Deep {
					if !rep.Clean() {
						t.Errorf("%+v: found, without reading data: %s", o, c.lines(rep))
					}
					continue
				}
				if rep.Clean() || len(rep.Errors) == 0 {
					t.Errorf("%+v: not found", o)
				}
				if len(rep.Dead) > 0 {
					t.Errorf("%+v: %q, of which parts of the map may need something, are taken for dead", o, rep.Dead)
				}
				for line := range strings.Lines(c.lines(rep)) {
					if key, rest, _ := strings.Cut(line, ": "); strings.Contains(rest, key+":") {
						t.Errorf("%+v: %s repeats itself", o, line)
					}
					if !strings.Contains(line, x.want) {
						t.Errorf("%+v: %s does not say %q", o, line, x.want)
					}
				}
			}
			if after := fmt.Sprint(c.keys("")); after != before {
				t.Errorf("a check without Repair changed the store")
			}
			rep := c.check(CheckOptions{Repair: true})
			if x.mended != (rep.Clean() && len(rep.Errors) > 0) && !x.deep {
				t.Errorf("repair: %s%+v", c.lines(rep), rep.Repairs)
			}
			if x.mended {
				c.mustBeWhole()
			}
		})
	}
}

// at returns the place of an object in a manifest's table.
func at(m *manifest, o objectInfo) int {
	return slices.IndexFunc(m.objects, func(x objectInfo) bool { return x.number == o.number })
}

// mustBeWhole fails if anything is wrong with the image, or its next owner cannot
// work on it.
func (c *checkedImage) mustBeWhole() {
	c.t.Helper()
	if rep := c.check(CheckOptions{Deep: true}); !rep.Clean() || len(rep.Errors) > 0 {
		c.t.Errorf("after the repair: %s", c.lines(rep))
	}
	h := newHost(c.t, "gamma", c.st, 3)
	if err := h.open(c.id, false); err != nil {
		c.t.Fatal(err)
	}
	h.scatter(rand.New(rand.NewPCG(3, 3)), 2000, 4096)
	h.mustClose()
	if rep := c.check(CheckOptions{Deep: true}); !rep.Clean() || len(rep.Dead) > 0 {
		c.t.Errorf("after its next owner: %s", c.lines(rep))
	}
}

// TestCheckStale: what the superblock knows of is no error, and is removed with
// Repair.
func TestCheckStale(t *testing.T) {
	c := newCheckedImage(t)
	late := dataKey(c.id, c.reach().head.end()+3, 1)
	c.put(late, []byte("x"))
	c.put(mapKey(c.id, checkpointRef{5, 1}, 2), []byte("x"))
	c.change(func(sb *superblock) {
		sb.Stale = append(sb.Stale, staleObjects{Epoch: 1, Object: c.reach().head.end() + 1}, staleObjects{Epoch: 1, Object: 5, Checkpoint: true})
	})
	if rep := c.check(CheckOptions{}); !rep.Clean() || len(rep.Stale) != 2 {
		t.Errorf("%s%+v", c.lines(rep), rep)
	}
	if rep := c.check(CheckOptions{Repair: true}); !rep.Clean() || len(rep.Repairs) != 2 || !rep.Repairs[0].Done || !rep.Repairs[1].Done {
		t.Errorf("%+v", rep.Repairs)
	}
	if rep := c.check(CheckOptions{}); len(rep.Stale) != 0 {
		t.Errorf("still there: %v", rep.Stale)
	}
	c.mustBeWhole()
}

// TestRepairYields: what is attached, or becomes so, is not repaired.
func TestRepairYields(t *testing.T) {
	c := newCheckedImage(t)
	orphan := dataKey(c.id, 3, 77)
	c.put(orphan, []byte("x"))
	rep, err := Check(context.Background(), &watchedStore{Store: c.st, hook: func(op, key string) {
		if op == "stat" && key == orphan { // it has been found; the next step removes it
			c.change(func(sb *superblock) { sb.Epoch++ })
		}
	}}, "disk", "mem:/disk", CheckOptions{Repair: true, Parallel: 1})
	if err != nil || rep.Clean() || rep.Repairs[0].Done || !strings.Contains(fmt.Sprint(rep.Notes), "nothing more is repaired") {
		t.Errorf("changed meanwhile: %v, %+v", err, rep)
	}
	h := newHost(t, "gamma", c.st, 3)
	if err := h.open(c.id, false); err != nil {
		t.Fatal(err)
	}
	if rep := c.check(CheckOptions{Repair: true}); rep.Clean() || rep.Repairs[0].Done || !strings.Contains(fmt.Sprint(rep.Notes), "gamma") {
		t.Errorf("attached: %+v", rep)
	}
}

// watchedStore calls hook before each reading operation.
type watchedStore struct {
	backend.Store
	hook func(op, key string)
}

func (s *watchedStore) Get(ctx context.Context, key string, p []byte, off int64) (int, error) {
	s.hook("get", key)
	return s.Store.Get(ctx, key, p, off)
}

func (s *watchedStore) Stat(ctx context.Context, key string) (backend.Info, error) {
	s.hook("stat", key)
	return s.Store.Stat(ctx, key)
}

func (s *watchedStore) Load(ctx context.Context, key string) ([]byte, backend.Version, error) {
	s.hook("load", key)
	return s.Store.Load(ctx, key)
}

func (s *watchedStore) List(ctx context.Context, prefix string, fn func(string) error) error {
	s.hook("list", prefix)
	return s.Store.List(ctx, prefix, func(key string) error {
		s.hook("listed", key)
		return fn(key)
	})
}

// TestCheckBesideOwner: an owner that writes, checkpoints, cleans and deletes
// between any two steps of a check makes no false alarm; and what is really
// missing is found all the same.
func TestCheckBesideOwner(t *testing.T) {
	racetest.Slow(t)
	c := newCheckedImage(t)
	h := newHost(t, "gamma", c.st, 3)
	if err := h.open(c.id, false); err != nil {
		t.Fatal(err)
	}
	for seed := range uint64(6) {
		rng := rand.New(rand.NewPCG(seed, 9))
		st := &watchedStore{Store: c.st, hook: func(op, key string) {
			if rng.IntN(8) == 0 {
				h.scatter(rng, rng.IntN(400), 2048)
				h.run(time.Second)
			}
		}}
		rep, err := Check(context.Background(), st, "disk", "mem:/disk", CheckOptions{Parallel: 1})
		if err != nil && !strings.Contains(err.Error(), "faster than") {
			t.Fatal(err)
		}
		if err == nil && !rep.Clean() {
			t.Fatalf("seed %d: false alarm: %s", seed, c.lines(rep))
		}
	}
	if h.im.reaper.deleted < 20 {
		t.Fatalf("the owner has deleted %d objects only", h.im.reaper.deleted)
	}
	o := h.im.table.list[slices.IndexFunc(h.im.table.list, func(o objectInfo) bool { return !o.gone && o.live > 0 })]
	key := dataKey(c.id, uint64(o.number), uint64(o.epoch))
	c.remove(key)
	st := &watchedStore{Store: c.st, hook: func(op, key string) {
		if op == "get" {
			h.run(5 * time.Second) // renews its lease
		}
	}}
	rep, err := Check(context.Background(), st, "disk", "mem:/disk", CheckOptions{Parallel: 1})
	if err != nil || rep.Clean() || !strings.HasPrefix(c.lines(rep), strings.ReplaceAll(key, c.id.String(), "ID")) {
		t.Errorf("what is missing is not found: %v, %+v", err, rep)
	}
}

func TestCheckStore(t *testing.T) {
	ctx := context.Background()
	whole := newCheckedImage(t)
	gone := uuid.New()
	for n, want := range map[int]string{1: "1 image; ", 2: "2 images; "} {
		c := whole.copy(t)
		if n > 1 {
			if _, err := Create(ctx, c.st, "second", CreateOptions{Size: 64 << 20}); err != nil {
				t.Fatal(err)
			}
		}
		if rep, err := CheckStore(ctx, c.st, "mem:", false); err != nil || len(rep.Notes) != 1 || !strings.HasPrefix(rep.Notes[0], want) {
			t.Errorf("%d: %v: %q, want %q", n, err, rep.Notes, want)
		}
	}
	for _, x := range []struct {
		name   string
		damage func(c *checkedImage)
		want   string
	}{
		{"no superblock", func(c *checkedImage) { c.remove(SuperblockKey(c.id)) }, "ID/super: the superblock is missing, and the directory has the name disk"},
		{"no name", func(c *checkedImage) {
			if err := backend.Unlink(ctx, c.st, "disk", c.id); err != nil {
				t.Fatal(err)
			}
		}, "ID/super: no name in the directory for this image, made as disk"},
		{"two names", func(c *checkedImage) {
			if err := backend.Link(ctx, c.st, "again", c.id); err != nil {
				t.Fatal(err)
			}
		}, "directory: image ID has several names"},
		{"only objects", func(c *checkedImage) { c.put(dataKey(gone, 1, 1), []byte("x")) }, gone.String() + "/: 1 object of an image that has neither"},
		{"strange object", func(c *checkedImage) { c.put("other/thing", []byte("x")) }, "other/thing: no object of lsd"},
		{"directory damaged", func(c *checkedImage) { c.corrupt(backend.DirectoryKey, flipLast) }, "directory: the directory of names is damaged: "},
		{"directory missing", func(c *checkedImage) { c.remove(backend.DirectoryKey) }, "directory: the directory of names is missing"},
	} {
		t.Run(x.name, func(t *testing.T) {
			c := whole.copy(t)
			x.damage(c)
			rep, err := CheckStore(ctx, c.st, "mem:", false)
			if err != nil || len(rep.Errors) != 1 || !strings.HasPrefix(c.lines(rep), x.want) {
				t.Errorf("%v: %q, want %q", err, c.lines(rep), x.want)
			}
		})
	}
}

// TestCheckLostDirectory: a directory that is damaged or has gone is what is wrong, with
// the store and with each image of it; where there is nothing of lsd, nothing is wrong.
func TestCheckLostDirectory(t *testing.T) {
	ctx := context.Background()
	whole := newCheckedImage(t)
	for _, x := range []struct {
		name   string
		damage func(c *checkedImage)
		want   string
		lost   bool
	}{
		{"missing", func(c *checkedImage) { c.remove(backend.DirectoryKey) }, "directory: the directory of names is missing, and there are images: lsdctl check STORE --repair makes it anew", true},
		{"flipped", func(c *checkedImage) { c.corrupt(backend.DirectoryKey, flipLast) }, "directory: the directory of names is damaged: ", false},
		{"empty", func(c *checkedImage) { c.corrupt(backend.DirectoryKey, cutAll) }, "directory: the directory of names is damaged: ", false},
	} {
		t.Run(x.name, func(t *testing.T) {
			c := whole.copy(t)
			x.damage(c)
			rep, err := Check(ctx, c.st, "disk", "mem:/disk", CheckOptions{Repair: true})
			if err != nil || rep.Clean() || rep.ID != uuid.Nil || len(rep.Errors) != 1 || !strings.HasPrefix(c.lines(rep), x.want) {
				t.Errorf("image: %v, %+v", err, rep)
			}
			rep, err = CheckStore(ctx, c.st, "mem:", false)
			if err != nil || len(rep.Errors) != 1 || !strings.HasPrefix(c.lines(rep), x.want) ||
				len(rep.Notes) != 1 || !strings.Contains(rep.Notes[0], c.id.String()+" is there: made as disk on ") {
				t.Errorf("store: %v, %+v", err, rep)
			}
			lost, err := LostDirectory(ctx, c.st)
			if lost != x.lost || err != nil {
				t.Errorf("lost: %v, %v", lost, err)
			}
		})
	}
	empty := mem.New()
	if err := empty.Put(ctx, "other/thing", []byte("x")); err != nil {
		t.Fatal(err)
	}
	if rep, err := CheckStore(ctx, empty, "mem:", false); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("a place without a store: %v, %+v", err, rep)
	}
	if rep, err := Check(ctx, empty, "disk", "mem:/disk", CheckOptions{}); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("an image of it: %v, %+v", err, rep)
	}
	if rep, err := Check(ctx, whole.st, "none", "mem:/none", CheckOptions{}); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("no such image: %v, %+v", err, rep)
	}
}

// TestRebuildDirectory: a directory that has gone, or is damaged, is made anew from the
// superblocks. Of two images with one name the later one gets it; what
// was never whole gets none.
func TestRebuildDirectory(t *testing.T) {
	ctx := context.Background()
	whole := newCheckedImage(t)
	made := func(name string, at time.Duration, change func(*superblock)) uuid.UUID {
		id, err := createNameless(ctx, whole.st, name+"-", CreateOptions{Size: 64 << 20}, false)
		if err == nil {
			_, _, err = changeSuperblock(ctx, whole.st, id, func(sb *superblock) error {
				sb.Name, sb.Created = name, sb.Created.Add(at)
				change(sb)
				return nil
			})
		}
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	as := func(*superblock) {}
	older := made("disk", -time.Hour, as)
	long := strings.Repeat("x", backend.MaxImageName)
	first, second := made(long, time.Hour, as), made(long, 0, as)
	made("half", 0, func(sb *superblock) { sb.Partial = true })
	want := []backend.Entry{
		{Name: "disk", ID: whole.id}, {Name: "disk~" + older.String()[:8], ID: older},
		{Name: long, ID: first}, {Name: second.String(), ID: second},
	}
	slices.SortFunc(want, func(a, b backend.Entry) int { return strings.Compare(a.Name, b.Name) })
	for name, damage := range map[string]func(*checkedImage){
		"missing": func(c *checkedImage) { c.remove(backend.DirectoryKey) },
		"flipped": func(c *checkedImage) { c.corrupt(backend.DirectoryKey, flipLast) },
	} {
		t.Run(name, func(t *testing.T) {
			c := whole.copy(t)
			damage(c)
			rep, err := CheckStore(ctx, c.st, "mem:", false)
			if err != nil || rep.Clean() || len(rep.Repairs) != len(want) || slices.ContainsFunc(rep.Repairs, func(r Repair) bool { return r.Done }) {
				t.Errorf("without repair: %v, %q, %+v", err, c.lines(rep), rep)
			}
			if rep, err := Check(ctx, c.st, "disk", "mem:/disk", CheckOptions{}); err != nil || rep.Clean() {
				t.Errorf("the image before the repair: %v, %+v", err, rep)
			}
			rep, err = CheckStore(ctx, c.st, "mem:", true)
			// What is half there is found still.
			if err != nil || !rep.Errors[0].Mended && !rep.Errors[1].Mended || len(rep.Errors) != 2 || !strings.Contains(c.lines(rep), "the beginning of half") {
				t.Errorf("%v, %q", err, c.lines(rep))
			}
			names, err := backend.Names(ctx, c.st)
			if err != nil || !slices.Equal(names, want) {
				t.Errorf("%v, %v; want %v", names, err, want)
			}
			if rep, err := Check(ctx, c.st, "disk", "mem:/disk", CheckOptions{}); err != nil || !rep.Clean() {
				t.Errorf("the image after the repair: %v, %+v", err, rep)
			}
			if err := backend.Rebuild(ctx, c.st, nil); !errors.Is(err, backend.ErrConflict) {
				t.Errorf("a directory that is whole was made anew: %v", err)
			}
		})
	}
}

// TestNewerDirectory: one of another version is not damaged, and not replaced.
func TestNewerDirectory(t *testing.T) {
	ctx := context.Background()
	c := newCheckedImage(t)
	c.corrupt(backend.DirectoryKey, func(b []byte) int { b[8] += 2; return len(b) })
	before, v, err := c.st.Load(ctx, backend.DirectoryKey)
	if err != nil {
		t.Fatal(err)
	}
	rep, err := CheckStore(ctx, c.st, "mem:", true)
	if err != nil || rep.Clean() || len(rep.Repairs) > 0 || !strings.Contains(c.lines(rep), "use the lsd that has written it") {
		t.Errorf("%v, %q", err, c.lines(rep))
	}
	if err := backend.Rebuild(ctx, c.st, nil); !errors.Is(err, backend.ErrUnknownVersion) {
		t.Errorf("rebuilt: %v", err)
	}
	if after, w, err := c.st.Load(ctx, backend.DirectoryKey); err != nil || w != v || !bytes.Equal(before, after) {
		t.Errorf("it was changed: %v", err)
	}
}

// TestCreateLostDirectory: a new image would hide that the names of others are lost.
func TestCreateLostDirectory(t *testing.T) {
	ctx := context.Background()
	c := newCheckedImage(t)
	c.remove(backend.DirectoryKey)
	if _, err := Create(ctx, c.st, "new", CreateOptions{Size: 64 << 20}); !errors.Is(err, ErrLostDirectory) {
		t.Errorf("%v", err)
	}
	if _, err := c.st.Stat(ctx, backend.DirectoryKey); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("a directory was made: %v", err)
	}
}

// TestFirstImage: one that is just being made in an empty store, and has no name yet,
// does not look like one that has lost it.
func TestFirstImage(t *testing.T) {
	ctx := context.Background()
	st := mem.New()
	id, err := Create(ctx, st, "disk", CreateOptions{Size: 64 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if err := st.Delete(ctx, backend.DirectoryKey); err != nil {
		t.Fatal(err)
	}
	making := &watchedStore{Store: st, hook: func(op, key string) {
		if op == "listed" {
			if err := backend.Link(ctx, st, "disk", id); err != nil {
				t.Error(err)
			}
		}
	}}
	if lost, err := LostDirectory(ctx, making); lost || err != nil {
		t.Errorf("%v, %v", lost, err)
	}
}

// TestCheckStoreDown: a store that does not answer is no damage.
func TestCheckStoreDown(t *testing.T) {
	c := newCheckedImage(t)
	for _, method := range []string{faultstore.Get, faultstore.Stat, faultstore.Load, faultstore.List} {
		for _, n := range []int{0, 1} { // from the first on, or a later one
			down := faultstore.All(faultstore.Method(method), faultstore.AfterFirst(n))
			if method == faultstore.List && n > 0 {
				continue // there is one only
			}
			st := faultstore.New(c.st, faultstore.If(down, faultstore.Fault{Before: backend.ErrTemporary}))
			if rep, err := Check(context.Background(), st, "disk", "mem:/disk", CheckOptions{}); !errors.Is(err, backend.ErrTemporary) {
				t.Errorf("%s fails: %v, and %+v", method, err, rep)
			}
		}
	}
}
