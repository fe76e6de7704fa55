package engine

import (
	"slices"
)

// oldManifest is a manifest that has been replaced.
type oldManifest struct {
	ref   checkpointRef
	parts int // that it has, at most
}

// removeDead removes what nothing needs: map objects of which nothing is current, and
// the manifests that have been replaced. What a point needs stays, and so does what
// cannot be removed now: the manifest and the superblock go on to name it, and the next
// checkpoint, or the next start, tries again. Checkpoints begin meanwhile.
func (c *checkpointer) removeDead() {
	switch {
	case c.running != nil:
		return // its end does it
	case c.removing:
		c.unheld = true
		return
	}
	im, sb := c.im, c.im.super.sb
	r := new(removal)
	for i := range im.objs.maps {
		switch o := &im.objs.maps[i]; {
		case o.size == 0 || o.live > 0 || im.super.holds.mapObject(o.at.Object, uint64(o.died)):
		case !im.line.own(o.at.Object):
			*o = mapObject{} // an ancestor's, which knows who needs it
		default:
			r.add(object(mapKey(im.id, o.at, o.part)))
		}
	}
	c.old = slices.DeleteFunc(c.old, func(m oldManifest) bool {
		held := sb.heldManifest(m.ref)
		if held {
			c.forgetPrev(m.ref, true)
		}
		return held
	})
	for _, m := range c.old {
		for part := range m.parts {
			r.add(object(manifestKey(im.id, m.ref, part)))
		}
	}
	if len(r.left) == 0 {
		c.tellRemoved()
		return
	}
	c.removing = true
	im.remove(r, func() { c.removed(r) })
}

// removed ends a removal: what is gone is left out of the next manifest, and of the
// superblock.
func (c *checkpointer) removed(r *removal) {
	im := c.im
	for i := range im.objs.maps {
		if o := &im.objs.maps[i]; o.size > 0 && o.live == 0 && r.ended[object(mapKey(im.id, o.at, o.part))] {
			*o = mapObject{}
		}
	}
	c.old = slices.DeleteFunc(c.old, func(m oldManifest) bool {
		for part := range m.parts {
			if !r.ended[object(manifestKey(im.id, m.ref, part))] {
				return false
			}
		}
		c.forgetPrev(m.ref, false)
		return true
	})
	c.removing = false
	if c.unheld {
		c.unheld = false
		c.removeDead()
		return
	}
	c.tellRemoved()
}

// afterRemoval calls fn when what nothing needs is removed as far as that is possible
// now, or with the error with which the image's service ends before.
func (c *checkpointer) afterRemoval(fn func(error)) {
	c.removals = append(c.removals, fn)
	if !c.removing {
		c.removeDead()
	}
}

func (c *checkpointer) tellRemoved() {
	waiters := c.removals
	c.removals = nil
	for _, fn := range waiters {
		fn(nil)
	}
}

// forgetPrev takes the manifest of the checkpoint old, which was replaced, off the
// superblock's list: it is gone, or held by a point that remembers it, if there still
// is one by then. The next change will do, whatever it is for.
func (c *checkpointer) forgetPrev(old checkpointRef, held bool) {
	forget := func(sb *superblock) {
		if !held || sb.heldManifest(old) {
			sb.Prev = slices.DeleteFunc(sb.Prev, func(x checkpointRef) bool { return x == old })
		}
	}
	c.im.super.changes = append(c.im.super.changes, superChange{forget, func() {}})
}
