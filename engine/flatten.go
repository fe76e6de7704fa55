package engine

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/internal/mutate"
)

// ErrPaused is matched where a flattening was ended before it was done.
var ErrPaused = errors.New("flattening was paused")

// ErrFlattening is why an image is not flattened a second time at once.
var ErrFlattening = errors.New("the image is being flattened already")

const (
	// flattenPoll is the pause between two looks whether the cleaner is idle.
	flattenPoll = 100 * time.Millisecond
	// flattenPatience is for how long an ancestor's object may not be had, with nothing else to
	// be moved.
	flattenPatience = 10 * time.Minute
)

// flattener moves what the image's present state is made of out of its ancestors' objects.
// First the cleaner moves the data, with all that it does to move what lives out of mostly dead
// objects; where recovery has yet to count what lives, a checkpoint does that before. Then
// checkpoints move the parts of the map that are in ancestors' map objects. After that no
// manifest of the image's own names anything of an ancestor that is needed: Separate sees that.
// Clients write meanwhile; what they overwrite need not be moved. The reactor owns it; all but
// Image.Flatten may be called of nil, which is none.
type flattener struct {
	im       *Image
	counted  bool          // it is known what of ancestors' objects lives
	total    uint64        // sectors of them that were to be moved then
	unmoved  uint64        // of these, when that was looked at last
	since    time.Duration // env.Now() when there were last less of them than before
	moving   bool          // there may be more to be moved by the cleaner
	waiting  bool          // for a checkpoint, for the cleaner, or for the store
	after    uint64        // the object that is the last one in which something was moved, or may be
	tried    bool          // there was a checkpoint after that
	left     uint64        // when it began
	progress func(done, total uint64)
	fn       func(error)
}

// Flatten moves what the image's present state has in objects of its ancestors into objects of
// its own, and has a checkpoint of its own say so: Separate may end its being a clone then. What
// clients write meanwhile goes on. fn is told when that is done, or why it is not: what was moved
// by then stays moved, and another Flatten goes on from there. progress, which may be nil, is told
// how many bytes of those to be moved have been. There is one at a time. It is called on the
// reactor, as fn and progress are.
func (im *Image) Flatten(progress func(done, total uint64), fn func(error)) {
	if progress == nil {
		progress = func(uint64, uint64) {}
	}
	var err error
	switch {
	case im.readOnly:
		err = errors.New("the image is open read-only")
	case im.state != Active:
		err = im.ended()
	case im.flatten != nil:
		err = ErrFlattening
	}
	if err != nil {
		fn(err)
		return
	}
	f := &flattener{im: im, progress: progress, fn: fn}
	f.retry()
	im.flatten = f
	f.step()
}

// PauseFlatten ends a flattening that is under way, if one is: its fn is told ErrPaused. It is
// called on the reactor.
func (im *Image) PauseFlatten() { im.flatten.end(ErrPaused) }

// retry has what could not be read of ancestors tried again.
func (f *flattener) retry() {
	im := f.im
	for n := range im.clean.bad {
		if !im.line.own(uint64(n)) {
			delete(im.clean.bad, n)
		}
	}
	for n := range im.clean.later {
		if !im.line.own(uint64(n)) {
			delete(im.clean.later, n)
		}
	}
	clear(im.checkpoint.damaged)
}

// moves reports whether the cleaner is to move data out of ancestors' objects.
func (f *flattener) moves() bool { return f != nil && f.moving }

// moved is told that the cleaner has found no object of an ancestor out of which it could move
// anything. unread is one that cannot be read, or nil.
func (f *flattener) moved(unread *objectInfo) {
	if !f.moves() || f.waiting {
		return
	}
	if unread != nil {
		f.cannotRead(unread)
		return
	}
	f.moving, f.after = false, f.im.accepted.object
	if b := f.im.apply.b; b != nil {
		f.after = b.last() // the table has been told of part of it
	}
	f.step()
}

// cannotRead is told of an object that cannot be read, with nothing else to be moved. If the store
// does not answer it is tried again.
func (f *flattener) cannotRead(o *objectInfo) {
	im, why := f.im, "cannot be read: lsdctl check tells what is wrong with that"
	if !im.clean.bad[o.number] {
		if im.env.Now()-f.since < flattenPatience {
			f.again(func(again func()) {
				im.env.AfterFunc(im.cfg.RetryMax, func() {
					f.retry()
					again()
				})
			})
			return
		}
		why = "could not be read for some time: flatten it again when the store answers"
	}
	f.end(fmt.Errorf("object %s, of what it was cloned from, %s", im.line.dataKey(uint64(o.number), uint64(o.epoch)), why))
}

