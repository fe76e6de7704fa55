package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
)

// errBusy ends a repair when the image turns out not to be left alone.
var errBusy = errors.New("the image was attached or changed meanwhile: nothing more is repaired")

// repair plans, and with Repair does, what loses nothing: orphans and what earlier
// owners have left are removed, and wrong counts of live sectors are corrected.
func (c *checker) repair(ctx context.Context) error {
	for _, key := range c.rep.Stale {
		c.rep.Repairs = append(c.rep.Repairs, Repair{Object: key, What: "remove what an earlier owner has left"})
	}
	counts := len(c.counts) > 0 && len(c.rep.Errors) > 0 && !c.otherErrors()
	if counts {
		c.rep.Repairs = append(c.rep.Repairs, Repair{Object: c.manifestOf(c.reach.head), What: fmt.Sprintf("write the checkpoint anew, with %d counts corrected", len(c.counts))})
	}
	if !c.o.Repair || len(c.rep.Repairs) == 0 {
		return nil
	}
	if c.reach.sb.Owner != nil {
		return nil // describe has said so
	}
	last := len(c.rep.Repairs)
	if counts {
		last--
	}
	for i := range c.rep.Repairs[:last] {
		r := &c.rep.Repairs[i]
		if err := c.removeLeft(ctx, r.Object); err != nil {
			return c.stopped(err)
		}
		c.mended(r)
	}
	if counts {
		if err := c.mendCounts(ctx); err != nil {
			return c.stopped(err)
		}
		c.mended(&c.rep.Repairs[last])
	}
	return nil
}

// otherErrors reports whether something is wrong with the image's state beside the
// counts: then the map is not what they can be taken from.
func (c *checker) otherErrors() bool {
	for _, f := range c.rep.Errors {
		if f.Action != mendCounts && f.Action != rmOrphan {
			return true
		}
	}
	return false
}

// stopped makes a note of the error for which a repair has ended early, if it is no
// error of the store.
func (c *checker) stopped(err error) error {
	if errors.Is(err, errBusy) {
		c.rep.Notes = append(c.rep.Notes, err.Error())
		return nil
	}
	return err
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

// mendCounts takes the image, writes its checkpoint again with right counts, and
// lets go of it. A crash meanwhile leaves an owner and an intent, which the next
// attach deals with as with any others.
func (c *checker) mendCounts(ctx context.Context) error {
	m := *c.reach.head.m
	old := *c.reach.head.ref
	c.correct(&m)
	log := uuid.New() // there is none
	sb := c.reach.sb.clone()
	sb.Epoch++
	if sb.Epoch > maxEpoch {
		return errors.New("the image has been attached more often than it can be")
	}
	m.epoch = sb.Epoch
	ref := m.ref()
	sb.Owner = &owner{Host: c.o.Host + " (lsdctl check)", Log: log, Lease: DefaultLease, Since: time.Now().UTC().Truncate(time.Second)}
	if c := sb.Intent; c != nil {
		sb.Stale = append(sb.Stale, staleObjects{Epoch: c.Epoch, Object: c.Object, Checkpoint: true})
	}
	sb.Intent = &ref
	version, err := c.swap(ctx, c.version, sb)
	if err != nil {
		return err
	}
	if err := putManifest(ctx, c.st, &m, m.encode()); err != nil {
		return fmt.Errorf("write the checkpoint: %w", err)
	}
	sb.Intent, sb.Owner = nil, nil
	sb.Checkpoint, sb.Prev = &ref, append(sb.Prev, old)
	if version, err = c.swap(ctx, version, sb); err != nil {
		return err
	}
	if sb.heldManifest(old) {
		return nil
	}
	if err := deleteParts(ctx, c.st, func(part int) string { return manifestKey(c.id, old, part) }, 1); err != nil {
		return fmt.Errorf("remove the checkpoint that was wrong: %w", err)
	}
	sb.Prev = slices.DeleteFunc(sb.Prev, func(p checkpointRef) bool { return p == old })
	_, err = c.swap(ctx, version, sb)
	return err
}

// swap changes the superblock, if nobody else has.
func (c *checker) swap(ctx context.Context, old backend.Version, sb *superblock) (backend.Version, error) {
	v, err := c.st.Swap(ctx, SuperblockKey(c.id), old, sb.encode())
	if errors.Is(err, backend.ErrConflict) {
		return "", errBusy
	}
	if err != nil {
		return "", fmt.Errorf("change the superblock of image %s: %w", c.id, err)
	}
	return v, nil
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
