package engine

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"math"
	"slices"
	"sort"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/internal/parallel"
)

// allOf stands for all of an object's data, whose size may not be known yet.
const allOf = math.MaxUint32

// integers yields 0 to n-1.
func integers(n int) iter.Seq[int] {
	return func(yield func(int) bool) {
		for i := range n {
			if !yield(i) {
				return
			}
		}
	}
}

// family measures images that are related. What they need of an object is taken for parts of
// each other: the larger has the smaller.
type family struct {
	*measurer
	images  []*usedImage
	objects []tally // of all the images' objects, image by image
	// holes says that it is not known what one of the images needs.
	holes bool

	// What the image needs that is being looked at, of each object; and which these are.
	live, need []uint32
	touched    []int
}

// tally is what is known of an object.
type tally struct {
	bytes   uint32 // of all of it
	sectors uint32 // of data
	known   bool   // the two above are
	needed  bool   // of objects without data
	// Sectors of data that present states refer to, that the image does which needs most, and
	// the one after that. The first of these two is the image at place most in the family.
	live, need, second uint32
	most               int32
}

// measure measures the images of a family.
func (m *measurer) measure(ctx context.Context, images []*usedImage) error {
	f := &family{measurer: m, images: images}
	for _, im := range images {
		im.first, im.done = len(f.objects), true
		for _, l := range im.list {
			f.objects = append(f.objects, tally{bytes: uint32(im.super), known: l.kind == KindSuperblock && im.super > 0})
		}
	}
	f.live, f.need = make([]uint32, len(f.objects)), make([]uint32, len(f.objects))
	for i, im := range images {
		m.o.Progress(fmt.Sprintf("looking at %s", im.usage.Name))
		if err := f.add(ctx, i, im); err != nil {
			return fmt.Errorf("image %s, %s: %w", im.id, im.usage.Name, err)
		}
	}
	if err := f.sizes(ctx, integers(len(f.objects))); err != nil {
		return err
	}
	f.sum()
	return nil
}

// add adds what the image at place i needs.
func (f *family) add(ctx context.Context, i int, im *usedImage) error {
	for try := 1; ; try++ {
		if im.sb == nil {
			f.holes = true
			return nil
		}
		err := f.states(ctx, im)
		if err == nil {
			break
		}
		if !damaged(err) {
			return err
		}
		f.drop()
		// Its owner may have gone on since its superblock was read, or its parent's.
		before, parent := im.sb.encode(), f.byID[im.sb.Parent]
		if err := f.reload(ctx, im); err != nil {
			return err
		}
		if parent != nil {
			if err := f.reload(ctx, parent); err != nil {
				return err
			}
		}
		if im.sb != nil && (try == checkTries || slices.Equal(before, im.sb.encode()) && try > 1) {
			im.usage.Error, f.holes = err.Error(), true
			return nil
		}
	}
	if err := f.sizes(ctx, slices.Values(f.touched)); err != nil {
		return err
	}
	f.fold(int32(i), im)
	return nil
}

// states adds what the states of an image refer to.
func (f *family) states(ctx context.Context, im *usedImage) error {
	sb := im.sb
	seen := map[checkpointRef]bool{}
	if !sb.Removed {
		if err := f.state(ctx, sb, &point{Object: maxObjectSeq, Checkpoint: sb.Checkpoint}, true, seen); err != nil {
			return err
		}
		for i := range sb.Points {
			if err := f.state(ctx, sb, &sb.Points[i].point, false, seen); err != nil {
				return err
			}
		}
		for i := range sb.Snapshots {
			if err := f.state(ctx, sb, &sb.Snapshots[i].point, false, seen); err != nil {
				return err
			}
		}
	}
	for i := range sb.Clones {
		// One that is being made, or is lost: it needs what it begins with.
		if c := f.byID[sb.Clones[i].ID]; c == nil || c.sb == nil {
			if err := f.state(ctx, sb, &sb.Clones[i].point, false, seen); err != nil {
				return err
			}
		}
	}
	if parent := f.byID[sb.Parent]; parent != nil && parent.sb != nil && !parent.sb.Removed && f.inUse(sb, map[uuid.UUID]bool{}) {
		if p := parent.sb.snapshotOf(im.id); p != nil {
			return f.state(ctx, parent.sb, &p.point, false, seen)
		}
	}
	return nil
}

