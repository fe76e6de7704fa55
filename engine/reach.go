package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sort"
	"strconv"
	"strings"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
)

// ObjectKind says what an object of a store is to an image.
type ObjectKind byte

// Kinds of objects.
const (
	KindOther      ObjectKind = iota // no image's alone: names, lists
	KindSuperblock                   // of an image
	KindData                         // written blocks
	KindManifest                     // of a checkpoint
	KindMap                          // segments of the object map
	KindAttributes                   // what users keep beside an image
	ObjectKinds                      // their number
)

// String returns the kind in a word.
func (k ObjectKind) String() string {
	return [ObjectKinds]string{"other", "superblock", "data", "manifest", "map", "attributes"}[k]
}

// KindOf returns the kind of the object that a key names, by its form alone. It allocates nothing.
func KindOf(key string) ObjectKind {
	_, rest, _ := strings.Cut(key, "/")
	switch kind, _, deep := strings.Cut(rest, "/"); {
	case kind == "super" && !deep:
		return KindSuperblock
	case kind == "attributes" && !deep:
		return KindAttributes
	case kind == "d" && deep:
		return KindData
	case kind == "c" && deep:
		return KindManifest
	case kind == "m" && deep:
		return KindMap
	}
	return KindOther
}

// imageKey is a key of an image's object, taken apart.
type imageKey struct {
	kind ObjectKind
	ref  checkpointRef // of data objects as well: number and epoch
	part uint64
}

// parseKey takes a key below an image's id apart. What no image has is
// KindOther.
func parseKey(id uuid.UUID, key string) imageKey {
	rest, ok := strings.CutPrefix(key, id.String()+"/")
	if !ok {
		return imageKey{}
	}
	kind := KindOf(key)
	if kind == KindSuperblock || kind == KindAttributes {
		return imageKey{kind: kind}
	}
	_, name, _ := strings.Cut(rest, "/")
	var n [3]uint64
	parts := strings.Split(name, ".")
	for i, p := range parts {
		v, err := strconv.ParseUint(p, 16, 32)
		if err != nil || i == len(n) {
			return imageKey{}
		}
		n[i] = v
	}
	k := imageKey{kind: kind, ref: checkpointRef{n[0], n[1]}, part: n[2]}
	switch {
	case kind == KindData && len(parts) == 2 && key == dataKey(id, n[0], n[1]):
	case kind == KindManifest && len(parts) == 3 && key == manifestKey(id, k.ref, int(n[2])):
	case kind == KindMap && len(parts) == 3 && key == mapKey(id, k.ref, uint32(n[2])):
	default:
		return imageKey{}
	}
	return k
}

// keyClass says why an object is in the store.
type keyClass byte

const (
	classNeeded  keyClass = iota // the image, or a point of it, is made of it
	classDead                    // nothing needs it; the table knows of it, and its owner deletes it
	classStale                   // the superblock says that it may have been left behind
	classPending                 // beyond the end of the run: an owner is putting it, or has died at that
	classGap                     // beyond the end of the run, where no owner can have left it
	classOrphan                  // nothing knows of it
	classForeign                 // not a name that an image's object has
)

// view is one state of the image that must be readable, and what it is made of: a
// checkpoint and the data objects after it.
type view struct {
	what  string         // for messages; empty for the image's present state
	point *point         // nil for the image's present state
	ref   *checkpointRef // nil: it is made of data objects alone
	m     *manifest      // of ref; an empty one without
	last  uint64         // the last data object that may be in it
	at    position       // where it ends, as far as it could be read
	tail  []tailObject   // those after the checkpoint, in order
	err   error          // why no more of it could be read; nil if all was
}

// tailObject is a data object after a checkpoint.
type tailObject struct {
	*objectHeader
	offsets []uint32 // of each extent's data in the object's data, in sectors
}

// end returns the last data object, or rollback, of the view.
func (v *view) end() uint64 { return v.at.object }

