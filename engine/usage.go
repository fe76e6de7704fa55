package engine

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
)

// Space says what the space of a store is taken by, in bytes. For an image Live, Snapshots,
// Shared and Alone are of data that it refers to, whichever image's objects that is in; the
// others are of the objects under its own id.
//
// What is counted is what checkpoints say: of each object how much of its data a state refers
// to, and not which part. Of two states that have each gone on from the same one, the smaller
// count is taken for part of the larger: so Shared is at most that large, and what nothing needs
// may be less than Reclaimable says by what one of them alone has. What was put after an image's
// last checkpoint counts as referred to, and what that has overwritten does as well.
type Space struct {
	Provisioned uint64 `json:"provisioned_bytes"` // size of the disk; 0 of an image that has been removed
	Live        uint64 `json:"live_bytes"`        // data that the present state refers to
	// Snapshots is other data: what only states that are kept refer to, which are snapshots,
	// cut-off points, and what a clone begins with, which counts as the clone's.
	Snapshots uint64 `json:"snapshots_bytes"`
	Shared    uint64 `json:"shared_bytes"` // of Live and Snapshots, what other images refer to as well; in a total once
	Alone     uint64 `json:"alone_bytes"`  // of Live and Snapshots, the rest
	// Reclaimable is what nothing refers to: dead data in objects that the cleaner has not come
	// to, and dead objects whole, as those of images that have been removed.
	Reclaimable uint64 `json:"reclaimable_bytes"`
	Metadata    uint64 `json:"metadata_bytes"` // the rest: headers of objects, maps, checkpoints, superblocks
}

// ImageUsage is the space of an image, and where it comes from.
type ImageUsage struct {
	Name    string    `json:"name"` // that it has, or had
	ID      uuid.UUID `json:"id"`
	Removed bool      `json:"removed,omitempty"`
	Trash   bool      `json:"trash,omitempty"` // it is in the trash: Name is the one that it had
	Parent  uuid.UUID `json:"parent,omitzero"` // that it was cloned from
	// Snapshot is that of the parent of which it was cloned, if that is there still, and Cloned
	// when it was.
	Snapshot string    `json:"snapshot,omitempty"`
	Cloned   time.Time `json:"cloned,omitzero"`
	Space
	Error string `json:"error,omitempty"` // why what it needs is not known: the figures leave that out
}

// StoreUsage is the space of a store, or of some of its images.
type StoreUsage struct {
	Images []ImageUsage `json:"images"` // by name, and then id
	Total  Space        `json:"total"`
	// Unknown is what objects take of which it is not known whether anything needs them: of
	// images that cannot be read, or of images that are related to such.
	Unknown uint64 `json:"unknown_bytes"`
	// Stored is the size of all objects that were counted: the sum of Live, Snapshots,
	// Reclaimable, Metadata and Unknown. Alone and Shared are that of Live and Snapshots.
	Stored  uint64 `json:"stored_bytes"`
	Objects int    `json:"objects"` // that were counted
	Strange int    `json:"strange"` // objects that lsd has not made, which are not counted
}

// UsageOptions says what is measured.
type UsageOptions struct {
	// Of is an image: it alone is measured, with what it was cloned from and what was cloned from
	// that. uuid.Nil means the whole store.
	Of       uuid.UUID
	Parallel int          // reads at one time; 0 means a default
	Progress func(string) // is told in a few words what is being done; may be nil
}

