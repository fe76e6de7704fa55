package engine

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/internal/simdisk"
)

var (
	histories    = flag.Uint64("histories", 60, "number of seeds of TestHistories")
	historyFirst = flag.Uint64("histories.first", 0, "first seed of TestHistories")
)

// TestHistories: whatever an image and its clones go through, each of them, each snapshot
// and each log that was cut off has what it must have, and in the end nothing is left over.
func TestHistories(t *testing.T) {
	t.Parallel()
	n := *histories
	if testing.Short() {
		n = min(n, 5)
	}
	for seed := *historyFirst; seed < *historyFirst+n; seed++ {
		ok := t.Run(fmt.Sprint(seed), func(t *testing.T) {
			y := newHistory(t, seed)
			y.goOn()
			y.end()
		})
		if !ok {
			return
		}
	}
}

const (
	historyImages = 4 // at one time
	historySteps  = 60
)

// history is what happens to an image and to clones of it, at random.
type history struct {
	t      *testing.T
	rng    *rand.Rand
	looks  *rand.Rand // of what is looked at beside it
	forced *rand.Rand // of images that are removed while hosts have them
	st     backend.Store
	images []*past // that are there; they never are none
	names  int     // given to snapshots, clones and hosts
	value  uint64  // the last one written
	ops    []string
}

// blocks is what the blocks of an image are to read as.
type blocks struct {
	size uint64 // of the image, in blocks
	at   [snapshotBlocks]uint64
}

// past is an image of a history.
type past struct {
	*history
	name  string
	id    uuid.UUID
	host  *host // that has it open, or had it last
	open  bool
	now   blocks
	snaps []pastSnapshot
	cuts  []pastLog
}

type pastSnapshot struct {
	Snapshot
	has blocks
}

// pastLog is the log of a host that has lost the image to another one.
type pastLog struct {
	disk *simdisk.Disk
	has  blocks
}

func newHistory(t *testing.T, seed uint64) *history {
	y := &history{t: t, rng: rand.New(rand.NewPCG(seed, 5)), looks: rand.New(rand.NewPCG(seed, 6)), forced: rand.New(rand.NewPCG(seed, 7)), st: mem.New(), value: 1000}
	h, id := attached(t, y.st, smallImage(), nil)
	y.images = []*past{{history: y, name: "disk", id: id, host: h, open: true, now: blocks{size: smallImage().Size / 4096}}}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d: %s", seed, strings.Join(y.ops, ", "))
		}
	})
	return y
}

// note notes what happens next.
func (y *history) note(format string, args ...any) {
	y.ops = append(y.ops, fmt.Sprintf(format, args...))
}

// newName returns a name that nothing has.
func (y *history) newName(kind string) string {
	y.names++
	return fmt.Sprint(kind, y.names)
}

// newHost returns a host that has not been there.
func (y *history) newHost() *host {
	name := y.newName("h")
	return newHost(y.t, name, y.st, uint64(100+y.names))
}

// one returns one of the images, the oldest one more often.
func (y *history) one() *past {
	if y.rng.IntN(2) == 0 {
		return y.images[0]
	}
	return y.images[y.rng.IntN(len(y.images))]
}

// goOn lets the history happen.
func (y *history) goOn() {
	for range historySteps/2 + y.rng.IntN(historySteps) {
		y.one().step()
		if y.rng.IntN(4) == 0 {
			y.mustBeRight()
		}
	}
	y.mustBeRight()
}

// step lets one thing happen to the image.
func (p *past) step() {
	if p.looks.IntN(5) == 0 {
		p.flatten()
	}
	switch k := p.rng.IntN(18); {
	case k < 4 && p.open:
		p.write()
	case k < 5:
		p.snapshot()
	case k < 7:
		p.openOrClose()
	case k == 7 && p.open:
		p.loseHost()
	case k < 10 && len(p.snaps) > 0:
		p.rollBack()
	case k == 10 && len(p.snaps) > 0:
		p.dropSnapshot()
	case k == 11 && p.rng.IntN(4) == 0:
		p.forgetLogs()
	case k == 12 && len(p.images) < historyImages:
		p.clone()
	case k == 13 && len(p.images) > 1 && p.rng.IntN(2) == 0:
		p.remove()
	case k == 14 && p.rng.IntN(4) == 0:
		p.collect()
	case k == 17 && p.open && p.now.size > 1:
		p.shrinkHalfway()
	case k > 14:
		p.resize()
	case p.open:
		d := time.Duration(p.rng.Int64N(int64(3 * leftoverGrace)))
		p.note("%s waits %v", p.name, d.Round(time.Second))
		p.host.run(d)
	}
}