// find returns the place of the data object number among the view's objects, those
// of the checkpoint and then those after it, or -1.
func (v *view) find(number uint64) int {
	if number > v.m.at.object {
		i, ok := slices.BinarySearchFunc(v.tail, number, func(t tailObject, n uint64) int { return cmp.Compare(t.seq, n) })
		if !ok {
			return -1
		}
		return len(v.m.objects) + i
	}
	list := v.m.objects
	i := sort.Search(len(list), func(i int) bool { return uint64(list[i].number) >= number })
	if i < len(list) && uint64(list[i].number) == number {
		return i
	}
	return -1
}

// info returns what is known of the view's object at place i.
func (v *view) info(i int) objectInfo {
	if i < len(v.m.objects) {
		return v.m.objects[i]
	}
	h := v.tail[i-len(v.m.objects)]
	o := infoOf(h.objectHeader)
	return o
}

// objects returns how many data objects the view has.
func (v *view) objects() int { return len(v.m.objects) + len(v.tail) }

// infoOf returns the entry that an object has in the table when it is accepted.
func infoOf(h *objectHeader) objectInfo {
	sectors := uint32(h.data / SectorSize)
	o := objectInfo{number: uint32(h.seq), epoch: uint32(h.epoch), header: uint16(h.header / objectAlign), sectors: sectors, live: sectors, born: uint32(h.seq)}
	if h.cleaned() {
		// What has been overwritten since it was read never lives: see move.
		o.born = h.born
	}
	if o.live == 0 {
		o.died = uint32(h.seq)
	}
	return o
}

// loadView reads what a view is made of; what is wrong with that is the view's
// err. An error that it returns is one of the store.
func (im *Image) loadView(ctx context.Context, sb *superblock, v *view) error {
	v.m = &manifest{image: im.id}
	if v.ref != nil {
		m, err := im.loadManifest(ctx, *v.ref)
		if damaged(err) {
			v.err = err
			return nil
		}
		if err != nil {
			return err
		}
		v.m = m
	}
	v.at = v.m.at
	missing, err := im.headers(ctx, sb, v.at, v.last, v)
	switch {
	case damaged(err):
		v.err = err
	case err != nil:
		return err
	case v.point != nil && v.point.Settled && v.end() < v.last:
		missing = max(missing, v.end()+1) // where the last object is joined to the next, none is
		v.err = fmt.Errorf("object %s: %w", im.line.dataKey(missing, sb.epochOf(missing)), backend.ErrNotFound)
	}
	return nil
}

// object adds a data object to those after the view's checkpoint.
func (v *view) object(h *objectHeader) error {
	h.sums = nil
	t := tailObject{h, make([]uint32, len(h.extents))}
	off := uint32(0)
	for i, e := range h.extents {
		t.offsets[i] = off
		if !e.zero {
			off += e.n
		}
	}
	v.tail, v.at = append(v.tail, t), h.end()
	return nil
}

func (v *view) rollback(at position) { v.at = at }

// damaged reports whether an error says that an object is damaged, or not there,
// rather than that the store does not answer.
func damaged(err error) bool {
	return errors.Is(err, ErrCorrupt) || errors.Is(err, backend.ErrNotFound) || errors.Is(err, backend.ErrPermanent)
}

// reach says what of an image's objects is needed. It is the one place that knows.
type reach struct {
	sb    *superblock
	holds *holds // of sb
	head  *view
	views []*view // the head, then the points
	gone  []*goneState
	// now and died are what the table would hold after the head's last object: the
	// sectors of each object's data that the map refers to, and, where that is 0, the
	// object with which it became so.
	now, died []uint32
	// holes says that parts of the map could not be read, so now leaves out what these
	// refer to.
	holes bool
}

// goneState is a state that is being forgotten, and what it was made of.
type goneState struct {
	ref   *checkpointRef
	parts int // that its manifest may have
	*stateParts
}

