package engine

import (
	"slices"
	"sort"

	"github.com/google/uuid"
)

// origin says that the data objects of an image up to a number, from after the origin before
// on, are those of an ancestor: so are the checkpoints after these.
type origin struct {
	Image uuid.UUID `json:"image"`
	Last  uint64    `json:"last"`
}

// lineage says which image's the objects are that an image is made of. A clone numbers its
// own from where it begins, so numbers say it: the map of an ancestor means the same to all
// of its descendants, however many there are between. It does not change.
type lineage struct {
	image   uuid.UUID
	origins []origin // ascending
}

func (s *superblock) lineage() *lineage { return &lineage{s.Image, s.Origins} }

// of returns whose data object has the number, or whose checkpoint is after that.
func (l *lineage) of(number uint64) uuid.UUID {
	i := sort.Search(len(l.origins), func(i int) bool { return number <= l.origins[i].Last })
	if i < len(l.origins) {
		return l.origins[i].Image
	}
	return l.image
}

// own reports whether a data object of that number is the image's own, or a checkpoint after
// that.
func (l *lineage) own(number uint64) bool {
	n := len(l.origins)
	return n == 0 || number > l.origins[n-1].Last
}

func (l *lineage) dataKey(number, epoch uint64) string {
	return dataKey(l.of(number), number, epoch)
}

func (l *lineage) manifestKey(c checkpointRef, part int) string {
	return manifestKey(l.of(c.Object), c, part)
}

func (l *lineage) mapKey(c checkpointRef, part uint32) string {
	return mapKey(l.of(c.Object), c, part)
}

// separated reports whether the image is nobody's clone, and has nothing of ancestors.
func (s *superblock) separated() bool { return s.Parent == uuid.Nil && len(s.Origins) == 0 }

// validOrigins reports whether the origins are such as there can be.
func (s *superblock) validOrigins() bool {
	for i, o := range s.Origins {
		if o.Image == uuid.Nil || o.Image == s.Image || o.Last > maxObjectSeq || i > 0 && o.Last <= s.Origins[i-1].Last ||
			slices.ContainsFunc(s.Origins[:i], func(x origin) bool { return x.Image == o.Image }) {
			return false
		}
	}
	return true
}