// fill gives blocks a number each that no other has.
func (p *past) fill(first, last int) {
	for n := first; n <= last; n++ {
		p.value++
		if uint64(n) >= p.now.size {
			if err, _, _ := p.host.do(Write, uint64(n), p.value, 0); err != syscall.EINVAL {
				p.t.Fatalf("block %d of %s, which has %d, is written: %v", n, p.name, p.now.size, err)
			}
			continue
		}
		p.host.mustWrite(uint64(n), p.value)
		p.now.at[n] = p.value
	}
}

// resize makes the image larger, or smaller if somebody has it open.
func (p *past) resize() {
	size := 1 + p.rng.Uint64N(snapshotBlocks+20)
	if p.rng.IntN(2) == 0 {
		size = 1 + p.rng.Uint64N(2*smallImage().Size/4096)
	}
	p.note("resize %s to %d blocks", p.name, size)
	err := Grow(context.Background(), p.st, p.id, size*4096)
	switch {
	case size >= p.now.size && err != nil, size < p.now.size && !errors.Is(err, ErrShrinks):
		p.t.Fatalf("grow %s from %d blocks to %d: %v", p.name, p.now.size, size, err)
	case size < p.now.size && p.open:
		p.host.mustShrink(size * 4096)
		for n := size; n < snapshotBlocks; n++ {
			p.now.at[n] = 0
		}
	case size < p.now.size:
		return
	case p.open:
		if err := p.host.nudge(context.Background()); err != nil {
			p.t.Fatal(err)
		}
	}
	p.now.size = size
}

// write writes a run of blocks, in the log alone or in the store, with a checkpoint or
// without.
func (p *past) write() {
	first, last := p.rng.IntN(snapshotBlocks), p.rng.IntN(snapshotBlocks)
	if p.rng.IntN(3) == 0 {
		first, last = 0, snapshotBlocks-1
	}
	how := p.rng.IntN(4)
	p.note("%s writes %d to %d, %s", p.name, min(first, last), max(first, last), [...]string{"in the log", "destaged", "destaged", "checkpoint"}[how])
	p.fill(min(first, last), max(first, last))
	if how > 0 {
		p.host.mustDestage()
	}
	if how == 3 {
		p.host.mustCheckpoint()
	}
}

// owner returns the host that has the image open, or nil.
func (p *past) owner() *host {
	if p.open {
		return p.host
	}
	return nil
}

func (p *past) snapshot() {
	name := p.newName("s")
	p.note("%s@%s", p.name, name)
	s := mustSnap(p.t, p.st, p.id, name, p.owner())
	if s.Size != p.now.size*4096 {
		p.t.Fatalf("%s has %d blocks, and its snapshot %d bytes", p.name, p.now.size, s.Size)
	}
	p.snaps = append(p.snaps, pastSnapshot{s, p.now})
}

func (p *past) dropSnapshot() {
	i := p.rng.IntN(len(p.snaps))
	p.note("remove %s@%s", p.name, p.snaps[i].Name)
	mustDropSnapshot(p.t, p.st, p.id, p.snaps[i].Name)
	p.snaps = slices.Delete(p.snaps, i, i+1)
}

func mustDropSnapshot(t *testing.T, st backend.Store, id uuid.UUID, name string) {
	t.Helper()
	if err := RemoveSnapshot(context.Background(), st, id, name); err != nil {
		t.Fatal(err)
	}
}

// mustAttach opens the image in another process.
func (h *host) mustAttach(id uuid.UUID) {
	h.t.Helper()
	h.again()
	if err := h.open(id, false); err != nil {
		h.t.Fatal(err)
	}
}

// attach opens the image, now and then with a log in memory, which is a new one each time.
func (p *past) attach() {
	volatile := p.rng.IntN(4) == 0
	if volatile || p.host.volatile {
		now := p.host.env.now
		p.host = p.newHost()
		p.host.env.now, p.host.volatile = now, volatile
	}
	p.note("open %s (in memory: %v)", p.name, volatile)
	p.host.mustAttach(p.id)
	p.open = true
}

