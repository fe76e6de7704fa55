package engine

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"syscall"

	"github.com/lsd-ceph/lsd/backend"
)

// checkStore fails if anything is wrong with the image in the store, which nobody
// has attached, or the store holds what nothing refers to.
func (w *world) checkStore() {
	rep := w.check()
	var wrong []string
	for _, f := range rep.Errors {
		if !w.strays[f.Object] {
			wrong = append(wrong, f.String())
		}
	}
	for _, key := range slices.Concat(rep.Dead, rep.Pending) {
		if !w.strays[key] {
			wrong = append(wrong, "left over: "+key)
		}
	}
	all, err := CheckStore(context.Background(), w.inner, "mem:", false)
	if err != nil {
		w.fail("check: %v", err)
	}
	for _, f := range all.Errors {
		wrong = append(wrong, f.String())
	}
	if len(wrong) > 0 {
		w.fail("check: %s", strings.Join(wrong, "; "))
	}
	w.countGroups()
}

// countGroups counts the objects that are joined to the next one.
func (w *world) countGroups() {
	for _, key := range w.keys() {
		if parseKey(w.id, key).kind != KindData {
			continue
		}
		b, err := readWhole(context.Background(), w.inner, key)
		if err != nil {
			w.fail("object %s: %v", key, err)
		}
		n, err := objectHeaderSize(b)
		if err != nil {
			continue // damaged on purpose
		}
		h, err := decodeObjectHeader(b[:min(n, len(b))], w.plan.extras.sectors)
		w.count(countJoined, err == nil && h.joined)
	}
}

// check is what lsdctl check does.
func (w *world) check() *CheckReport {
	rep, err := Check(context.Background(), w.inner, "disk", "mem:/disk", CheckOptions{Deep: true, Parallel: 1})
	if err != nil {
		w.fail("check: %v", err)
	}
	return rep
}

// damageStore flips a bit of, or cuts, one object at rest. The image then names
// it and does not open, or what it says is right.
func (w *world) damageStore() {
	w.count(countObjects, true)
	ctx := context.Background()
	keys := w.keys()
	key := keys[w.rng.IntN(len(keys))]
	if err := damage(ctx, w.inner, key, w.corrupt); err != nil {
		w.fail("damage: %v", err)
	}
	rep := w.check()
	found := slices.ContainsFunc(rep.Errors, func(f Finding) bool { return strings.Contains(f.String(), key) })
	missed := !found && w.wholeNeeded(rep, key)
	m := w.owner.m
	c := w.newHost()
	if err := c.open(w.id, false); err != nil {
		switch {
		case !names(err, key):
			w.fail("open with a damaged object %s: %v, which does not name it", key, err)
		case missed:
			w.fail("check does not find the damaged object %s, for which open says %v", key, err)
		}
		return
	}
	if missed && !w.headerAlone(c, key) {
		w.fail("check does not find the damaged object %s", key)
	}
	c.m = m
	if failed := w.readDamaged(c); failed > 0 && missed {
		w.fail("check does not find the damaged object %s, and %d reads fail", key, failed)
	}
}

// headerAlone reports whether the image that c has open needs a data object's header, for the next
// recovery, and nothing of its data, which has been written over, and the header is whole: then
// what is damaged is not missed.
func (w *world) headerAlone(c *simHost, key string) bool {
	k := parseKey(c.im.id, key)
	if k.kind != KindData {
		return false
	}
	if o := c.im.table.find(k.ref.Object); o == nil || o.live > 0 {
		return false
	}
	b, err := readWhole(context.Background(), w.inner, key)
	if err != nil {
		w.fail("object %s: %v", key, err)
	}
	n, err := objectHeaderSize(b)
	if err != nil || n > len(b) {
		return false
	}
	h, err := decodeObjectHeader(b[:n], w.plan.extras.sectors)
	return err == nil && len(b) == h.header+h.data
}

// keys returns the keys of the image's objects.
func (w *world) keys() (keys []string) {
	err := w.inner.List(context.Background(), w.id.String()+"/", func(key string) error { keys = append(keys, key); return nil })
	if err != nil {
		w.fail("list: %v", err)
	}
	return keys
}

// readDamaged reads all of an image of which an object is damaged, and returns how many reads failed.
func (w *world) readDamaged(c *simHost) (failed int) {
	c.badReads = true
	for cell := uint64(0); cell < w.cells(); {
		n := w.cellsFrom(cell, 64)
		r := c.read(cell, n)
		cell += n
		w.until(c, func() bool { return r.ended }, "read of a damaged image")
		if r.Err != 0 && r.Err != syscall.EIO {
			w.fail("read of a damaged image: %v", r.Err)
		}
		if r.Err != 0 {
			failed++
		}
	}
	return failed
}

// wholeNeeded reports whether every byte of an object is needed. Of a map object,
// parts may be out of date, and of a data object that a point needs, the data.
func (w *world) wholeNeeded(rep *CheckReport, key string) bool {
	switch parseKey(w.id, key).kind {
	case KindSuperblock:
		return true
	case KindMap:
		return false
	case KindData:
		return rep.Points+rep.Snapshots == 0 && !slices.Contains(rep.Stale, key)
	}
	return !slices.Contains(rep.Stale, key)
}

// damage changes an object of either kind as corrupt says, which returns how many
// bytes are left.
func damage(ctx context.Context, st backend.Store, key string, corrupt func([]byte) int) error {
	b, _, err := st.Load(ctx, key)
	if err != nil {
		b, err = readWhole(ctx, st, key)
	}
	if err != nil {
		return err
	}
	return replaceObject(ctx, st, key, b[:corrupt(b)])
}

// replaceObject puts b in the place of an object of either kind.
func replaceObject(ctx context.Context, st backend.Store, key string, b []byte) error {
	if _, v, err := st.Load(ctx, key); err == nil {
		_, err := st.Swap(ctx, key, v, b)
		return err
	}
	if err := st.Delete(ctx, key); err != nil {
		return fmt.Errorf("delete: %w", err)
	}
	return st.Put(ctx, key, b)
}