// step begins what comes next, if anything can be begun now. It is called again when what is
// waited for has ended.
func (f *flattener) step() {
	if f == nil || f.waiting || f.im.state != Active {
		return // at the end of the service somebody ends it
	}
	im, c := f.im, &f.im.clean
	switch {
	case f.counted:
	case !im.countsRecovered():
		f.again(func(again func()) { im.checkpoint.now(func(error) { again() }) })
		return
	default:
		f.counted, f.moving, f.total = true, true, f.toMove()
		f.unmoved, f.since = f.total, im.env.Now()
	}
	if n := f.toMove(); n < f.unmoved {
		f.unmoved, f.since = n, im.env.Now()
	}
	f.progress((f.total-f.unmoved)*SectorSize, f.total*SectorSize)
	if f.moving && !im.usedUp() {
		c.maybe()
		return
	}
	left := f.leftOver()
	switch {
	case left == 0 && f.forgets():
		// until that is done
	case left == 0:
		f.end(nil)
	case f.tried && left >= f.left:
		f.end(errors.New("part of its map cannot be read, or moved: lsdctl check tells what is wrong with it"))
	case im.usedUp():
		f.end(errors.New("the image has used up its numbers for objects: copy it to a new one"))
	case im.checkpoint.idle() && im.checkpoint.since() == 0 && (c.search != nil || c.waits || c.running != nil || !im.leased()):
		f.again(func(again func()) { im.env.AfterFunc(flattenPoll, again) })
	case im.checkpoint.idle() && im.checkpoint.since() == 0:
		c.beginEmpty() // and step, when that is accepted
	default:
		f.again(func(again func()) {
			im.checkpoint.now(func(err error) {
				if err == nil && im.checkpoint.last.Object >= f.after {
					f.tried, f.left = true, left
				}
				again()
			})
		})
	}
}

// again has begin begin what f waits for.
func (f *flattener) again(begin func(again func())) {
	f.waiting = true
	begin(func() {
		f.waiting = false
		if f.im.flatten == f {
			f.step()
		}
	})
}

// ancestors returns the table's entries of ancestors' objects, which are the first.
func (f *flattener) ancestors() []objectInfo {
	t, o := &f.im.table, f.im.line.origins
	if len(o) == 0 {
		return nil
	}
	return t.list[:t.index(o[len(o)-1].Last+1)]
}

// toMove returns how many sectors of ancestors' objects are still to be moved.
func (f *flattener) toMove() (n uint64) {
	for _, o := range f.ancestors() {
		if !o.moved && !o.gone {
			n += uint64(o.live)
		}
	}
	return n
}

// leftOver returns how much there is that the next checkpoint would have of ancestors, in
// sectors of data, bytes of maps, and one for the manifest.
func (f *flattener) leftOver() (n uint64) {
	im := f.im
	for _, o := range f.ancestors() {
		if !o.gone {
			n += uint64(o.live)
		}
	}
	for _, o := range im.objs.maps {
		if !im.line.own(o.at.Object) {
			n += uint64(o.live)
		}
	}
	if last := im.checkpoint.last; len(im.line.origins) > 0 && (last == nil || last.Object < f.after || !im.line.own(last.Object)) {
		n++
	}
	return n
}

// forgets reports whether there is a state that is being forgotten and whose manifest is an
// ancestor's.
func (f *flattener) forgets() bool {
	return slices.ContainsFunc(f.im.super.sb.Forgotten, func(p point) bool { return p.Checkpoint != nil && !f.im.line.own(p.base()) })
}

// end ends it.
func (f *flattener) end(err error) {
	if f == nil || f.im.flatten != f {
		return
	}
	f.im.flatten = nil
	f.fn(err)
}

// separationTries bounds how often the states of an image are looked at anew because it has
// got others meanwhile.
const separationTries = 20

// PresentState is what Separation.Needs has for the image as it is now.
const PresentState = "its present state"

// Separation is what Separate has found.
type Separation struct {
	// Parent is the image that it was a clone of, uuid.Nil if it was none.
	Parent uuid.UUID
	// Needs says what of the image needs something of an ancestor still, in a few words each
	// (PresentState, "snapshot a", "clone vm2"); it is a clone as before then.
	Needs []string
}

// Separate ends that the image id is a clone, if neither its present state nor any other state
// that it keeps needs anything of an ancestor: the parent keeps nothing for it any more. It may
// be called whoever has the image attached, and be repeated. Where the parent has been removed
// Reclaim may find more to be reclaimed of it afterwards.
func Separate(ctx context.Context, st backend.Store, id uuid.UUID) (Separation, error) {
	s := &separator{st: patient{st, Real{}}, id: id, flat: map[checkpointRef]bool{}}
	if err := s.run(ctx); err != nil {
		return s.found, fmt.Errorf("separate the image from what it was cloned from: %w", err)
	}
	return s.found, nil
}

// separator separates one image from its ancestors. First the image notes that it has nothing
// of them; then its parent gives up what it keeps for it; and the image forgets its parent last.
// Each step may be repeated.
type separator struct {
	st    patient
	id    uuid.UUID
	flat  map[checkpointRef]bool // checkpoints that were looked at: whether nothing of ancestors is needed in them
	found Separation
}