// inUse reports whether an image has not been removed, or one that was cloned from it, or from
// its clones. seen are those that have been looked at.
func (f *family) inUse(sb *superblock, seen map[uuid.UUID]bool) bool {
	if !sb.Removed {
		return true
	}
	seen[sb.Image] = true
	return slices.ContainsFunc(sb.Clones, func(p snapshot) bool {
		c := f.byID[p.ID]
		return c == nil && !p.Made || c != nil && !seen[p.ID] && (c.sb == nil || f.inUse(c.sb, seen))
	})
}

// state adds what a state refers to, which the superblock sb leads to. seen are the checkpoints
// of which this has been done for the image, the present one's first: of the same objects that
// knows of no more.
func (f *family) state(ctx context.Context, sb *superblock, p *point, present bool, seen map[checkpointRef]bool) error {
	if !p.Settled && !present {
		return nil // it will be of what the present state is made of
	}
	line := sb.lineage()
	if c := p.Checkpoint; c != nil && !seen[*c] {
		m, err := loadManifest(ctx, f.st, line, *c, MaxSize/SectorSize)
		if err != nil {
			return err
		}
		seen[*c] = true
		f.manifest(line, m, present)
	}
	for _, r := range sb.pathTo(p.Object).after(p.base()) {
		f.replayed(sb, line, r, present)
	}
	return nil
}

// manifest adds what a checkpoint refers to.
func (f *family) manifest(line *lineage, m *manifest, present bool) {
	for _, o := range m.objects {
		i := f.find(line.of(uint64(o.number)), listed{o.number, o.epoch, 0, KindData})
		if i < 0 {
			continue
		}
		t := &f.objects[i]
		t.bytes, t.sectors, t.known = uint32(o.headerBytes())+o.sectors*SectorSize, o.sectors, true
		f.touch(i, o.live, present)
	}
	for _, o := range m.maps {
		if i := f.find(line.of(o.at.Object), listed{uint32(o.at.Object), uint32(o.at.Epoch), o.part, KindMap}); i >= 0 && o.size > 0 {
			t := &f.objects[i]
			t.bytes, t.known, t.needed = o.size, true, t.needed || o.live > 0
		}
	}
	for part, left := 0, m.size(); left > 0; part, left = part+1, left-manifestPart {
		if i := f.find(line.of(m.at.object), listed{uint32(m.at.object), uint32(m.epoch), uint32(part), KindManifest}); i >= 0 {
			f.objects[i] = tally{bytes: uint32(min(left, manifestPart)), known: true, needed: true}
		}
	}
}

// replayed adds the data objects of a run that are in the store.
func (f *family) replayed(sb *superblock, line *lineage, r run64, present bool) {
	from := r.after + 1
	for k := 0; k <= len(line.origins) && from <= r.last; k++ {
		id, last := line.image, r.last
		if k < len(line.origins) {
			id, last = line.origins[k].Image, min(last, line.origins[k].Last)
		}
		if im := f.byID[id]; im != nil && from <= last {
			i, _ := slices.BinarySearchFunc(im.list, listed{number: uint32(from), kind: KindData}, compareListed)
			for ; i < len(im.list) && im.list[i].kind == KindData && uint64(im.list[i].number) <= last; i++ {
				if uint64(im.list[i].epoch) == sb.epochOf(uint64(im.list[i].number)) {
					f.touch(im.first+i, allOf, present)
				}
			}
		}
		from = max(from, last+1)
	}
}

// find returns the place of an image's object among those of the family, -1 if it is not there.
func (f *family) find(id uuid.UUID, l listed) int {
	im := f.byID[id]
	if im == nil {
		return -1
	}
	i, ok := slices.BinarySearchFunc(im.list, l, compareListed)
	if !ok {
		return -1
	}
	return im.first + i
}

// touch notes that a state refers to so many sectors of the data of the object at place i.
func (f *family) touch(i int, sectors uint32, present bool) {
	if sectors == 0 {
		return
	}
	if f.need[i] == 0 {
		f.touched = append(f.touched, i)
	}
	f.need[i] = max(f.need[i], sectors)
	if present {
		f.live[i] = max(f.live[i], sectors)
	}
}