// die ends the process that has the image open. It comes back; or, if its log was in memory,
// another host opens the image, while that process may just not run, and then does. What only
// a log in memory has is lost.
func (p *past) die() {
	old := p.host
	if !old.volatile {
		old.im.Abandon()
		old.mustAttach(p.id)
		return
	}
	paused := p.rng.IntN(2) == 0
	p.note("whose log is in memory, paused: %v", paused)
	if !paused {
		old.im.Abandon()
	}
	p.host = p.newHost()
	p.host.env.now, p.host.volatile = old.env.now, p.rng.IntN(2) == 0
	p.host.mustAttach(p.id)
	if !paused {
		return
	}
	old.env.now = p.host.env.now
	if _, _, _ = old.do(Write, 0, 1, time.Second); old.im.state == Active {
		p.t.Fatalf("two hosts have %s", p.name)
	}
	old.run(time.Minute)
}

// shrinkHalfway begins to make the image smaller, and has its host die in the midst of that,
// or take a snapshot.
func (p *past) shrinkHalfway() {
	size := 1 + p.rng.Uint64N(min(p.now.size-1, snapshotBlocks))
	if p.host.volatile {
		p.host.mustDestage()
	}
	ended, failed := false, error(nil)
	p.host.im.Shrink(size*4096, nil, func(err error) { ended, failed = true, err })
	steps := p.rng.IntN(40)
	p.host.runSteps(steps)
	p.note("%s becomes of %d blocks, ended after %d steps: %v", p.name, size, steps, ended)
	before := p.now
	if p.rng.IntN(2) == 0 {
		p.note("%s dies", p.name)
		p.die()
		ended = ended && failed == nil
		p.look(p.host, &before, size, ended)
		p.now = before
		return
	}
	was, name := ended, p.newName("s")
	p.note("%s@%s", p.name, name)
	s := mustSnap(p.t, p.st, p.id, name, p.host)
	p.host.run(time.Minute)
	if !ended || failed != nil {
		p.t.Fatalf("%s has not become smaller: %v", p.name, failed)
	}
	p.look(p.host, &p.now, size, true)
	h, err := openSnapshot(p.t, p.st, p.id, s.ID)
	if err != nil {
		p.t.Fatal(err)
	}
	p.look(h, &before, size, was)
	p.snaps = append(p.snaps, pastSnapshot{s, before})
}

// runSteps lets so many things happen.
func (h *host) runSteps(n int) {
	for range n {
		h.im.EndTurn()
		if h.disk.Step() || h.env.runJob() || h.env.tellDone() {
			continue
		}
		if t := h.env.next(); t != nil && t.at <= h.env.now {
			h.env.fire()
		}
	}
}

// flatten flattens the image if somebody has it open, to its end, or begins to, and leaves it to
// what happens next to come to that; and it separates the image from its ancestors if it can be.
func (p *past) flatten() {
	flat := false
	switch {
	case !p.open || p.host.im.state != Active:
	case p.looks.IntN(2) == 0:
		before := p.host.im.flatten // that is under way refuses another one, and may end meanwhile
		err := p.host.flatten()
		p.note("flatten %s: %v", p.name, err)
		if flat = err == nil; !flat && before == nil && p.host.im.flatten == nil {
			p.t.Fatalf("flatten %s: %v", p.name, err)
		}
	default:
		steps := p.looks.IntN(60)
		p.note("flatten %s for %d steps", p.name, steps)
		p.host.im.Flatten(nil, func(error) {})
		p.host.runSteps(steps)
		if p.looks.IntN(4) == 0 {
			p.note("and pause")
			p.host.im.PauseFlatten()
		}
	}
	s, err := Separate(context.Background(), p.st, p.id)
	p.note("separate %s: %v", p.name, s.Needs)
	if err != nil || flat && slices.Contains(s.Needs, "its present state") {
		p.t.Fatalf("separate %s: %v, %q", p.name, err, s.Needs)
	}
	if len(s.Needs) == 0 && s.Parent != uuid.Nil {
		if _, err := Reclaim(context.Background(), p.st, s.Parent, nil); err != nil {
			p.t.Fatal(err)
		}
	}
}