// errUnseen says that there is a state that has not been looked at.
var errUnseen = errors.New("the image gets other states all the time: try again")

func (s *separator) run(ctx context.Context) error {
	sb, _, err := loadSuperblock(ctx, s.st, s.id)
	if err != nil {
		return err
	}
	s.found.Parent = sb.Parent
	for try := 1; ; try++ {
		err := s.look(ctx, sb)
		if errors.Is(err, backend.ErrNotFound) && try < separationTries {
			// A state that was given up since, or a checkpoint that was replaced.
			now, _, lerr := loadSuperblock(ctx, s.st, s.id)
			switch {
			case lerr != nil:
				return lerr
			case now.Removed:
				return ErrRemoved
			case !sameStates(sb, now):
				sb = now
				continue
			}
		}
		if err != nil || len(s.found.Needs) > 0 {
			return err
		}
		err = changeInsistently(ctx, s.st, s.id, func(now *superblock) error {
			sb = now
			switch {
			case now.Removed:
				return ErrRemoved
			case len(now.Origins) == 0:
				return errNothing
			case !s.seen(now):
				return errUnseen
			}
			now.Origins = nil
			return nil
		})
		if err == nil {
			return s.leave(ctx)
		}
		if !errors.Is(err, errUnseen) || try == separationTries {
			return err
		}
	}
}

// leave has the parent give up what it keeps for the image, and the image forget it. One that
// has been removed may be passed over meanwhile: then there is another parent.
func (s *separator) leave(ctx context.Context) error {
	for {
		sb, _, err := loadSuperblock(ctx, s.st, s.id)
		if err != nil || sb.Parent == uuid.Nil {
			return err
		}
		parent := sb.Parent
		if err := releaseClone(ctx, s.st, parent, s.id); err != nil && !errors.Is(err, backend.ErrNotFound) {
			return err
		}
		err = changeInsistently(ctx, s.st, s.id, func(now *superblock) error {
			if now.Parent != parent {
				return errNothing
			}
			now.Parent = uuid.Nil
			return nil
		})
		if err != nil {
			return err
		}
	}
}

// look looks at the states of the image that have not been looked at, and notes which need
// something of an ancestor.
func (s *separator) look(ctx context.Context, sb *superblock) error {
	s.found.Needs = nil
	if len(sb.Origins) == 0 || mutate.On(mutate.FlattenEarly) {
		return nil
	}
	for what, p := range sb.kept() {
		flat, err := s.isFlat(ctx, sb, p)
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		if !flat {
			s.found.Needs = append(s.found.Needs, what)
		}
	}
	return nil
}

// seen reports whether all states of the image have been looked at and need nothing of an
// ancestor.
func (s *separator) seen(sb *superblock) bool {
	if mutate.On(mutate.FlattenEarly) {
		return true
	}
	for _, p := range sb.kept() {
		if !p.empty() && (p.Checkpoint == nil || !s.flat[*p.Checkpoint]) {
			return false
		}
	}
	return true
}

// empty reports whether nothing has been written before a state.
func (p *point) empty() bool { return p.Settled && p.Object == 0 }

// isFlat reports whether a state needs nothing of an ancestor. What comes after a checkpoint of
// the image's own is its own.
func (s *separator) isFlat(ctx context.Context, sb *superblock, p *point) (bool, error) {
	c, line := p.Checkpoint, sb.lineage()
	if c == nil || !line.own(c.Object) {
		return p.empty(), nil
	}
	if flat, ok := s.flat[*c]; ok {
		return flat, nil
	}
	parts, err := loadParts(ctx, s.st, sb, &point{Object: c.Object, Checkpoint: c, Settled: true})
	if err != nil {
		return false, err
	}
	flat := true
	for n, o := range parts.data {
		flat = flat && (!o.needed || line.own(n))
	}
	for m, needed := range parts.maps {
		flat = flat && (!needed || line.own(m.at.Object))
	}
	s.flat[*c] = flat
	return flat, nil
}

// kept calls yield for all states that the image keeps, with what they are in a few words. A
// snapshot that has only been asked for is not among them: it is going to be of the present
// state, or of a later one.
func (s *superblock) kept() iter.Seq2[string, *point] {
	return func(yield func(string, *point) bool) {
		if !yield(PresentState, &point{Object: maxObjectSeq, Checkpoint: s.Checkpoint}) {
			return
		}
		for i := range s.Points {
			if p := &s.Points[i]; !yield("the write log of "+p.Host+" that was cut off", &p.point) {
				return
			}
		}
		for p := range s.named() {
			what := "snapshot "
			if s.snapshotNamed(p.Name) != p {
				what = "clone "
			}
			if p.Settled && !yield(what+p.Name, &p.point) {
				return
			}
		}
		for i := range s.Forgotten {
			if p := &s.Forgotten[i]; p.Checkpoint != nil && !yield("a state that is being removed", p) {
				return
			}
		}
	}
}
