package engine

import (
	"container/list"
	"sync"
)

// maxSums bounds the checksums that an image keeps at hand: 4 MiB.
const maxSums = 1 << 20

// sumCache keeps the checksums of the objects that were used last. Workers share
// it.
type sumCache struct {
	mu    sync.Mutex
	held  map[objectRef]*list.Element // guarded by mu
	order *list.List                  // of sumEntry, newest first; guarded by mu
	count int                         // sums held; guarded by mu
}

type sumEntry struct {
	ref  objectRef
	sums []uint32
}

func (c *sumCache) init() {
	c.held, c.order = map[objectRef]*list.Element{}, list.New()
}

// clear lets go of all of them.
func (c *sumCache) clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.held, c.count = map[objectRef]*list.Element{}, 0
	c.order.Init()
}

// get returns the checksums of an object's blocks, which do not change, or nil.
func (c *sumCache) get(ref objectRef) []uint32 {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.held[ref]
	if e == nil {
		return nil
	}
	c.order.MoveToFront(e)
	return e.Value.(sumEntry).sums
}

// add keeps the checksums of an object, and lets go of the oldest ones.
func (c *sumCache) add(ref objectRef, sums []uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.held == nil || c.held[ref] != nil || len(sums) == 0 {
		return
	}
	c.held[ref] = c.order.PushFront(sumEntry{ref, sums})
	c.count += len(sums)
	for c.count > maxSums {
		e := c.order.Back()
		old := c.order.Remove(e).(sumEntry)
		delete(c.held, old.ref)
		c.count -= len(old.sums)
	}
}
