package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/internal/plural"
)

// CheckStore checks that the directory of a store and what is in it belong
// together: that each name has a superblock, and that all objects are those of an
// image with a name. It does not look into the images. url names the store in
// messages. With repair it makes a directory that is missing or damaged anew, from the
// superblocks; else it changes nothing. It fails with ErrNotFound when there is neither a
// directory nor anything of an image.
func CheckStore(ctx context.Context, st backend.Store, url string, repair bool) (*CheckReport, error) {
	rep := newReport(url)
	st = patient{st, Real{}}
	// The names come last: an image that is being made has its superblock first.
	s, err := scanStore(ctx, st)
	if err != nil {
		return nil, err
	}
	rep.Objects = s.total
	names, err := backend.Names(ctx, st)
	if err == nil && len(names) == 0 {
		_, err = st.Stat(ctx, backend.DirectoryKey)
	}
	switch missing := errors.Is(err, backend.ErrNotFound); {
	case missing && len(s.objects) == 0:
		return nil, fmt.Errorf("%s holds nothing of lsd: %w", url, err)
	case missing || damagedDirectory(err):
		rep.Errors = append(rep.Errors, lostDirectory(err))
		if errors.Is(err, backend.ErrUnknownVersion) {
			return rep, nil
		}
		return rep, s.rebuild(ctx, st, rep, repair)
	case err != nil:
		return nil, err
	}
	rep.Notes = append(rep.Notes, countNames(names)+"; lsdctl check STORE/IMAGE looks into one")
	if err := s.checkNames(ctx, st, names, rep); err != nil {
		return nil, err
	}
	return rep, s.checkNameless(ctx, st, rep)
}

// countNames tells how many images there are.
func countNames(names []backend.Entry) string {
	trash := 0
	for _, e := range names {
		if backend.InTrash(e.Name) {
			trash++
		}
	}
	text := plural.Count(len(names)-trash, "image")
	if trash > 0 {
		text += fmt.Sprintf(", and %d in the trash", trash)
	}
	return text
}

// damagedDirectory reports whether an error of a look-up says that the directory is
// damaged.
func damagedDirectory(err error) bool {
	return errors.Is(err, backend.ErrPermanent) && !errors.Is(err, fs.ErrPermission)
}

// ErrLostDirectory says that a store has images and no directory of their names.
var ErrLostDirectory = errors.New("the directory of names is missing, and there are images")

// lostDirectory returns what is to be said of a directory that is not there, or
// damaged, as err says.
func lostDirectory(err error) Finding {
	f := Finding{Object: backend.DirectoryKey, Problem: ErrLostDirectory.Error(), Action: "lsdctl check STORE --repair makes it anew, with the names that the superblocks have"}
	switch {
	case errors.Is(err, backend.ErrUnknownVersion):
		f.Problem, f.Action = err.Error(), "use the lsd that has written it, or bring it back from a copy of the pool"
	case !errors.Is(err, backend.ErrNotFound):
		f.Problem = "the directory of names is damaged: " + err.Error()
	}
	return f
}

// LostDirectory reports whether the store holds images and no directory of their
// names. Without a directory it lists the store, up to the first superblock of an image that
// can have had a name: a partial one has none.
func LostDirectory(ctx context.Context, st backend.Store) (bool, error) {
	if missing, err := noDirectory(ctx, st); !missing || err != nil {
		return false, err
	}
	for partial := map[uuid.UUID]bool{}; ; {
		id, err := superblockBut(ctx, st, partial)
		if err != nil {
			return false, fmt.Errorf("look for images without a name: %w", err)
		}
		if id == uuid.Nil {
			return false, nil
		}
		sb, _, err := loadSuperblock(ctx, st, id)
		if err != nil || !sb.Partial {
			// Again: the first image of a store has its superblock before its name.
			return noDirectory(ctx, st)
		}
		partial[id] = true
	}
}

// superblockBut returns an image that has a superblock and is not one of those, or uuid.Nil.
func superblockBut(ctx context.Context, st backend.Store, but map[uuid.UUID]bool) (id uuid.UUID, err error) {
	found := errors.New("found")
	err = st.List(ctx, "", func(key string) error {
		if of, name, ok := imageOf(key); ok && name == "super" && !but[of] {
			id = of
			return found
		}
		return nil
	})
	if errors.Is(err, found) {
		err = nil
	}
	return id, err
}

func noDirectory(ctx context.Context, st backend.Store) (bool, error) {
	_, err := st.Stat(ctx, backend.DirectoryKey)
	if errors.Is(err, backend.ErrNotFound) {
		return true, nil
	}
	return false, err
}

// storeScan is what a listing of a store has.
type storeScan struct {
	total      int
	objects    map[uuid.UUID]int // of each image
	super      map[uuid.UUID]bool
	attributes map[uuid.UUID]bool // it has some
	strange    []string
}

// scanStore lists a store.
func scanStore(ctx context.Context, st backend.Store) (*storeScan, error) {
	s := &storeScan{objects: map[uuid.UUID]int{}, super: map[uuid.UUID]bool{}, attributes: map[uuid.UUID]bool{}}
	if err := st.List(ctx, "", s.note); err != nil {
		return nil, fmt.Errorf("list the objects of the store: %w", err)
	}
	return s, nil
}

