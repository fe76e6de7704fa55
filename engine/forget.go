package engine

import (
	"cmp"
	"context"
	"maps"
	"slices"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/internal/mutate"
)

// forgetter removes what only states are made of that are to be forgotten: states off the
// path to the present one. What is on that path the image's table and map know of. The
// reactor owns it.
//
// States are a tree, and an object is needed in a connected part of it, which begins where
// it was put. So what a state has goes with it if the present state and the points have
// nothing of it: whatever these go on to be made of is newer.
type forgetter struct {
	running bool // or waits for the next try
	waits   int
}

// forgetStates begins to remove what a state is made of that is to be forgotten, if there is
// one and none is under way.
func (im *Image) forgetStates() {
	f, sb := &im.forgetter, im.super.sb
	if f.running || len(sb.Forgotten) == 0 || im.state != Active {
		return
	}
	f.running = true
	state := sb.Forgotten[0]
	ours := im.mapNames()
	r := new(removal)
	var err error
	im.spawn(func() {
		var list []garbage
		list, err = garbageOf(im.ctx, prompt{im.store, im.cfg.StoreTimeout}, sb, &state, ours)
		r.left = list
	}, func() {
		if im.state == Fenced || im.state == Released {
			return
		}
		if err != nil {
			im.countStoreError(err)
			if f.waits == 0 {
				im.logger.Warn("cannot tell what a state was made of that is to be forgotten: it wastes space until that is possible", "err", err)
			}
			im.forgetLater()
			return
		}
		if mutate.On(mutate.StatesKept) {
			r.left = nil
		}
		im.remove(r, func() { im.forgotten(&state, r) })
	})
}

// forgotten ends the removal of what a state was made of.
func (im *Image) forgotten(state *point, r *removal) {
	if len(r.left) > 0 {
		im.forgetLater()
		return
	}
	im.changeSuper(func(sb *superblock) {
		sb.Forgotten = slices.DeleteFunc(sb.Forgotten, func(p point) bool { return p.same(state) })
		sb.dropManifest(state.Checkpoint)
		sb.pruneRollbacks()
	}, func() {
		im.forgetter = forgetter{}
		if c := state.Checkpoint; c != nil && slices.Contains(im.super.sb.Prev, *c) {
			im.removeManifests([]checkpointRef{*c})
		}
		im.forgetStates()
		im.flatten.step()
	})
}

// forgetLater tries again after a pause, which is longer the more there were.
func (im *Image) forgetLater() {
	f := &im.forgetter
	wait := min(im.cfg.RetryMin<<min(f.waits, 16), leftoverGrace)
	f.waits++
	im.env.AfterFunc(wait, func() {
		f.running = false
		im.forgetStates()
	})
}

// mapName names a map object.
type mapName struct {
	at   checkpointRef
	part uint32
}

// mapNames returns the map objects that the image knows of.
func (im *Image) mapNames() map[mapName]bool {
	names := make(map[mapName]bool, len(im.objs.maps))
	for _, o := range im.objs.maps {
		if o.size > 0 {
			names[mapName{o.at, o.part}] = true
		}
	}
	return names
}

// garbageOf returns what a state is made of that is to be forgotten, and nothing else.
// ours are the map objects that the image's present state knows of.
func garbageOf(ctx context.Context, st backend.Store, sb *superblock, state *point, ours map[mapName]bool) ([]garbage, error) {
	made, err := loadOwnParts(ctx, st, sb, state)
	if err != nil {
		return nil, err
	}
	head, path := sb.pathTo(maxObjectSeq), sb.pathTo(state.Object)
	line := sb.lineage()
	maps.DeleteFunc(made.data, func(n uint64, _ statePart) bool { return head.has(n) || !line.own(n) })
	maps.DeleteFunc(made.maps, func(m mapName, _ bool) bool { return ours[m] || !line.own(m.at.Object) })
	shared := head.common(path)
	for p := range sb.states() {
		if !p.Settled || mutate.On(mutate.StatesTorn) {
			continue
		}
		if n := sb.pathTo(p.Object).common(path); n < shared || n == shared && head.has(p.Object) {
			// What it has of the state is the present one's as well. One that parts from both
			// at the same place may know of map objects that the present one does not, which
			// has gone back to an older checkpoint.
			continue
		}
		needs, err := loadOwnParts(ctx, st, sb, p)
		if err != nil {
			return nil, err
		}
		maps.DeleteFunc(made.data, func(n uint64, _ statePart) bool { return needs.data[n].needed })
		maps.DeleteFunc(made.maps, func(m mapName, _ bool) bool { return needs.maps[m] })
	}
	list := make([]garbage, 0, len(made.data)+len(made.maps))
	for _, n := range slices.Sorted(maps.Keys(made.data)) {
		list = append(list, object(dataKey(sb.Image, n, made.data[n].epoch)))
	}
	byName := func(a, b mapName) int {
		return cmp.Or(cmp.Compare(a.at.Object, b.at.Object), cmp.Compare(a.at.Epoch, b.at.Epoch), cmp.Compare(a.part, b.part))
	}
	for _, m := range slices.SortedFunc(maps.Keys(made.maps), byName) {
		list = append(list, object(mapKey(sb.Image, m.at, m.part)))
	}
	return list, nil
}

// stateParts is what a state is made of, as its checkpoint's manifest and the numbers of the
// objects after that tell.
type stateParts struct {
	data map[uint64]statePart // by number
	maps map[mapName]bool     // the value says whether the state needs it, or only knows of it
}

// statePart is a data object of a state.
type statePart struct {
	epoch  uint64
	needed bool // else the state only knows of it
}

// loadOwnParts is loadParts without what ancestors have: where the checkpoint is an
// ancestor's its manifest lists nothing else, and may be gone.
func loadOwnParts(ctx context.Context, st backend.Store, sb *superblock, p *point) (*stateParts, error) {
	if c := p.Checkpoint; c == nil || sb.lineage().own(c.Object) {
		return loadParts(ctx, st, sb, p)
	}
	parts := &stateParts{data: map[uint64]statePart{}, maps: map[mapName]bool{}}
	parts.replayed(sb, p)
	return parts, nil
}

func loadParts(ctx context.Context, st backend.Store, sb *superblock, p *point) (*stateParts, error) {
	parts := &stateParts{data: map[uint64]statePart{}, maps: map[mapName]bool{}}
	if p.Checkpoint != nil {
		m, err := loadManifest(ctx, st, sb.lineage(), *p.Checkpoint, MaxSize/SectorSize)
		if err != nil {
			return nil, err
		}
		for _, o := range m.objects {
			parts.data[uint64(o.number)] = statePart{uint64(o.epoch), o.live > 0}
		}
		for _, o := range m.storedMap.maps {
			if o.size > 0 {
				parts.maps[mapName{o.at, o.part}] = o.live > 0
			}
		}
	}
	parts.replayed(sb, p)
	return parts, nil
}

// replayed adds the data objects after a state's checkpoint.
func (s *stateParts) replayed(sb *superblock, p *point) {
	for _, r := range sb.pathTo(p.Object).after(p.base()) {
		for n := r.after + 1; n <= r.last; n++ {
			s.data[n] = statePart{sb.epochOf(n), true}
		}
	}
}