// MeasureStore tells what the space of a store is taken by. It lists the store once, and reads
// superblocks, the manifests of checkpoints and a few headers; the sizes of other objects are
// asked for. It needs memory for each object in the store, 16 bytes, and more while it is at the
// image whose it is. It may be used while images are attached, and tells then what was so at one
// time or another meanwhile.
func MeasureStore(ctx context.Context, st backend.Store, o UsageOptions) (*StoreUsage, error) {
	o.Parallel = cmp.Or(o.Parallel, checkParallel)
	if o.Progress == nil {
		o.Progress = func(string) {}
	}
	m := &measurer{st: patient{st, Real{}}, o: o, byID: map[uuid.UUID]*usedImage{}}
	if err := m.list(ctx); err != nil {
		return nil, err
	}
	if err := m.load(ctx); err != nil {
		return nil, err
	}
	for _, members := range m.families() {
		if o.Of != uuid.Nil && !slices.ContainsFunc(members, func(im *usedImage) bool { return im.id == o.Of }) {
			continue
		}
		if err := m.measure(ctx, members); err != nil {
			return nil, err
		}
	}
	return m.report(ctx)
}

// measurer measures a store.
type measurer struct {
	st      backend.Store
	o       UsageOptions
	images  []*usedImage // by id
	byID    map[uuid.UUID]*usedImage
	strange int
	out     StoreUsage
}

// usedImage is an image of which there is something in the store.
type usedImage struct {
	id    uuid.UUID
	sb    *superblock // nil: it cannot be read, or is not there
	super int         // bytes of it
	list  []listed    // its objects, in order
	first int         // the place of the first of these among those of its family
	usage ImageUsage
	done  bool // it was measured
}

// listed is an object, as its key says.
type listed struct {
	number, epoch, part uint32
	kind                ObjectKind
}

func compareListed(a, b listed) int {
	return cmp.Or(cmp.Compare(a.kind, b.kind), cmp.Compare(a.number, b.number), cmp.Compare(a.epoch, b.epoch), cmp.Compare(a.part, b.part))
}

// key returns the key of an object of an image.
func (l listed) key(id uuid.UUID) string {
	ref := checkpointRef{uint64(l.number), uint64(l.epoch)}
	switch l.kind {
	case KindData:
		return dataKey(id, ref.Object, ref.Epoch)
	case KindManifest:
		return manifestKey(id, ref, int(l.part))
	case KindMap:
		return mapKey(id, ref, l.part)
	case KindAttributes:
		return attributesKey(id)
	}
	return SuperblockKey(id)
}

// list lists the store.
func (m *measurer) list(ctx context.Context) error {
	n := 0
	err := m.st.List(ctx, "", func(key string) error {
		if n++; n%1000 == 0 {
			m.o.Progress(fmt.Sprintf("listing the store: %d objects", n))
		}
		id, _, ok := imageOf(key)
		k := parseKey(id, key)
		switch {
		case key == backend.DirectoryKey:
			return nil
		case !ok || k.kind == KindOther:
			m.strange++
			return nil
		}
		im := m.byID[id]
		if im == nil {
			im = &usedImage{id: id}
			m.byID[id] = im
			m.images = append(m.images, im)
		}
		im.list = append(im.list, listed{uint32(k.ref.Object), uint32(k.ref.Epoch), uint32(k.part), k.kind})
		return nil
	})
	if err != nil {
		return fmt.Errorf("list the objects of the store: %w", err)
	}
	slices.SortFunc(m.images, func(a, b *usedImage) int { return bytes.Compare(a.id[:], b.id[:]) })
	for _, im := range m.images {
		slices.SortFunc(im.list, compareListed)
	}
	return nil
}

// load reads the superblocks, and what the images are called.
func (m *measurer) load(ctx context.Context) error {
	names, err := backend.Names(ctx, m.st)
	if err != nil && !damagedDirectory(err) {
		return err
	}
	for i, im := range m.images {
		m.o.Progress(fmt.Sprintf("reading superblocks: %d of %d", i, len(m.images)))
		if err := m.reload(ctx, im); err != nil {
			return err
		}
	}
	for _, e := range names {
		switch im := m.byID[e.ID]; {
		case im == nil:
		case backend.InTrash(e.Name):
			im.usage.Trash = true
		default:
			im.usage.Name = e.Name
		}
	}
	return nil
}