// namedImages returns the images that have a name.
func namedImages(ctx context.Context, st backend.Store) (map[uuid.UUID]bool, error) {
	names, err := backend.Names(ctx, st)
	if err != nil {
		return nil, err
	}
	named := make(map[uuid.UUID]bool, len(names))
	for _, e := range names {
		named[e.ID] = true
	}
	return named, nil
}

func (s *storeScan) note(key string) error {
	s.total++
	id, name, ok := imageOf(key)
	switch {
	case key == backend.DirectoryKey:
	case !ok:
		s.strange = append(s.strange, key)
	default:
		s.objects[id]++
		s.super[id] = s.super[id] || name == "super"
		s.attributes[id] = s.attributes[id] || name == "attributes"
	}
	return nil
}

// imageOf returns the image that a key belongs to, and what comes after its id.
func imageOf(key string) (id uuid.UUID, name string, ok bool) {
	head, name, _ := strings.Cut(key, "/")
	id, err := uuid.Parse(head)
	return id, name, err == nil && id.String() == head
}

// rebuild plans, and with repair does, the making of a directory of the images that are
// there.
func (s *storeScan) rebuild(ctx context.Context, st backend.Store, rep *CheckReport, repair bool) error {
	images, err := s.nameable(ctx, st, rep)
	if err != nil {
		return err
	}
	names := uniqueNames(images)
	for _, e := range names {
		what := "give the image the name " + e.Name
		if backend.InTrash(e.Name) {
			what = "put the image back into the trash"
		}
		rep.Repairs = append(rep.Repairs, Repair{Object: SuperblockKey(e.ID), What: what})
	}
	if !repair || len(names) == 0 {
		return nil
	}
	if err := backend.Rebuild(ctx, st, names); err != nil {
		return fmt.Errorf("make the directory of names anew: %w", err)
	}
	rep.Errors[0].Mended = true
	for i := range rep.Repairs {
		rep.Repairs[i].Done = true
	}
	return s.checkNameless(ctx, st, rep)
}

// ids returns the images that there is something of, in order.
func (s *storeScan) ids() []uuid.UUID {
	return slices.SortedFunc(maps.Keys(s.objects), func(a, b uuid.UUID) int { return bytes.Compare(a[:], b[:]) })
}

// nameable returns the superblocks of the images that can have a name, and notes what
// else is there.
func (s *storeScan) nameable(ctx context.Context, st backend.Store, rep *CheckReport) (images []*superblock, err error) {
	for _, id := range s.ids() {
		what := plural.Count(s.objects[id], "object")
		sb, _, err := loadSuperblock(ctx, st, id)
		switch {
		case err == nil && sb.Removed:
			what = fmt.Sprintf("what clones need of %s, which was removed, with %s", sb.Name, what)
		case err == nil && sb.Partial:
			what = fmt.Sprintf("the beginning of %s, which was not filled to its end, with %s", sb.Name, what)
		case err == nil:
			images = append(images, sb)
			what = fmt.Sprintf("made as %s on %s, with %s", sb.Name, sb.Created.Format(time.DateOnly), what)
			if sb.inTrash() {
				what = fmt.Sprintf("%s, which was moved to the trash, with %s", sb.Name, plural.Count(s.objects[id], "object"))
			}
		case errors.Is(err, backend.ErrNotFound):
			what += ", and no superblock"
		case unreadableSuper(err):
			what += ", and " + err.Error()
		default:
			return nil, err
		}
		rep.Notes = append(rep.Notes, fmt.Sprintf("image %s is there: %s", id, what))
	}
	return images, nil
}

// uniqueNames returns a name for each image: the one that its superblock has, or, where a
// later image has that, one that it begins and the id completes; or its place in the trash.
func uniqueNames(images []*superblock) []backend.Entry {
	images = slices.Clone(images)
	slices.SortStableFunc(images, func(a, b *superblock) int { return b.Created.Compare(a.Created) })
	taken := map[string]bool{}
	var names []backend.Entry
	for _, sb := range images {
		name := sb.Name
		if sb.inTrash() {
			names = append(names, backend.Entry{Name: backend.TrashName(sb.Image), ID: sb.Image})
			continue
		}
		if taken[name] || backend.CheckImageName(name) != nil {
			name = sb.Image.String()
			if short := sb.Name + "~" + name[:8]; backend.CheckImageName(short) == nil && !taken[short] {
				name = short
			}
		}
		taken[name] = true
		names = append(names, backend.Entry{Name: name, ID: sb.Image})
	}
	return names
}

