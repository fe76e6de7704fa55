package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/internal/frame"
	"github.com/lsd-ceph/lsd/internal/mutate"
)

// snapshot is a point with a name. It is asked for in the superblock first, by anybody;
// whoever owns the image then brings what it has taken so far into the store, and settles
// it there. While one is asked for nothing that has died is removed. If nobody owns the
// image, it is settled at once.
type snapshot struct {
	point
	ID      uuid.UUID `json:"id"`
	Name    string    `json:"name"`
	Since   time.Time `json:"since"`   // when it was asked for, by the clock of who did
	Sectors uint64    `json:"sectors"` // of the image then
	Last    uint64    `json:"last"`    // the last record in the state
	// Made says, of the state that a clone begins with, that the clone is there: ID is the
	// clone's, and Name the one that it was made under.
	Made bool `json:"made,omitempty"`
	// Of is the snapshot that was cloned, of such a state; uuid.Nil where it was none, and where
	// an earlier lsd has made it.
	Of uuid.UUID `json:"of,omitzero"`
}

// named calls yield for the snapshots, and for the states that clones begin with.
func (s *superblock) named() iter.Seq[*snapshot] {
	return func(yield func(*snapshot) bool) {
		for _, list := range [][]snapshot{s.Snapshots, s.Clones} {
			for i := range list {
				if !yield(&list[i]) {
					return
				}
			}
		}
	}
}

// MaxClones is how many clones of it there may be.
const MaxClones = 4096

// MaxSnapshots is how many snapshots an image may have: each renewal of its lease writes
// all of them.
const MaxSnapshots = 1024

// Snapshot is what a store says of a snapshot.
type Snapshot struct {
	ID      uuid.UUID `json:"id"`
	Name    string    `json:"name"`
	Created time.Time `json:"created"`
	Size    uint64    `json:"size_bytes"` // of the image then
	// Pending says that it has been asked for, and that the image's owner has not taken it.
	Pending bool `json:"pending,omitempty"`
}

func (p *snapshot) describe() Snapshot {
	return Snapshot{ID: p.ID, Name: p.Name, Created: p.Since, Size: p.Sectors * SectorSize, Pending: !p.Settled}
}

// validSnapshots reports whether the snapshots are such as there can be.
func (s *superblock) validSnapshots() bool {
	if len(s.Snapshots) > MaxSnapshots || len(s.Clones) > MaxClones {
		return false
	}
	names := make(map[string]bool, len(s.Snapshots))
	ids := make(map[uuid.UUID]bool, len(s.Snapshots))
	for p := range s.named() {
		if p.ID == uuid.Nil || ids[p.ID] || backend.CheckSnapshotName(p.Name) != nil ||
			!p.Settled && p.Checkpoint != nil || p.Sectors == 0 || p.Sectors > MaxSize/SectorSize {
			return false
		}
		ids[p.ID] = true
	}
	for i := range s.Snapshots {
		if names[s.Snapshots[i].Name] {
			return false
		}
		names[s.Snapshots[i].Name] = true
	}
	return true
}

// snapshotNamed returns the snapshot of that name, or nil.
func (s *superblock) snapshotNamed(name string) *snapshot {
	if i := slices.IndexFunc(s.Snapshots, func(p snapshot) bool { return p.Name == name }); i >= 0 {
		return &s.Snapshots[i]
	}
	return nil
}

// snapshotOf returns the snapshot of that id, or the state that the clone of that id begins
// with, or nil.
func (s *superblock) snapshotOf(id uuid.UUID) *snapshot {
	for p := range s.named() {
		if p.ID == id {
			return p
		}
	}
	return nil
}

// settle says that the snapshot of that id, or the state that the clone of that id begins
// with, if there is one, is the state at a position, which is the last one accepted. The last checkpoint is not past it: one that
// begins later is published later.
func (s *superblock) settle(id uuid.UUID, at position) {
	p := s.snapshotOf(id)
	if p == nil || p.Settled {
		return
	}
	if c := s.Checkpoint; c != nil {
		if c.Object > at.object {
			panic("engine: a checkpoint is past the snapshot that it was to be the base of")
		}
		ref := *c
		p.Checkpoint, p.Seq = &ref, s.Seq
	}
	p.Object, p.Last, p.Sectors, p.Settled = at.object, at.seq, s.Sectors, true
}

