package readcache

import (
	"context"
	"fmt"
	"slices"
	"sync"
)

// Load finds what the file holds from before, and lets the cache keep blocks. It
// blocks; reads may be served meanwhile, and find what has been loaded so far.
func (c *Cache) Load(ctx context.Context) error {
	if c.file == nil {
		return nil
	}
	var mu sync.Mutex
	next := 0
	take := func() int {
		mu.Lock()
		defer mu.Unlock()
		next++
		return next - 1
	}
	headers := make([]segmentHeader, len(c.segments)) // seq 0: nothing is there
	read := func() {
		b := c.file.Buffer(headerBytes)
		for i := take(); i < len(headers) && ctx.Err() == nil && !c.off.Load(); i = take() {
			headers[i] = c.loadSegment(b, uint32(i))
		}
	}
	var others sync.WaitGroup
	for range c.opt.Readers - 1 {
		others.Go(read)
	}
	read()
	others.Wait()
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("load the read cache: %w", err)
	}
	c.loadQueues(headers)
	return nil
}

// decode decodes the header of the segment i.
func (c *Cache) decode(b []byte, i uint32) (segmentHeader, error) {
	h, err := decodeSegmentHeader(b, c.id, i)
	if err == nil && h.entries > c.opt.SegmentBlocks {
		return segmentHeader{}, errFormat // there is no memory to read it to
	}
	return h, err
}

// loadSegment enters the blocks of the segment i and returns its header.
func (c *Cache) loadSegment(b []byte, i uint32) segmentHeader {
	if c.readAt(b, placeOf(i, 0)) != nil {
		return segmentHeader{}
	}
	h, err := c.decode(b, i)
	if err != nil {
		return segmentHeader{} // never written, or torn
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.segments[i].seq = h.seq
	for e := range h.entries {
		_, hash := c.entryHash(b, e)
		if w, at := c.index.find(hash); at >= 0 {
			// A block that was moved, and whose old segment is still there.
			if c.segments[placeIn(w).segment()].seq > h.seq {
				continue
			}
			c.index.remove(hash, placeIn(w))
		}
		c.index.insert(hash, 0, placeOf(i, headerBlocks+e), entrySum(entry(b, e)))
	}
	return h
}

// loadQueues puts the segments into the queues, in the order in which they were
// begun, and the rest among the free ones.
func (c *Cache) loadQueues(headers []segmentHeader) {
	var found []uint32
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := len(headers) - 1; i >= 0; i-- {
		if headers[i].seq == 0 {
			c.free = append(c.free, uint32(i))
		} else {
			found = append(found, uint32(i))
			c.seq = max(c.seq, headers[i].seq)
		}
	}
	slices.SortFunc(found, func(a, b uint32) int {
		if headers[a].seq < headers[b].seq {
			return -1
		}
		return 1
	})
	for _, i := range found {
		c.enqueue(headers[i].queue, i)
	}
	c.loaded = true
	c.wants.Store(len(c.free) < lowSegments)
}