// loadGone reads what the states are made of that are being forgotten. One of which that
// cannot be told is left out.
func (r *reach) loadGone(ctx context.Context, st backend.Store) error {
	for i := range r.sb.Forgotten {
		p := &r.sb.Forgotten[i]
		parts, err := loadOwnParts(ctx, st, r.sb, p)
		if damaged(err) {
			continue
		}
		if err != nil {
			return err
		}
		r.gone = append(r.gone, &goneState{p.Checkpoint, maxManifest / manifestPart, parts})
	}
	return nil
}

// has reports whether an object was one of the state's.
func (g *goneState) has(k imageKey) bool {
	switch k.kind {
	case KindData:
		o, ok := g.data[k.ref.Object]
		return ok && o.epoch == k.ref.Epoch
	case KindMap:
		_, ok := g.maps[mapName{k.ref, uint32(k.part)}]
		return ok
	}
	return g.ref != nil && *g.ref == k.ref && int(k.part) < g.parts
}

// class says why the object of a key is in the store.
func (r *reach) class(key string) keyClass {
	k := parseKey(r.sb.Image, key)
	switch k.kind {
	case KindSuperblock, KindAttributes:
		return classNeeded
	case KindData:
		return r.dataClass(k)
	case KindManifest:
		for _, v := range r.views {
			if v.ref != nil && *v.ref == k.ref && int(k.part) < v.m.parts() {
				return classNeeded
			}
		}
		if slices.Contains(r.sb.Prev, k.ref) {
			return classStale
		}
		return r.leftover(k)
	case KindMap:
		return r.mapClass(k)
	}
	return classForeign
}

func (r *reach) dataClass(k imageKey) keyClass {
	number, epoch := k.ref.Object, k.ref.Epoch
	for _, v := range r.views {
		i := v.find(number)
		if i < 0 || uint64(v.info(i).epoch) != epoch {
			continue
		}
		switch {
		case v != r.head && (number > v.m.at.object || v.info(i).live > 0), v == r.head && number > v.m.at.object:
			return classNeeded
		case v == r.head && (r.now[i] > 0 || r.holes && v.info(i).live > 0 || r.holds.object(number, uint64(r.died[i]))):
			return classNeeded
		case v == r.head:
			return classDead
		}
	}
	switch {
	case number > r.head.end() && epoch == r.sb.epochOf(number):
		// The next attach finds where the run ends, and notes what is beyond as stale.
		if number <= r.head.end()+uint64(r.sb.Window)+1 && (r.sb.Owner != nil || r.sb.unsettled()) {
			return classPending
		}
		return classGap
	default:
		return r.leftover(k)
	}
}

func (r *reach) mapClass(k imageKey) keyClass {
	for _, v := range r.views {
		for _, o := range v.m.maps {
			if o.at != k.ref || uint64(o.part) != k.part {
				continue
			}
			if o.live > 0 || r.holds.mapObject(o.at.Object, uint64(o.died)) {
				return classNeeded
			}
			if v == r.head {
				return classDead
			}
		}
	}
	return r.leftover(k)
}

// leftover says whether the superblock knows of an object that is not needed.
func (r *reach) leftover(k imageKey) keyClass {
	if slices.ContainsFunc(r.gone, func(g *goneState) bool { return g.has(k) }) {
		return classDead // an owner removes it, in its order
	}
	if c := r.sb.Intent; c != nil && k.kind != KindData && *c == k.ref {
		return classStale
	}
	for _, x := range r.sb.Stale {
		if x.Epoch != k.ref.Epoch || x.Checkpoint == (k.kind == KindData) {
			continue
		}
		if x.Checkpoint && x.Object == k.ref.Object || !x.Checkpoint && k.ref.Object >= x.Object && k.ref.Object <= x.Object+uint64(r.sb.Window) {
			return classStale
		}
	}
	return classOrphan
}

// unsettled reports whether an ownership has ended of which it is not known yet
// where.
func (s *superblock) unsettled() bool {
	if s.Loose {
		return true
	}
	for i := range s.Points {
		if !s.Points[i].Settled {
			return true
		}
	}
	return false
}

// parts returns how many objects the manifest is cut into.
func (m *manifest) parts() int {
	return max((m.size()+manifestPart-1)/manifestPart, 1)
}