// look reads what was being made of so many blocks, and had what has says: it is smaller now,
// as it must be if that has ended, or any part of what goes is there. has has that then.
func (p *past) look(h *host, has *blocks, size uint64, ended bool) {
	p.t.Helper()
	now := h.im.Sectors() / 8
	if now != size && (ended || now != has.size) {
		p.t.Fatalf("%s has %d blocks, want %d, or %d (%v)", p.name, now, size, has.size, !ended)
	}
	for n := size; n < snapshotBlocks; n++ {
		gone := n >= now
		if !gone {
			err, ended, v := h.do(Read, n, 0, 0)
			if err != 0 || !ended || v != 0 && v != has.at[n] {
				p.t.Fatalf("block %d of %s reads as %d (%v, ended %v), want %d or 0", n, p.name, v, err, ended, has.at[n])
			}
			gone = v == 0
		}
		if gone {
			has.at[n] = 0
		}
	}
	has.size = now
	p.read(p.name, h, has)
}

func (p *past) detach() {
	if p.open {
		p.note("close %s", p.name)
		p.host.mustClose()
		p.open = false
	}
}

func (p *past) openOrClose() {
	if !p.open {
		p.attach()
		return
	}
	p.detach()
	if p.rng.IntN(2) == 0 {
		p.check()
	}
}

func (p *past) rollBack() {
	p.detach()
	s := p.snaps[p.rng.IntN(len(p.snaps))]
	p.note("roll back to %s@%s", p.name, s.Name)
	if err := Rollback(context.Background(), p.st, p.id, s.Name, RollbackOptions{}); err != nil {
		p.t.Fatal(err)
	}
	p.now = s.has
	if p.rng.IntN(3) > 0 {
		p.attach()
	}
}

// loseHost ends the process that has the image open: it comes back, or another host takes
// the image over by force, for which what only the log has is lost.
func (p *past) loseHost() {
	switch p.rng.IntN(4) {
	case 0, 1:
		p.note("%s crashes", p.name)
		if p.host.volatile {
			p.host.mustDestage()
			stored := p.now
			p.writeSome()
			p.now = stored
		}
		p.die()
	case 2:
		p.cutOff("is taken over")
		if err := p.host.open(p.id, true); err != nil {
			p.t.Fatal(err)
		}
	case 3:
		p.cutOff("is taken over, which fails")
		p.failToOpen()
	}
}

// cutOff leaves writes in the log of a host that are not in the store, and gives the image to
// a new host, which is to open it.
func (p *past) cutOff(how string) {
	p.note("%s %s", p.name, how)
	p.host.mustDestage()
	stored := p.now
	p.writeSome()
	if !p.host.volatile {
		p.cuts = append(p.cuts, pastLog{p.host.disk, p.now})
	}
	p.now = stored
	next := p.newHost()
	next.env.now = p.host.env.now
	p.host.im.Abandon()
	p.host = next
}

// writeSome writes a few blocks, or none, in the log alone.
func (p *past) writeSome() {
	for range p.rng.IntN(4) {
		n := p.rng.IntN(snapshotBlocks)
		p.fill(n, n)
	}
}

// failToOpen lets the host try to take the image over while no data object can be read, and
// take it over then, unless nobody owns it.
func (p *past) failToOpen() {
	p.host.st = noDataStore{p.st}
	err := p.host.open(p.id, true)
	p.host.st = p.st
	if err == nil {
		return // it had to read none
	}
	sb, _, err := loadSuperblock(context.Background(), p.st, p.id)
	if err != nil {
		p.t.Fatal(err)
	}
	if sb.Owner == nil {
		p.note("nobody has it")
		p.open = false
		return
	}
	p.host.again()
	if err := p.host.open(p.id, true); err != nil {
		p.t.Fatal(err)
	}
}

func (p *past) forgetLogs() {
	p.note("forget logs of %s", p.name)
	if _, err := ForgetLogs(context.Background(), p.st, p.id, uuid.Nil); err != nil {
		p.t.Fatal(err)
	}
	sb, _, err := loadSuperblock(context.Background(), p.st, p.id)
	if err != nil {
		p.t.Fatal(err)
	}
	p.cuts = p.cuts[len(p.cuts)-len(sb.Points):] // one that is not settled stays
}