// checkNames reports names without a superblock, and images with several names.
func (s *storeScan) checkNames(ctx context.Context, st backend.Store, names []backend.Entry, rep *CheckReport) error {
	named := map[uuid.UUID]bool{}
	for _, n := range names {
		if named[n.ID] {
			rep.Errors = append(rep.Errors, Finding{Object: backend.DirectoryKey, Problem: fmt.Sprintf("image %s has several names, one of them %s", n.ID, n.Name), Action: "lsdctl check each name, and bring the directory back from a copy of the pool"})
		}
		named[n.ID] = true
		if s.super[n.ID] {
			continue
		}
		if _, err := st.Stat(ctx, SuperblockKey(n.ID)); err == nil {
			continue // it is new
		} else if !errors.Is(err, backend.ErrNotFound) {
			return err
		}
		switch _, err := backend.Lookup(ctx, st, n.Name); {
		case err == nil && backend.InTrash(n.Name):
			rep.Errors = append(rep.Errors, Finding{Object: SuperblockKey(n.ID), Problem: "the superblock is missing, and the image is in the trash", Action: "bring it back from a copy of the pool, or lsdctl trash rm --force"})
		case err == nil:
			rep.Errors = append(rep.Errors, Finding{Object: SuperblockKey(n.ID), Problem: fmt.Sprintf("the superblock is missing, and the directory has the name %s for it", n.Name), Action: rmAgain})
		case !errors.Is(err, backend.ErrNotFound):
			return err
		}
	}
	return nil
}

// checkNameless reports images without a name, and objects that are nothing of
// ours.
func (s *storeScan) checkNameless(ctx context.Context, st backend.Store, rep *CheckReport) error {
	// Read again: an image that was just being made when it was listed has its
	// name by now.
	named, err := namedImages(ctx, st)
	if err != nil {
		return err
	}
	for id, n := range s.objects {
		if named[id] {
			continue
		}
		f := Finding{Object: id.String() + "/", Problem: plural.Count(n, "object") + " of an image that has neither name nor superblock", Action: "if nobody misses an image, lsdctl gc STORE --remove removes them, an hour after the last has come, unless a clone is made of them"}
		sb, _, err := loadSuperblock(ctx, st, id)
		switch {
		case err == nil && sb.Removed:
			if err := describeRemoved(ctx, st, rep, sb); err != nil {
				return err
			}
			continue
		case err == nil && sb.Partial:
			f.Object = SuperblockKey(id)
			f.Problem = fmt.Sprintf("the beginning of %s, which is being filled, or was not to its end, with %s", sb.Name, plural.Count(n, "object"))
			f.Action = "if nobody is at it, lsdctl gc STORE --remove removes it, an hour after it was last written"
		case err == nil && sb.untouched():
			f.Object = SuperblockKey(id)
			f.Problem = fmt.Sprintf("no name in the directory for %s, which is being made, or was not to its end", sb.Name)
			f.Action = "if nobody is at it, lsdctl gc STORE --remove removes it"
		case err == nil:
			f.Object = SuperblockKey(id)
			f.Problem = fmt.Sprintf("no name in the directory for this image, made as %s on %s, with %s", sb.Name, sb.Created.Format(time.DateOnly), plural.Count(n, "object"))
			f.Action = "bring the directory back from a copy of the pool; if nobody misses the image, remove its objects by hand"
		case unreadableSuper(err):
			f.Object, f.Problem = SuperblockKey(id), "no name in the directory for this image, and "+err.Error()
		case !errors.Is(err, backend.ErrNotFound):
			return err
		case !s.still(ctx, st, id):
			continue // a removal that has come to its end meanwhile
		}
		rep.Errors = append(rep.Errors, f)
	}
	for _, key := range s.strange {
		rep.Errors = append(rep.Errors, Finding{Object: key, Problem: "no object of lsd has such a name", Action: byHand})
	}
	slices.SortFunc(rep.Errors, func(a, b Finding) int { return strings.Compare(a.Object, b.Object) })
	return nil
}

// describeRemoved notes what is left of an image that has been removed.
func describeRemoved(ctx context.Context, st backend.Store, rep *CheckReport, sb *superblock) error {
	list, kept, err := unneeded(ctx, st, sb, 0)
	if errors.Is(err, errLostClone) {
		rep.Notes = append(rep.Notes, fmt.Sprintf("%s was removed; what clones of it need cannot be told: %v", sb.Name, err))
		return nil
	}
	switch {
	case vanished(ctx, st, sb.Image, err):
		return nil
	case err != nil:
		return err
	}
	note := sb.Name + " was removed"
	if len(sb.Clones) > 0 {
		note = fmt.Sprintf("%s, which was removed, has %s that clones of it need", sb.Name, plural.Count(kept, "object"))
	}
	late := sb.lateFor(time.Now())
	if n := len(list); n > 0 || kept == 0 && late == 0 {
		note += fmt.Sprintf(", and has %s that nothing needs, and that lsdctl gc removes", plural.Count(n, "object"))
	}
	if late > 0 {
		note += fmt.Sprintf("; what hosts that had it attached were writing may come for %v, and lsdctl gc removes it after that", late.Round(time.Second))
	}
	rep.Notes = append(rep.Notes, note)
	return nil
}

// still reports whether anything of an image is there.
func (s *storeScan) still(ctx context.Context, st backend.Store, id uuid.UUID) bool {
	found := errors.New("found")
	return st.List(ctx, id.String()+"/", func(string) error { return found }) != nil
}