// SnapshotOptions says how a snapshot is made.
type SnapshotOptions struct {
	// Nudge tells the image's owner, if it is known how, that the superblock asks for
	// something, and returns when that is done or cannot be. May be nil: the owner looks at
	// its next renewal of the lease.
	Nudge func(context.Context) error
	// Epoch is that of the ownership in which the snapshot is asked for: if it has ended, none
	// is made, of what another one has written. 0: whoever owns the image.
	Epoch uint64
	// Clock may be nil, which means Real{}.
	Clock Clock
	// Parallel is how many reads from the store are made at one time; 0 means a default. 1
	// makes their order certain.
	Parallel int
	// Progress is told in a few words what is being waited for; may be nil.
	Progress func(string)
}

// Errors of snapshots; they are matched.
var (
	ErrSnapshotExists = errors.New("there is a snapshot of that name already")
	ErrNoSnapshot     = errors.New("no such snapshot")
)

// errWithdrawn says that somebody has removed what another one was waiting for.
var errWithdrawn = errors.New("somebody has withdrawn it meanwhile")

// snapshotPause is the time between two looks at whether an owner has made a snapshot.
const snapshotPause = 200 * time.Millisecond

// CreateSnapshot makes a snapshot of the image id as it is now, whoever has it attached,
// and returns when it is there. Of an image that is attached it is a point in the order of
// writes, after all that were acknowledged before. It fails with ErrSnapshotExists where the
// name is taken. When ctx ends before the image's owner has made it, it is withdrawn.
func CreateSnapshot(ctx context.Context, st backend.Store, id uuid.UUID, name string, o SnapshotOptions) (Snapshot, error) {
	if err := backend.CheckSnapshotName(name); err != nil {
		return Snapshot{}, err
	}
	m := newSnapshotMaker(st, id, name, o.withDefaults())
	m.add = (*superblock).addSnapshot
	made, err := m.make(ctx)
	if err != nil {
		return Snapshot{}, err
	}
	return made.describe(), nil
}

func (o SnapshotOptions) withDefaults() SnapshotOptions {
	if o.Clock == nil {
		o.Clock = Real{}
	}
	if o.Progress == nil {
		o.Progress = func(string) {}
	}
	return o
}

func newSnapshotMaker(st backend.Store, id uuid.UUID, name string, o SnapshotOptions) *snapshotMaker {
	return &snapshotMaker{
		st: patient{st, o.Clock}, image: id, o: o,
		want: snapshot{ID: uuid.New(), Name: name, Since: time.Now().UTC().Truncate(time.Second)},
	}
}

// snapshotMaker makes one snapshot.
type snapshotMaker struct {
	st    patient
	image uuid.UUID
	o     SnapshotOptions
	want  snapshot
	add   func(*superblock, snapshot) error // adds it to those of the superblock
	asked bool                              // the superblock has had it, or may have
	seen  bool                              // it has been found there
}

// addSnapshot adds a snapshot, whose name is to be free.
func (s *superblock) addSnapshot(p snapshot) error {
	switch {
	case s.snapshotNamed(p.Name) != nil:
		return fmt.Errorf("%w: %s", ErrSnapshotExists, p.Name)
	case len(s.Snapshots) == MaxSnapshots:
		return fmt.Errorf("the image has %d snapshots, which is the limit: remove some first", MaxSnapshots)
	}
	s.Snapshots = append(s.Snapshots, p)
	return nil
}

