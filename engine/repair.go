package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/lsd-ceph/lsd/backend"
)

// errBusy ends a repair when the image turns out not to be left alone.
var errBusy = errors.New("the image was attached or changed meanwhile: nothing more is repaired")

// repair plans, and with Repair does, what loses nothing: orphans and what earlier
// owners have left are removed, and wrong counts of live sectors are corrected.
func (c *checker) repair(ctx context.Context) error {
	// Of each checkpoint the last part goes first, as in deleteParts.
	stale := slices.Clone(c.rep.Stale)
	slices.SortStableFunc(stale, func(a, b string) int { return cmp.Compare(parseKey(c.id, b).part, parseKey(c.id, a).part) })
	for _, key := range stale {
		c.rep.Repairs = append(c.rep.Repairs, Repair{Object: key, What: "remove what an earlier owner has left"})
	}
	counts := len(c.counts) > 0 && len(c.rep.Errors) > 0 && !c.otherErrors()
	if counts {
		c.rep.Repairs = append(c.rep.Repairs, Repair{Object: c.manifestOf(c.reach.head), What: fmt.Sprintf("write the checkpoint anew, with %d counts corrected", len(c.counts))})
	}
	if !c.o.Repair || len(c.rep.Repairs) == 0 {
		return nil
	}
	if c.rep.AttachedBy != "" {
		return nil // describe has said so
	}
	err := c.mend(ctx, counts)
	if errors.Is(err, errBusy) {
		c.rep.Notes = append(c.rep.Notes, err.Error())
		return nil
	}
	return err
}

// mend does what repair has planned; counts says that the last of it is to correct
// them.
func (c *checker) mend(ctx context.Context, counts bool) error {
	if c.reach.sb.Owner != nil || counts && c.version != c.counted {
		return errBusy // the counts may be those of a map that is not the image's any more
	}
	// Another repair may be at work on a checkpoint that is announced, or have died
	// at it. From now on it cannot be published, and what is there of it can go.
	if c.reach.sb.Intent != nil {
		if err := c.change(ctx, (*superblock).dropIntent); err != nil {
			return err
		}
	}
	list := c.rep.Repairs
	if counts {
		list = list[:len(list)-1]
	}
	for i := range list {
		if err := c.removeLeft(ctx, list[i].Object); err != nil {
			return err
		}
		c.mended(&list[i])
	}
	if counts {
		return c.mendCounts(ctx, &c.rep.Repairs[len(list)])
	}
	return nil
}

// otherErrors reports whether something is wrong with the image's state beside the
// counts, orphans and metadata: then the map is not what they can be taken from.
func (c *checker) otherErrors() bool {
	for _, f := range c.rep.Errors {
		if f.Action != mendCounts && f.Action != rmOrphan && f.Action != clearMeta {
			return true
		}
	}
	return false
}

func (c *checker) mended(r *Repair) {
	r.Done = true
	for i := range c.rep.Errors {
		if f := &c.rep.Errors[i]; f.Object == r.Object && (f.Action == rmOrphan || f.Action == mendCounts) {
			f.Mended = true
		}
	}
}

// removeLeft deletes an object that nothing needs, of an image that is still as it
// was when that was found out.
func (c *checker) removeLeft(ctx context.Context, key string) error {
	_, version, err := loadSuperblock(ctx, c.st, c.id)
	if err != nil {
		return err
	}
	if version != c.version {
		return errBusy
	}
	if err := c.st.Delete(ctx, key); err != nil && !errors.Is(err, backend.ErrNotFound) {
		return fmt.Errorf("remove %s: %w", key, err)
	}
	return nil
}