// drop forgets what the image needs that is being looked at.
func (f *family) drop() {
	for _, i := range f.touched {
		f.live[i], f.need[i] = 0, 0
	}
	f.touched = f.touched[:0]
}

// fold adds what the image at place who needs to what the family does.
func (f *family) fold(who int32, im *usedImage) {
	for _, i := range f.touched {
		t := &f.objects[i]
		live, need := min(f.live[i], t.sectors), min(f.need[i], t.sectors)
		im.usage.Live += uint64(live) * SectorSize
		im.usage.Snapshots += uint64(need-live) * SectorSize
		t.live = max(t.live, live)
		t.second = max(t.second, min(need, t.need))
		if need > t.need {
			t.need, t.most = need, who
		}
		t.needed = true
	}
	f.drop()
}

// imageAt returns the image whose object is at a place.
func (f *family) imageAt(place int) *usedImage {
	return f.images[sort.Search(len(f.images), func(k int) bool { return f.images[k].first+len(f.images[k].list) > place })]
}

// sizes finds out the sizes of the objects at these places, as far as they are not known.
func (f *family) sizes(ctx context.Context, places iter.Seq[int]) error {
	var list []int
	for p := range places {
		if !f.objects[p].known {
			list = append(list, p)
		}
	}
	const some = 1024
	for done := 0; done < len(list); done += some {
		f.o.Progress(fmt.Sprintf("asking for sizes of objects: %d of %d", done, len(list)))
		err := parallel.Each(f.o.Parallel, min(some, len(list)-done), func(k int) error {
			p := list[done+k]
			im, t := f.imageAt(p), &f.objects[p]
			l := im.list[p-im.first]
			size, data, err := f.size(ctx, l.key(im.id), l.kind)
			if err == nil {
				t.bytes, t.sectors, t.known = uint32(size), uint32(data/SectorSize), true
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// size returns the bytes of an object, and of its data; none if it is not there any more.
func (f *family) size(ctx context.Context, key string, kind ObjectKind) (size, data int64, err error) {
	if kind == KindData {
		b := make([]byte, objectFixed)
		n, err := f.st.Get(ctx, key, b, 0)
		if err != nil && !damaged(err) {
			return 0, 0, err
		}
		if err == nil {
			if header, herr := objectHeaderSize(b[:n]); herr == nil {
				data = int64(binary.LittleEndian.Uint32(b[92:]))
				size = int64(header) + data
			}
		}
	}
	got, err := f.st.Stat(ctx, key)
	switch {
	case errors.Is(err, backend.ErrNotFound):
		return 0, 0, nil
	case err != nil:
		return 0, 0, err
	case got.Size != size: // it has no data, or is damaged
		data = 0
	}
	return got.Size, data, nil
}

// sum adds up what the objects are.
func (f *family) sum() {
	for _, im := range f.images {
		for i, l := range im.list {
			t := &f.objects[im.first+i]
			switch {
			case l.kind == KindSuperblock && im.sb != nil, l.kind == KindAttributes && im.sb != nil && !im.sb.Removed:
				t.needed = true
			case l.kind == KindManifest || l.kind == KindMap:
				// A checkpoint that is being written.
				intent := im.sb != nil && sameRef(im.sb.Intent, &checkpointRef{uint64(l.number), uint64(l.epoch)})
				t.needed = t.needed || intent
			}
			f.count(im, t)
		}
	}
	for _, im := range f.images {
		im.usage.Shared = im.usage.Live + im.usage.Snapshots - im.usage.Alone
	}
}

// count adds up an object of an image.
func (f *family) count(im *usedImage, t *tally) {
	if t.bytes == 0 {
		return // it has gone since it was listed
	}
	f.out.Objects++
	bytes, data, need := uint64(t.bytes), uint64(t.sectors)*SectorSize, uint64(t.need)*SectorSize
	unneeded := bytes
	if t.needed {
		unneeded = data - need
		im.usage.Metadata += bytes - data
	}
	if f.holes || im.sb == nil {
		f.out.Unknown += unneeded
	} else {
		im.usage.Reclaimable += unneeded
	}
	if need == 0 {
		return
	}
	live, second := uint64(t.live)*SectorSize, uint64(t.second)*SectorSize
	f.out.Total.Live += live
	f.out.Total.Snapshots += need - live
	f.out.Total.Shared += second
	f.images[t.most].usage.Alone += need - second
}