// make asks for the snapshot, and waits until it is there. Once the superblock may have it,
// an answer that is lost or damaged is no reason to go: it would be made all the same.
func (m *snapshotMaker) make(ctx context.Context) (*snapshot, error) {
	who := "the owner"
	var last error // of a look at the superblock
	for {
		sb, err := m.ask(ctx)
		last = err
		switch {
		case err != nil && !m.asked:
			return nil, err
		case errors.Is(err, errWithdrawn):
			return nil, err
		case err != nil && !again(ctx, err):
			return m.withdraw(ctx, who, err)
		case err == nil:
			m.seen = true
			if made := sb.snapshotOf(m.want.ID); made.Settled {
				return made, nil
			}
			who = sb.Owner.Host + ", which has the image attached,"
			m.o.Progress("waiting for " + sb.Owner.Host)
			if m.o.Nudge != nil && m.o.Nudge(ctx) == nil {
				m.o.Nudge = nil // what it has not done by now takes its time
				continue
			}
			if sb.Owner.Volatile {
				// One that lives makes it in its time, as any owner does.
				_ = endCommand(ctx, m.st, m.image, OpenOptions{Clock: m.o.Clock})
			}
		}
		if err := m.o.Clock.Sleep(ctx, snapshotPause); err != nil {
			err = cmp.Or(context.Cause(ctx), err)
			if last != nil {
				err = fmt.Errorf("%w; %w", err, last)
			}
			return m.withdraw(ctx, who, err)
		}
	}
}

// again reports whether it makes sense to repeat what has failed with err.
func again(ctx context.Context, err error) bool {
	return ctx.Err() == nil && (errors.Is(err, backend.ErrTemporary) || errors.Is(err, frame.ErrCorrupt) || errors.Is(err, ErrCorrupt) || errors.Is(err, context.DeadlineExceeded))
}

// ask makes the superblock ask for the snapshot, and settles it if nobody owns the image.
// Once it has been asked for, it looks what has become of it.
func (m *snapshotMaker) ask(ctx context.Context) (sb *superblock, err error) {
	err = m.st.try(ctx, func() error {
		sb, _, err = changeSuperblock(ctx, m.st, m.image, func(sb *superblock) error { return m.change(ctx, sb) })
		return err
	})
	return sb, err
}

func (m *snapshotMaker) change(ctx context.Context, sb *superblock) error {
	have := sb.snapshotOf(m.want.ID)
	switch {
	case sb.Removed:
		return ErrRemoved
	case have == nil && m.seen:
		return errWithdrawn
	case have != nil && (have.Settled || sb.Owner != nil):
		return errNothing
	case have == nil && m.o.Epoch != 0 && (sb.Owner == nil || sb.Epoch != m.o.Epoch):
		return errors.New("another one has taken the image meanwhile")
	case have == nil && sb.Sectors == 0:
		return ErrEmpty
	case have == nil: // also where an attempt of which we know nothing has come to nothing
		m.want.Sectors = sb.Sectors
		if err := m.add(sb, m.want); err != nil {
			return err
		}
	}
	if sb.Owner != nil || sb.snapshotOf(m.want.ID).Settled {
		m.asked = true
		return nil
	}
	end, err := runEnd(ctx, m.st, sb, m.o.Parallel)
	if err != nil {
		return fmt.Errorf("find the end of the image: %w", err)
	}
	sb.settle(m.want.ID, end)
	m.asked = true
	return nil
}

// withdraw gives the snapshot up, unless it is there after all. who has not made it, and why
// says what has ended the wait.
func (m *snapshotMaker) withdraw(ctx context.Context, who string, why error) (made *snapshot, err error) {
	ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer stop()
	err = m.st.try(ctx, func() error {
		_, _, err := changeSuperblock(ctx, m.st, m.image, func(sb *superblock) error {
			if made = sb.snapshotOf(m.want.ID); made == nil || made.Settled {
				return errNothing
			}
			made = nil
			sb.dropSnapshot(m.want.ID)
			return nil
		})
		return err
	})
	switch {
	case err != nil:
		return nil, fmt.Errorf("%s has not made it (%w), and it cannot be withdrawn: it may be made later: %w", who, why, err)
	case made != nil:
		return made, nil
	}
	return nil, fmt.Errorf("%s has not made it: it is withdrawn; see lsdctl status there: %w", who, why)
}