// mendCounts writes the head's checkpoint again with right counts, as an owner
// writes one: the superblock announces it, the manifest is put, the superblock
// publishes it. Nobody becomes the owner for that. Each change is of the superblock
// as the one before has left it, so whoever attaches the image meanwhile has it, and
// this comes to nothing; and a crash leaves an announced checkpoint, or one that has
// been replaced, which the next attach removes as any other. The new epoch, which
// nobody owns, gives the manifest a name that is never used again.
func (c *checker) mendCounts(ctx context.Context, r *Repair) error {
	m, old := *c.reach.head.m, *c.reach.head.ref
	c.correct(&m)
	if c.reach.sb.Epoch == maxEpoch {
		return errors.New("the image has been attached more often than it can be")
	}
	m.epoch = c.reach.sb.Epoch + 1
	ref := m.ref()
	err := c.change(ctx, func(sb *superblock) { sb.Epoch, sb.Intent = ref.Epoch, &ref })
	if err != nil {
		return err
	}
	if err := putManifest(ctx, c.st, &m, m.encode()); err != nil {
		return fmt.Errorf("write the checkpoint: %w", err)
	}
	err = c.change(ctx, func(sb *superblock) { sb.exchangeCheckpoint(ref) })
	if errors.Is(err, errBusy) {
		c.withdraw(ctx, &m)
	}
	if err != nil {
		return err
	}
	c.mended(r)
	if c.reach.sb.heldManifest(old) {
		return nil
	}
	if err := deleteParts(ctx, c.st, func(part int) string { return manifestKey(c.id, old, part) }, 1); err != nil {
		return fmt.Errorf("remove the checkpoint that was wrong: %w", err)
	}
	err = c.change(ctx, func(sb *superblock) { sb.dropStale(nil, []checkpointRef{old}) })
	if errors.Is(err, errBusy) {
		return nil // it is a new owner's to say so
	}
	return err
}

// exchangeCheckpoint publishes a checkpoint of the very state that the last one has,
// also for the points that go back to that one.
func (s *superblock) exchangeCheckpoint(ref checkpointRef) {
	old := *s.Checkpoint
	for p := range s.states() {
		if sameRef(p.Checkpoint, &old) {
			p.Checkpoint = &ref
		}
	}
	for i := range s.Forgotten {
		if p := &s.Forgotten[i]; sameRef(p.Checkpoint, &old) {
			p.Checkpoint = &ref
		}
	}
	s.Checkpoint, s.Intent = &ref, nil
	s.dropManifest(&old)
}

// withdraw removes a checkpoint that could not be published. A new owner does so, too,
// but what is put after it has looked for the last time would stay. What cannot be
// removed here is left to it.
func (c *checker) withdraw(ctx context.Context, m *manifest) {
	sb, _, err := loadSuperblock(ctx, c.st, c.id)
	if errors.Is(err, backend.ErrNotFound) { // the image has been removed
		sb, err = &superblock{Image: c.id}, nil
	}
	if err == nil && !sb.published(m.ref()) {
		_ = sb.manifestParts(m.ref(), m.parts()).remove(ctx, c.st)
	}
}

// change changes the superblock, if nobody else has.
func (c *checker) change(ctx context.Context, apply func(*superblock)) error {
	sb := c.reach.sb.clone()
	apply(sb)
	version, err := c.st.Swap(ctx, SuperblockKey(c.id), c.version, sb.encode())
	switch {
	case errors.Is(err, backend.ErrConflict):
		return errBusy
	case err != nil:
		return fmt.Errorf("change the superblock of image %s: %w", c.id, err)
	}
	c.reach.sb, c.version = sb, version
	return nil
}

// correct puts the right counts into a manifest. An object that turns out to be
// dead has died with the checkpoint's last object at the latest.
func (c *checker) correct(m *manifest) {
	m.objects = slices.Clone(m.objects)
	live := map[uint32]uint32{}
	for _, w := range c.counts {
		live[w.number] = w.live
	}
	for i := range m.objects {
		o := &m.objects[i]
		n, wrong := live[o.number]
		if !wrong {
			continue
		}
		if o.live, o.died = n, 0; n == 0 {
			o.died = uint32(m.at.object)
		}
	}
}