// clone clones the image, or a snapshot of it.
func (p *past) clone() {
	c := &past{history: p.history, name: p.newName("c"), now: p.now}
	of := ""
	if len(p.snaps) > 0 && p.rng.IntN(2) == 0 {
		s := p.snaps[p.rng.IntN(len(p.snaps))]
		of, c.now = s.Name, s.has
	}
	p.note("clone %s@%s as %s", p.name, of, c.name)
	c.id = mustClone(p.t, p.st, p.id, of, c.name, p.owner())
	c.host = p.newHost()
	p.images = append(p.images, c)
	if p.rng.IntN(2) == 0 {
		c.attach()
	}
}

// remove removes the image with all its snapshots, now and then while a host has it.
func (p *past) remove() {
	if p.open && p.forced.IntN(2) == 0 {
		p.removeAttached()
	} else {
		p.detach()
		p.note("remove %s", p.name)
		mustRemove(p.t, p.st, p.name)
	}
	p.images = slices.DeleteFunc(p.images, func(q *past) bool { return q == p })
}

// removeAttached removes the image under its owner, which puts objects until it finds that out.
func (p *past) removeAttached() {
	p.note("remove %s under its owner", p.name)
	if p.forced.IntN(2) == 0 {
		p.fill(0, snapshotBlocks-1)
	}
	if _, err := Remove(context.Background(), p.st, p.name, RemoveOptions{Force: true, Snapshots: true}); err != nil {
		p.t.Fatal(err)
	}
	when := p.forced.IntN(3)
	for k := range 2 {
		if when == k || when == 2 {
			if _, err := Reclaim(context.Background(), p.st, p.id, nil); err != nil {
				p.t.Fatal(err)
			}
		}
		p.host.im.Destage(func(error) {})
		p.host.run(time.Minute)
	}
	if p.host.im.state != Fenced {
		p.t.Fatalf("the owner of %s, which is removed, is %v", p.name, p.host.im.state)
	}
	p.host.im.Abandon()
	p.open = false
	if p.forced.IntN(2) == 0 {
		p.collect()
	}
}

// collect removes what nothing refers to.
func (y *history) collect() {
	y.note("gc")
	if _, err := GC(context.Background(), y.st, GCOptions{}); err != nil {
		y.t.Fatal(err)
	}
	mustBeSound(y.t, y.st)
}

// mustBeRight reads all images and snapshots, and now and then what can be salvaged.
func (y *history) mustBeRight() {
	y.t.Helper()
	for _, p := range y.images {
		if y.rng.IntN(4) == 0 {
			p.salvage()
		}
		if y.looks.IntN(4) == 0 {
			p.compare()
		}
		for _, s := range p.snaps {
			p.show(p.name+"@"+s.Name, y.st, p.id, s.ID, &s.has)
		}
		if p.open {
			y.read(p.name, p.host, &p.now)
		} else {
			p.show(p.name, y.st, p.id, uuid.Nil, &p.now)
		}
	}
}

// show opens an image or a snapshot read-only, and reads it.
func (y *history) show(name string, st backend.Store, id, snapshot uuid.UUID, has *blocks) {
	y.t.Helper()
	h, err := openSnapshot(y.t, st, id, snapshot)
	if err != nil {
		y.t.Fatalf("open %s: %v", name, err)
	}
	y.read(name, h, has)
}

func (y *history) read(name string, h *host, has *blocks) {
	y.t.Helper()
	if now := h.im.Sectors() / 8; now != has.size {
		y.t.Fatalf("%s has %d blocks, want %d", name, now, has.size)
	}
	for n, want := range has.at {
		if uint64(n) >= has.size {
			if err, _, _ := h.do(Read, uint64(n), 0, 0); err != syscall.EINVAL {
				y.t.Fatalf("block %d of %s, which has %d, is read: %v", n, name, has.size, err)
			}
			continue
		}
		if err, ended, v := h.do(Read, uint64(n), 0, 0); err != 0 || !ended || v != want {
			y.t.Fatalf("block %d of %s reads as %d (%v, ended %v), want %d", n, name, v, err, ended, want)
		}
	}
}