// runEnd returns where an image ends, in the store, that nobody owns. It reads no more than
// what was put after the last checkpoint, unless that does not say which record was its last.
func runEnd(ctx context.Context, st backend.Store, sb *superblock, parallel int) (position, error) {
	im := newImage(ctx, st, sb, &OpenOptions{ReadOnly: true, Parallel: parallel})
	defer im.dropUnopened()
	at := position{}
	if sb.Checkpoint != nil {
		at = position{object: sb.Checkpoint.Object, seq: sb.Seq}
	}
	if sb.Checkpoint != nil && sb.Seq == 0 {
		m, err := im.loadManifest(ctx, *sb.Checkpoint)
		if err != nil {
			return at, err
		}
		at = m.at
	}
	_, err := im.headers(ctx, sb, at, maxObjectSeq, endFinder{&at})
	return at, err
}

// dropSnapshot gives up the snapshot of that id, or the state that the clone of that id begins
// with, if there is one.
func (s *superblock) dropSnapshot(id uuid.UUID) {
	if p := s.snapshotOf(id); p != nil {
		at, its := p.point, func(p snapshot) bool { return p.ID == id }
		s.Snapshots, s.Clones = slices.DeleteFunc(s.Snapshots, its), slices.DeleteFunc(s.Clones, its)
		s.forget(at)
	}
}

// Snapshots returns the snapshots of the image id, in the order in which they were asked
// for.
func Snapshots(ctx context.Context, st backend.Store, id uuid.UUID) ([]Snapshot, error) {
	sb, _, err := loadSuperblock(ctx, st, id)
	if err != nil {
		return nil, err
	}
	return describeAll(sb.Snapshots), nil
}

func describeAll(snapshots []snapshot) []Snapshot {
	list := make([]Snapshot, len(snapshots))
	for i := range snapshots {
		list[i] = snapshots[i].describe()
	}
	return list
}

// RemoveSnapshot removes the snapshot of that name of the image id, or withdraws it if it
// has only been asked for. It fails with ErrNoSnapshot where there is none. Whoever owns
// the image, or attaches it next, reclaims the space.
func RemoveSnapshot(ctx context.Context, st backend.Store, id uuid.UUID, name string) error {
	return changeSnapshot(ctx, st, id, name, func(sb *superblock, p *snapshot) error {
		sb.dropSnapshot(p.ID)
		return nil
	})
}

// RenameSnapshot gives a snapshot of the image id another name. It fails with ErrNoSnapshot
// where there is none, and with ErrSnapshotExists where the new name is taken.
func RenameSnapshot(ctx context.Context, st backend.Store, id uuid.UUID, from, to string) error {
	if err := backend.CheckSnapshotName(to); err != nil {
		return err
	}
	return changeSnapshot(ctx, st, id, from, func(sb *superblock, p *snapshot) error {
		if sb.snapshotNamed(to) != nil {
			return fmt.Errorf("%w: %s", ErrSnapshotExists, to)
		}
		p.Name = to
		return nil
	})
}

// changeSnapshot changes the snapshot of that name. An answer that was lost does not make
// it do that twice.
func changeSnapshot(ctx context.Context, st backend.Store, id uuid.UUID, name string, change func(*superblock, *snapshot) error) error {
	var of uuid.UUID // of the snapshot that is being changed
	return changeInsistently(ctx, st, id, func(sb *superblock) error {
		s := sb.snapshotNamed(name)
		switch {
		case of != uuid.Nil && (s == nil || s.ID != of):
			return errNothing // that was us
		case s == nil:
			return fmt.Errorf("%w: %s", ErrNoSnapshot, name)
		}
		of = s.ID
		return change(sb, s)
	})
}