// reload reads the superblock of an image. It is the image's error if it cannot be read.
func (m *measurer) reload(ctx context.Context, im *usedImage) error {
	u := &im.usage
	u.ID = im.id
	if im.sb == nil {
		u.Error = "" // it may be there now
	}
	b, _, err := m.st.Load(ctx, SuperblockKey(im.id))
	if err == nil {
		im.super = len(b)
		im.sb, err = decodeSuperblock(b, im.id)
	}
	switch {
	case errors.Is(err, backend.ErrNotFound):
		im.sb, im.super, u.Error = nil, 0, "it has no superblock"
	case err != nil && (damaged(err) || unreadableSuper(err)):
		im.sb, u.Error = nil, "superblock: "+err.Error()
	case err != nil:
		return err
	default:
		u.Name, u.Removed, u.Parent, u.Provisioned = cmp.Or(u.Name, im.sb.Name), im.sb.Removed, im.sb.Parent, 0
		if !im.sb.Removed {
			u.Provisioned = im.sb.Sectors * SectorSize
		}
	}
	return nil
}

// families returns the images in groups of those that are related: they may be made of each
// other's objects.
func (m *measurer) families() [][]*usedImage {
	root := make(map[uuid.UUID]uuid.UUID, len(m.images))
	var find func(id uuid.UUID) uuid.UUID
	find = func(id uuid.UUID) uuid.UUID {
		if r, ok := root[id]; ok && r != id {
			root[id] = find(r)
			return root[id]
		}
		return id
	}
	for _, im := range m.images {
		if im.sb == nil {
			continue
		}
		if im.sb.Parent != uuid.Nil {
			root[find(im.sb.Parent)] = find(im.id)
		}
		for _, o := range im.sb.Origins {
			root[find(o.Image)] = find(im.id)
		}
	}
	var order []uuid.UUID
	groups := map[uuid.UUID][]*usedImage{}
	for _, im := range m.images {
		r := find(im.id)
		if groups[r] == nil {
			order = append(order, r)
		}
		groups[r] = append(groups[r], im)
	}
	list := make([][]*usedImage, len(order))
	for i, r := range order {
		list[i] = groups[r]
	}
	return list
}

// report returns what was measured.
func (m *measurer) report(ctx context.Context) (*StoreUsage, error) {
	u := &m.out
	u.Images = []ImageUsage{}
	for _, im := range m.images {
		if !im.done {
			continue
		}
		m.origin(im)
		u.Images = append(u.Images, im.usage)
		u.Total.Provisioned += im.usage.Provisioned
		u.Total.Alone += im.usage.Alone
		u.Total.Reclaimable += im.usage.Reclaimable
		u.Total.Metadata += im.usage.Metadata
	}
	slices.SortFunc(u.Images, func(a, b ImageUsage) int {
		return cmp.Or(strings.Compare(a.Name, b.Name), bytes.Compare(a.ID[:], b.ID[:]))
	})
	if m.o.Of == uuid.Nil {
		u.Strange = m.strange
		directory, err := m.st.Stat(ctx, backend.DirectoryKey)
		switch {
		case err == nil:
			u.Total.Metadata += uint64(directory.Size)
			u.Objects++
		case !errors.Is(err, backend.ErrNotFound):
			return nil, err
		}
	}
	t := &u.Total
	u.Stored = t.Live + t.Snapshots + t.Reclaimable + t.Metadata + u.Unknown
	return u, nil
}

// origin notes of what an image was cloned.
func (m *measurer) origin(im *usedImage) {
	parent := m.byID[im.usage.Parent]
	if parent == nil || parent.sb == nil {
		return
	}
	at := parent.sb.snapshotOf(im.id)
	if at == nil {
		return
	}
	im.usage.Cloned = at.Since
	if s := parent.sb.clonedFrom(at); s != nil {
		im.usage.Snapshot = s.Name
	}
}