// compare compares two snapshots, or none with one: what has changed, on top of the first, is
// the second.
func (p *past) compare() {
	p.t.Helper()
	if len(p.snaps) == 0 {
		return
	}
	to := &p.snaps[p.looks.IntN(len(p.snaps))]
	v := mustView(p.t, p.st, p.id, to.ID)
	var from *View
	var got blocks
	if k := p.looks.IntN(len(p.snaps) + 1); k < len(p.snaps) {
		from, got = mustView(p.t, p.st, p.id, p.snaps[k].ID), p.snaps[k].has
	}
	got.size = to.has.size
	clear(got.at[min(got.size, snapshotBlocks):])
	err := DiffData(p.t.Context(), from, v, func(r Range, data []byte) (err error) {
		for at := r.Offset; at < r.Offset+r.Length && err == nil; at += objectBlock {
			n := uint64(0)
			if !r.Zero {
				n, err = stamp(data[:objectBlock], at/SectorSize)
				data = data[objectBlock:]
			}
			got.at[at/objectBlock] = n
		}
		return err
	})
	if size := v.Size() / objectBlock; size != to.has.size {
		p.t.Fatalf("the view of %s has %d blocks, want %d", to.Name, size, to.has.size)
	}
	got.size = to.has.size
	clear(got.at[min(got.size, snapshotBlocks):])
	if err != nil || got != to.has {
		p.t.Fatalf("what has changed in %s to %s: %v, %v, want %v", p.name, to.Name, err, got, to.has)
	}
}

// salvage copies what the logs hold that were cut off, and reads that.
func (p *past) salvage() {
	p.t.Helper()
	for _, c := range p.cuts {
		dst := mem.New()
		saved, err := Salvage(context.Background(), c.disk, p.st, p.id, dst, "saved", nil)
		if err != nil {
			p.t.Fatalf("salvage of %s: %v", p.name, err)
		}
		p.show("what was salvaged of "+p.name, dst, saved, uuid.Nil, &c.has)
	}
}

// check checks the image, which nobody has open.
func (p *past) check() {
	p.t.Helper()
	rep, err := Check(context.Background(), p.st, p.name, "mem:/"+p.name, CheckOptions{Deep: true, Repair: p.rng.IntN(2) == 0})
	if err != nil || !rep.Clean() {
		p.t.Fatalf("check of %s: %v, %+v", p.name, err, rep)
	}
}

// end removes everything, in half of all histories the first image before its clones.
func (y *history) end() {
	first := y.images[0]
	if y.rng.IntN(2) == 0 {
		for len(y.images) > 1 {
			y.images[1+y.rng.IntN(len(y.images)-1)].remove()
			y.mustBeRight()
		}
		first.settle()
	}
	first.remove()
	for len(y.images) > 0 {
		y.mustBeRight()
		for _, p := range y.images {
			p.detach()
			p.check()
		}
		p := y.images[y.rng.IntN(len(y.images))]
		if len(y.images) == 1 {
			p.settle()
		}
		p.remove()
	}
	mustCollectLater(y.t, y.st)
	mustBeEmpty(y.t, y.st)
}

// settle gives up all that the image has but its present state, overwrites that, and checks
// that there is nothing else in the store then.
func (p *past) settle() {
	if !p.open {
		p.attach()
	}
	for len(p.snaps) > 0 {
		p.dropSnapshot()
		if p.rng.IntN(2) == 0 {
			p.host.run(time.Minute)
		}
		p.mustBeRight()
	}
	p.forgetLogs()
	p.detach()
	p.attach() // what a host that was cut off may have put is looked for by the next owner
	p.note("%s settles", p.name)
	p.host.run(3 * leftoverGrace)
	p.fill(0, snapshotBlocks-1)
	p.host.mustCheckpoint()
	p.host.run(3 * leftoverGrace)
	p.mustBeRight()
	if sb := p.host.im.super.sb; len(sb.Forgotten)+len(sb.Prev)+len(sb.Stale)+len(sb.Clones)+len(sb.Points) > 0 {
		p.t.Errorf("%s has not settled: %+v", p.name, sb)
	}
	p.detach()
	p.check()
	mustCollectLater(p.t, p.st)
	mustBeSound(p.t, p.st)
	kept := map[string]int{}
	_ = p.st.List(context.Background(), "", func(key string) error {
		if k := parseKey(p.id, key); strings.HasPrefix(key, p.id.String()) && k.kind != KindSuperblock {
			kept[key[len(p.id.String()):][:3]]++
		} else if k.kind != KindSuperblock && key != backend.DirectoryKey {
			p.t.Errorf("left over: %s", key)
		}
		return nil
	})
	if kept["/d/"] > 2 || kept["/m/"] > 1 || kept["/c/"] > 1 || len(kept) != 3 {
		p.t.Errorf("%s has settled, and the store has %v of it", p.name, kept)
	}
}