// takeSnapshots begins to take the snapshots that the superblock asks for, as the image is
// now.
func (im *Image) takeSnapshots() {
	for p := range im.super.sb.named() {
		if !p.Settled && !im.taking[p.ID] {
			im.takeSnapshot(p.ID)
		}
	}
	im.tellRefreshed()
}

func (im *Image) takeSnapshot(id uuid.UUID) {
	if im.taking == nil {
		im.taking = map[uuid.UUID]bool{}
	}
	im.taking[id] = true
	destage := im.Destage
	if mutate.On(mutate.SnapshotEarly) {
		destage = func(fn func(error)) { fn(nil) }
	}
	destage(func(err error) {
		if err != nil {
			return // the next owner takes it
		}
		// All that had been submitted is accepted, and nothing beyond.
		at := im.accepted
		im.changeSuper(func(sb *superblock) { sb.settle(id, at) }, func() { delete(im.taking, id) })
	})
}

// refresher wants what the superblock asks for done.
type refresher struct {
	seen bool // the superblock has been looked at since
	fn   func(error)
}

// Refresh looks at the superblock, which somebody else has changed, and does what it asks
// for: fn is told when that is done, or with the error with which the image's service ends
// before. It is called on the reactor.
func (im *Image) Refresh(fn func(error)) {
	switch {
	case im.readOnly:
		fn(nil)
		return
	case im.state == Fenced || im.state == Released:
		fn(im.why)
		return
	}
	r := &refresher{fn: fn}
	im.refreshers = append(im.refreshers, r)
	im.changeSuper(func(*superblock) {}, func() {
		r.seen = true
		im.tellRefreshed()
	})
}

// tellRefreshed tells those who wait for what the superblock asks for.
func (im *Image) tellRefreshed() {
	if len(im.refreshers) == 0 || im.super.sb.asked() {
		return
	}
	waiting := im.refreshers
	im.refreshers = nil
	for _, r := range waiting {
		if r.seen {
			r.fn(nil)
		} else {
			im.refreshers = append(im.refreshers, r)
		}
	}
}

// endRefreshing tells those who wait for what the superblock asks for that it is not done
// here.
func (im *Image) endRefreshing(why error) {
	waiting := im.refreshers
	im.refreshers = nil
	for _, r := range waiting {
		r.fn(why)
	}
}

// pointsChanged is told of each new superblock: points that are gone may have held what can
// be removed now, and so may snapshots that were asked for and are settled.
func (im *Image) pointsChanged(before *superblock) {
	sb := im.super.sb
	if !sb.fewerPoints(before) {
		if before.asked() && !sb.asked() {
			im.clean.heldSpace, im.clean.heldLive = 0, 0
			im.table.reconsider()
			im.reap()
		}
		return
	}
	im.clean.heldSpace, im.clean.heldLive = 0, 0
	im.table.reconsider()
	im.removeManifests(slices.DeleteFunc(slices.Clone(sb.Prev), func(c checkpointRef) bool { return slices.Contains(before.Prev, c) }))
	if len(sb.Points) < len(before.Points) {
		im.startLeftovers() // those of owners that had been cut off
	}
	im.checkpoint.removeDead()
	im.reap()
}

// asked reports whether there is a snapshot that has not been taken.
func (s *superblock) asked() bool {
	for p := range s.named() {
		if !p.Settled {
			return true
		}
	}
	return false
}

// fewerPoints reports whether the superblock before had points that this one has not. They
// keep their order.
func (s *superblock) fewerPoints(before *superblock) bool {
	same := func(p, q *snapshot) bool { return p.ID == q.ID }
	return lacks(s.Snapshots, before.Snapshots, same) || lacks(s.Clones, before.Clones, same) ||
		lacks(s.Points, before.Points, func(p, q *cutOff) bool { return p.Log == q.Log })
}

// lacks reports whether now has not all that was before, in the same order.
func lacks[T any](now, before []T, same func(*T, *T) bool) bool {
	i := 0
	for k := range before {
		for i < len(now) && !same(&now[i], &before[k]) {
			i++
		}
		if i == len(now) {
			return true
		}
	}
	return false
}
