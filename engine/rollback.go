package engine

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
)

// RollbackOptions says how an image is rolled back.
type RollbackOptions struct {
	URL   string // names the image in messages
	Clock Clock  // nil means Real{}
	// Parallel is how many reads from the store are made at one time; 0 means a default. 1
	// makes their order certain.
	Parallel int
}

// Rollback makes the image id what it was at the snapshot of that name, its size included.
// It is one change of the superblock, whatever is in the image. All snapshots stay; what only
// the state until now was made of is removed by whoever attaches the image next. One that is
// attached is refused with an OwnedError, and so is one that a command has that lives; where
// there is no such snapshot the error matches ErrNoSnapshot.
func Rollback(ctx context.Context, st backend.Store, id uuid.UUID, name string, o RollbackOptions) error {
	if o.Clock == nil {
		o.Clock = Real{}
	}
	p := patient{st, o.Clock}
	if err := endCommand(ctx, p, id, OpenOptions{URL: o.URL, Clock: o.Clock}); err != nil {
		return err
	}
	try := uuid.New() // so that an attempt is known of which the answer is lost
	var before *uuid.UUID
	return p.try(ctx, func() error {
		_, _, err := changeSuperblock(ctx, p, id, func(sb *superblock) error {
			switch {
			case sb.RolledBack == try:
				return errNothing
			case before == nil:
				was := sb.RolledBack
				before = &was
			case sb.RolledBack != *before:
				return errors.New("somebody else has rolled the image back meanwhile: look at it, and try again")
			}
			to := sb.snapshotNamed(name)
			switch {
			case sb.Removed:
				return ErrRemoved
			case to == nil:
				return fmt.Errorf("%w: %s", ErrNoSnapshot, name)
			case !to.Settled:
				return fmt.Errorf("snapshot %s has been asked for, and not been taken yet", name)
			case sb.Owner != nil:
				return owned(sb.Owner, &OpenOptions{URL: o.URL})
			case sb.Epoch == maxEpoch:
				return errors.New("the image has been attached more often than it can be")
			}
			end, err := runEnd(ctx, p, sb, o.Parallel)
			if err != nil {
				return fmt.Errorf("find the end of the image: %w", err)
			}
			if end.object >= lastWritten {
				return errors.New("the image has used up its numbers for objects: copy it to a new one")
			}
			sb.rollBack(to, end)
			sb.RolledBack = try
			return nil
		})
		return err
	})
}

// rollBack makes the state of a snapshot the present one; that until now ends at a position.
// It is as an attach that ends at once, so whatever an earlier owner still puts is no part
// of the image.
func (s *superblock) rollBack(to *snapshot, end position) {
	s.settleEnd(end.object, s.unsettled())
	s.dropIntent()
	before := point{Object: end.object, Settled: true, Checkpoint: s.Checkpoint, Seq: s.Seq}
	s.Epoch++
	b := rollback{Object: end.object + 1, From: to.Object, Seq: end.seq}
	s.Epochs = append(s.Epochs, epochStart{Epoch: s.Epoch, Object: b.Object, Seq: end.seq + 1})
	s.Rollbacks = append(s.Rollbacks, b)
	// Of several points at this state that which goes back to the last checkpoint, and so it
	// is if the image is at it: what another one's is made of would not be known to the image.
	base := to.point
	later := func(p *point) {
		if p.Settled && p.Object == base.Object && p.base() > base.base() {
			base = *p
		}
	}
	later(&before)
	for p := range s.states() {
		later(p)
	}
	s.Checkpoint, s.Seq = base.Checkpoint, base.Seq
	s.setSectors(to.Sectors)
	s.forget(before)
}

// settleEnd notes that the ownership that was the last one ends after that object: so do the
// points of which this was not known. What it may have left beyond is stale, if it may.
func (s *superblock) settleEnd(object uint64, left bool) {
	if before := s.epochOf(object + 1); before > 0 && left {
		s.Stale = append(s.Stale, staleObjects{Epoch: before, Object: object + 1})
	}
	s.Loose = false
	for i := range s.Points {
		if p := &s.Points[i]; !p.Settled {
			p.Object, p.Settled = object, true
		}
	}
}
