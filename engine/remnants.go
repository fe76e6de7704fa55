package engine

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/internal/parallel"
)

// A remnant is an image of which there are objects, and neither superblock nor name. These objects
// are what has come last: of a host that had the image when it was removed, and stood still for
// longer than anybody waited for it; or of an owner of an image whose superblock could not be read
// when it was removed. They cannot be told from those of an image that somebody is bringing back
// from a copy of the pool but by their age.

// remnantBatch is how many of a remnant's objects are listed before they are looked at.
const remnantBatch = 4096

// bereft is what those superblocks say that there are about images that have none.
type bereft struct {
	needed map[uuid.UUID]bool // ancestors of images that have one
	lost   string             // an image that has a name and no superblock; "": none
}

// note notes whose objects those of a superblock's image may be.
func (b *bereft) note(sb *superblock) {
	b.needed[sb.Parent] = true
	for _, o := range sb.Origins {
		b.needed[o.Image] = true
	}
}

// findLost looks for an image that has a name and no superblock, of those that the scan has not
// found one of.
func (b *bereft) findLost(ctx context.Context, st backend.Store, s *storeScan, named map[uuid.UUID]bool) error {
	for id := range named {
		if s.super[id] {
			continue
		}
		if there, err := hasSuperblock(ctx, st, id); there || err != nil {
			if err != nil {
				return err
			}
			continue // it is new, and its ancestors have theirs
		}
		now, err := namedImages(ctx, st)
		if err != nil {
			return err
		}
		if now[id] { // else it has just been removed
			b.lost = id.String()
		}
	}
	return nil
}

// mayNeed returns why something may need the objects of a remnant, or "".
func (b *bereft) mayNeed(id uuid.UUID) string {
	switch {
	case b.needed[id]:
		return "clones are made of them"
	case b.lost != "":
		return "image " + b.lost + " has a name and no superblock, and may be a clone that is made of them"
	}
	return ""
}

func hasSuperblock(ctx context.Context, st backend.Store, id uuid.UUID) (bool, error) {
	_, err := st.Stat(ctx, SuperblockKey(id))
	if errors.Is(err, backend.ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

// isRemnant reports whether an image of which there are objects has neither superblock nor name.
func (g *collector) isRemnant(ctx context.Context, s *storeScan, id uuid.UUID) (bool, error) {
	if s.super[id] || g.named[id] {
		return false, nil
	}
	there, err := hasSuperblock(ctx, g.st, id)
	return !there && err == nil, err
}

// remnants looks at the images of a scan that may be remnants.
func (g *collector) remnants(ctx context.Context, s *storeScan, b *bereft) error {
	if err := b.findLost(ctx, g.st, s, g.named); err != nil {
		return err
	}
	for _, id := range s.ids() {
		if err := g.remnant(ctx, s, id, b); err != nil {
			return err
		}
	}
	return nil
}

// remnant looks at an image that may be a remnant.
func (g *collector) remnant(ctx context.Context, s *storeScan, id uuid.UUID, b *bereft) error {
	if is, err := g.isRemnant(ctx, s, id); !is || err != nil {
		return err
	}
	if why := b.mayNeed(id); why != "" {
		if !g.waits[id] {
			g.waits[id] = true
			g.o.Kept(id, why)
		}
		return nil
	}
	age, err := g.youngest(ctx, id)
	switch {
	case err != nil:
		return err
	case age == never:
		return nil // somebody else has removed them
	case age < g.o.Age:
		g.late(id, id.String(), g.o.Age-age)
		return nil
	}
	what := "objects of an image that has neither name nor superblock"
	return g.collect(Garbage{Image: id, Name: id.String(), What: what, Objects: s.objects[id]}, func() error { return g.removeRemnant(ctx, id) })
}

// never is the age of what is not there.
const never time.Duration = -1 << 63

// youngest returns how long ago the last of an image's objects was put, or, if it finds one that
// is younger than o.Age, that one. Clocks are compared for that; one that is ahead by
// more than an hour makes things wait.
func (g *collector) youngest(ctx context.Context, id uuid.UUID) (time.Duration, error) {
	age := never
	var keys []string
	enough := errors.New("enough")
	look := func() error {
		ages := make([]time.Duration, len(keys))
		err := parallel.Each(checkParallel, len(keys), func(i int) error {
			is, err := g.st.Stat(ctx, keys[i])
			if ages[i] = never; err == nil {
				ages[i] = g.now.Sub(is.Modified)
			}
			if errors.Is(err, backend.ErrNotFound) {
				err = nil
			}
			return err
		})
		if err != nil {
			return err
		}
		for _, a := range ages {
			if a != never && (age == never || a < age) {
				age = a
			}
		}
		keys = keys[:0]
		if age != never && age < g.o.Age {
			return enough
		}
		return nil
	}
	err := g.st.List(ctx, id.String()+"/", func(key string) error {
		if keys = append(keys, key); len(keys) < remnantBatch {
			return nil
		}
		return look()
	})
	if err == nil {
		err = look()
	}
	if err != nil && !errors.Is(err, enough) {
		return never, fmt.Errorf("find out how old what is left of image %s is: %w", id, err)
	}
	return age, nil
}

// removeRemnant removes the objects of a remnant, unless it has got a name or a superblock since:
// somebody is bringing an image back from a copy.
func (g *collector) removeRemnant(ctx context.Context, id uuid.UUID) error {
	named, err := namedImages(ctx, g.st)
	if err != nil {
		return err
	}
	there, err := hasSuperblock(ctx, g.st, id)
	if err != nil || there || named[id] {
		return err
	}
	return removeObjects(ctx, g.st, id, g.progress(id.String()))
}
