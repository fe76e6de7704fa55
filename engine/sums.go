package engine

import (
	"container/list"
	"sync"
)

// maxSums bounds the checksums that an image keeps at hand: 4 MiB, unless it is a View.
const maxSums = 1 << 20

// sumCache keeps the checksums of the objects that were used last. Workers share
// it.
type sumCache struct {
	mu    sync.Mutex
	held  map[uint32]*list.Element // guarded by mu
	order *list.List               // of sumEntry, newest first; guarded by mu
	count int                      // sums held; guarded by mu
	most  int                      // that are; fixed once it is in use
}

type sumEntry struct {
	number uint32
	sums   []uint32
}

func (c *sumCache) init() {
	c.held, c.order, c.most = map[uint32]*list.Element{}, list.New(), maxSums
}

// clear lets go of all of them.
func (c *sumCache) clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.held, c.count = map[uint32]*list.Element{}, 0
	c.order.Init()
}

// get returns the checksums of an object's blocks, which do not change, or nil.
func (c *sumCache) get(number uint32) []uint32 {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.held[number]
	if e == nil {
		return nil
	}
	c.order.MoveToFront(e)
	return e.Value.(sumEntry).sums
}

// add keeps the checksums of an object, and lets go of the oldest ones.
func (c *sumCache) add(number uint32, sums []uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.held == nil || c.held[number] != nil || len(sums) == 0 {
		return
	}
	c.held[number] = c.order.PushFront(sumEntry{number, sums})
	c.count += len(sums)
	for c.count > c.most {
		e := c.order.Back()
		old := c.order.Remove(e).(sumEntry)
		delete(c.held, old.number)
		c.count -= len(old.sums)
	}
}
