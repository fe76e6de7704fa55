package engine

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"syscall"

	"github.com/lsd-ceph/lsd/backend"
)

// reachable returns the keys that an image which nobody has attached needs, and
// says which others the superblock knows of, so that the next attach removes them.
func reachable(ctx context.Context, st backend.Store, im *Image) (keys map[string]bool, stale func(string) bool, err error) {
	sb, _, err := loadSuperblock(ctx, st, im.id)
	if err != nil {
		return nil, nil, err
	}
	keys = map[string]bool{SuperblockKey(im.id): true, backend.DirectoryKey: true}
	for _, p := range sb.Points {
		if p.Checkpoint != nil {
			keys[manifestKey(im.id, *p.Checkpoint, 0)] = true
		}
	}
	at := position{}
	if sb.Checkpoint != nil {
		m, err := im.loadManifest(ctx, *sb.Checkpoint)
		if err != nil {
			return nil, nil, err
		}
		keys[manifestKey(im.id, *sb.Checkpoint, 0)] = true
		for _, o := range m.maps {
			if o.live > 0 || sb.heldMap(o.at.Object, uint64(o.died)) {
				keys[mapKey(im.id, o.at, o.part)] = true
			}
		}
		for _, o := range m.objects {
			if o.live > 0 || sb.held(uint64(o.number), uint64(o.died)) {
				keys[dataKey(im.id, uint64(o.number), uint64(o.epoch))] = true
			}
		}
		at = m.at
	}
	err = im.headers(ctx, sb, at, maxObjectSeq, func(h *objectHeader) error {
		keys[dataKey(im.id, h.seq, h.epoch)] = true
		return nil
	})
	return keys, func(key string) bool { return isStale(sb, key) }, err
}

// isStale reports whether the superblock says that the object may have been left
// behind.
func isStale(sb *superblock, key string) bool {
	for _, x := range sb.Stale {
		c := checkpointRef{Object: x.Object, Epoch: x.Epoch}
		if x.Checkpoint {
			if strings.HasPrefix(key, strings.TrimSuffix(mapKey(sb.Image, c, 0), "0")) || key == manifestKey(sb.Image, c, 0) {
				return true
			}
			continue
		}
		for n := x.Object; n <= x.Object+uint64(sb.Window); n++ {
			if key == dataKey(sb.Image, n, x.Epoch) {
				return true
			}
		}
	}
	return false
}

// checkLeaks fails if the store holds what nothing refers to, or lacks what
// something does.
func (w *world) checkLeaks() {
	ctx := context.Background()
	sb, _, err := loadSuperblock(ctx, w.inner, w.id)
	if err != nil {
		w.fail("leaks: %v", err)
	}
	im := newImage(ctx, w.inner, sb, &OpenOptions{ReadOnly: true, Parallel: 1})
	defer im.cancel()
	keys, stale, err := reachable(ctx, w.inner, im)
	if err != nil {
		w.fail("leaks: %v", err)
	}
	var leaked []string
	err = w.inner.List(ctx, "", func(key string) error {
		switch {
		case keys[key], stale(key), w.strays[key]:
		default:
			leaked = append(leaked, key)
		}
		delete(keys, key)
		return nil
	})
	if err != nil {
		w.fail("leaks: %v", err)
	}
	for key := range keys {
		leaked = append(leaked, "missing: "+key)
	}
	if len(leaked) > 0 {
		slices.Sort(leaked)
		w.fail("%d objects are left over: %s", len(leaked), strings.Join(leaked, ", "))
	}
}

// damageStore flips a bit of, or cuts, one object at rest. The image then names
// it and does not open, or what it says is right.
func (w *world) damageStore() {
	ctx := context.Background()
	var keys []string
	if err := w.inner.List(ctx, w.id.String()+"/", func(key string) error { keys = append(keys, key); return nil }); err != nil {
		w.fail("damage: %v", err)
	}
	key := keys[w.rng.IntN(len(keys))]
	if err := damage(ctx, w.inner, key, w.corrupt); err != nil {
		w.fail("damage: %v", err)
	}
	m := w.owner.m
	c := w.newHost()
	if err := c.open(w.id, false); err != nil {
		if !names(err, key) {
			w.fail("open with a damaged object %s: %v, which does not name it", key, err)
		}
		return
	}
	c.m, c.badReads = m, true
	for cell := uint64(0); cell < w.cells(); {
		n := w.cellsFrom(cell, 64)
		r := c.read(cell, n)
		cell += n
		w.until(c, func() bool { return r.ended }, "read of a damaged image")
		if r.Err != 0 && r.Err != syscall.EIO {
			w.fail("read of a damaged image: %v", r.Err)
		}
	}
}

// damage changes an object of either kind as corrupt says, which returns how many
// bytes are left.
func damage(ctx context.Context, st backend.Store, key string, corrupt func([]byte) int) error {
	if b, v, err := st.Load(ctx, key); err == nil {
		_, err := st.Swap(ctx, key, v, b[:corrupt(b)])
		return err
	}
	b, err := readWhole(ctx, st, key)
	if err != nil {
		return err
	}
	if err := st.Delete(ctx, key); err != nil {
		return fmt.Errorf("delete: %w", err)
	}
	return st.Put(ctx, key, b[:corrupt(b)])
}
