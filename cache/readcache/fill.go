package readcache

import (
	"fmt"
)

// reinsertLimit bounds what of a segment is written once more when it is
// reclaimed, so that each one reclaimed gives room for something new.
func (c *Cache) reinsertLimit() int { return c.opt.SegmentBlocks * 3 / 4 }

// insertBlocks is how many blocks insert keeps at a time: those of one fetch are then next to
// each other on the SSD, whatever others insert meanwhile, and are read at once.
const insertBlocks = 64

// insert keeps the blocks from first on that p holds; the object's last one may
// be short. It does not wait for the SSD: when that is behind, blocks are not kept.
// It reports whether all of them are found now.
func (c *Cache) insert(k *Key, first uint32, p []byte, how How) bool {
	if how == Pass || c.off.Load() {
		return false
	}
	all := true
	for len(p) > 0 {
		n := min(insertBlocks*BlockSize, len(p))
		all = c.admit(k, first, p[:n], how) && all
		first, p = first+insertBlocks, p[n:]
	}
	return all
}

// A newBlock is one that may be kept.
type newBlock struct {
	hash   uint64
	sum    uint32
	queue  queue
	wanted bool
}

// admit keeps new blocks, insertBlocks at most, and reports whether the cache has them.
func (c *Cache) admit(k *Key, first uint32, p []byte, how How) (all bool) {
	var room [insertBlocks]newBlock
	blocks := room[:(len(p)+BlockSize-1)/BlockSize]
	for i := range blocks {
		blocks[i].hash = c.hash.block(k.hash, first+uint32(i))
	}
	if !c.sort(blocks, how) {
		return false
	}
	var last [BlockSize]byte
	data := func(i int) []byte {
		b := p[i*BlockSize : min((i+1)*BlockSize, len(p))]
		if len(b) < BlockSize {
			copy(last[:], b)
			return last[:]
		}
		return b
	}
	for i := range blocks {
		if b := &blocks[i]; b.wanted {
			b.sum = k.blockSum(first+uint32(i), data(i))
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.loaded || c.closed {
		return false
	}
	all = true
	for i := range blocks {
		b := &blocks[i]
		all = b.wanted && c.keep(b, &blockKey{k.Object, first + uint32(i)}, data(i)) && all
	}
	return all
}

// keep keeps a block, and reports whether the cache has it. The caller holds mu.
func (c *Cache) keep(b *newBlock, k *blockKey, data []byte) bool {
	if _, at := c.index.find(b.hash); at >= 0 {
		return true
	}
	if c.put(b.queue, keptBuffers, k, b.hash, 0, b.sum, data) == nowhere {
		c.counts.dropped++
		if b.queue == large {
			c.ghost.add(b.hash) // the next time is not the first one
		}
		return false
	}
	c.counts.filled++
	return true
}

// sort finds the queues that new blocks go to, and which are wanted, and reports whether
// any is. Most blocks of long streams are not, so this comes before their checksums are made
// and the index is asked, which has been asked before they were read ahead.
func (c *Cache) sort(blocks []newBlock, how How) (any bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.loaded || c.closed {
		return false
	}
	for i := range blocks {
		b := &blocks[i]
		switch {
		case c.ghost.take(b.hash):
			b.queue, b.wanted = large, true
		case how == KeepKnown:
			c.ghost.add(b.hash)
		default:
			b.queue, b.wanted = small, true
		}
		any = any || b.wanted
	}
	return any
}

// put appends a block to the open segment of a queue, and returns its place, or nowhere if
// there is none to be had. The caller holds mu.
func (c *Cache) put(q queue, keep int, k *blockKey, h uint64, uses int, sum uint32, data []byte) place {
	b := c.open[q]
	if b == nil {
		if b = c.begin(q, keep); b == nil {
			c.wants.Store(true)
			return nowhere
		}
	}
	i := b.h.entries
	p := placeOf(b.h.index, headerBlocks+i)
	copy(b.mem[p.block()*BlockSize:][:BlockSize], data)
	if !c.index.insert(h, uses, p, sum) {
		return nowhere
	}
	setEntry(entry(b.mem, i), k, sum)
	if b.h.entries++; b.h.entries == c.opt.SegmentBlocks {
		c.open[q] = nil
		c.full = append(c.full, b)
		c.wants.Store(true)
	}
	return p
}

// begin opens a segment for a queue, if there is a free one and, beyond keep, a
// buffer. The caller holds mu.
func (c *Cache) begin(q queue, keep int) *buffer {
	reserve := 0
	if keep > 0 {
		reserve = 1
	}
	if len(c.free) <= reserve || len(c.spare)+maxBuffers-c.made <= keep {
		return nil
	}
	var b *buffer
	if n := len(c.spare); n > 0 {
		b, c.spare = c.spare[n-1], c.spare[:n-1]
	} else {
		b = &buffer{mem: c.file.Buffer(c.segmentBytes())}
		c.made++
	}
	s := c.free[len(c.free)-1]
	c.free = c.free[:len(c.free)-1]
	if len(c.free) < lowSegments {
		c.wants.Store(true)
	}
	c.seq++
	b.h = segmentHeader{cache: c.id, seq: c.seq, index: s, queue: q}
	c.segments[s].seq = c.seq
	c.segments[s].buf.Store(b)
	c.open[q] = b
	return b
}

// Forget takes out the blocks from first on, n at most, of an object that nobody reads any more, or
// they would be written again and again for having been read once. It may block.
func (c *Cache) Forget(o Object, first, n uint32) {
	if c.off.Load() {
		return
	}
	object := c.hash.object(&o)
	for i := range n {
		h := c.hash.block(object, first+i)
		w, at := c.index.find(h)
		if at < 0 {
			continue
		}
		c.mu.Lock()
		if _, was := c.index.remove(h, placeIn(w)); was { // else it has moved: so be it
			c.counts.forgotten++
		}
		c.mu.Unlock()
	}
}

// Wants reports whether Maintain has something to do.
func (c *Cache) Wants() bool { return c.wants.Load() && !c.off.Load() }

// Maintain writes segments that are full, and evicts until there are free ones.
// It blocks, and returns at once where somebody else is at it.
func (c *Cache) Maintain() {
	if !c.maintain.TryLock() {
		return
	}
	defer c.maintain.Unlock()
	c.work()
}

// work is Maintain, by the holder of maintain.
func (c *Cache) work() {
	c.wants.Store(false)
	for !c.off.Load() {
		c.mu.Lock()
		b := c.nextFull()
		reclaim := len(c.free) < lowSegments && c.fifo[small].len()+c.fifo[large].len() > 0
		c.mu.Unlock()
		switch {
		case b != nil:
			c.write(b)
		case reclaim:
			c.reclaim()
		default:
			c.warmUp()
			return
		}
	}
}

// nextFull takes the next segment that is to be written, nil if there is none.
// The caller holds mu.
func (c *Cache) nextFull() *buffer {
	if len(c.full) == 0 {
		return nil
	}
	b := c.full[0]
	c.full = append(c.full[:0], c.full[1:]...)
	return b
}

// write writes a segment to the SSD.
func (c *Cache) write(b *buffer) {
	b.h.encode(b.mem)
	n := (headerBlocks + b.h.entries) * BlockSize
	_, err := c.file.WriteAt(b.mem[:n], c.offset(placeOf(b.h.index, 0)))
	c.mu.Lock()
	if err == nil {
		c.counts.written += uint64(n)
		c.enqueue(b.h.queue, b.h.index)
	} else {
		c.counts.writeErrors++
		for i := range b.h.entries {
			_, h := c.entryHash(b.mem, i)
			c.index.remove(h, placeOf(b.h.index, headerBlocks+i))
		}
		c.free = append(c.free, b.h.index)
	}
	c.mu.Unlock()
	c.recycle(b)
	if err != nil {
		c.failed(&c.badWrites, fmt.Errorf("write: %w", err))
		return
	}
	worked(&c.badWrites)
}

// enqueue makes a segment that is on the SSD the youngest of a queue. The caller holds mu.
func (c *Cache) enqueue(q queue, s uint32) {
	c.fifo[q].push(s)
	c.segments[s].written = true
}

// entryHash returns the key and hash of entry i of a segment's header.
func (c *Cache) entryHash(header []byte, i int) (k blockKey, h uint64) {
	k.decode(entry(header, i))
	return k, c.hash.block(c.hash.object(&k.Object), k.block)
}

// survivor is a block that is kept when its segment is reclaimed.
type survivor struct {
	key  blockKey
	hash uint64
	uses int // from now on
	at   int // entry in its segment
}

// reclaim frees the oldest segment of one of the queues. From the small one,
// what was used goes to the large one, and the ghost remembers the rest; from the
// large one, what was used goes to its end.
func (c *Cache) reclaim() {
	c.mu.Lock()
	q := large
	if n := c.fifo[small].len(); n > 0 && (n*10 > len(c.segments) || c.fifo[large].len() == 0) {
		q = small
	}
	s := c.fifo[q].pop()
	c.segments[s].written = false
	c.mu.Unlock()
	c.chill(s)
	heat := c.segments[s].heat.Swap(0)
	c.segments[s].next.Store(0)

	if c.scratch == nil {
		c.scratch = c.file.Buffer(c.segmentBytes())
	}
	head := c.scratch[:headerBytes]
	var h segmentHeader
	err := c.readAt(head, placeOf(s, 0))
	if err == nil {
		h, err = c.decode(head, s)
	}
	c.mu.Lock()
	if err != nil || h.seq != c.segments[s].seq {
		c.seldom(c.errs.mismatches.Add(1), "a segment of the read cache has lost its header: its blocks come from the store", "segment", s)
		c.index.purge(s)
		c.free = append(c.free, s)
		c.mu.Unlock()
		return
	}
	keep := c.evict(q, &h, head)
	c.mu.Unlock()
	if len(keep) > 0 {
		c.move(s, head, keep, heat/uint32(h.entries))
	}
	c.mu.Lock()
	c.free = append(c.free, s)
	c.mu.Unlock()
}

// evict takes out what is not used any more of a segment, and returns the rest.
// The caller holds mu.
func (c *Cache) evict(q queue, h *segmentHeader, head []byte) (keep []survivor) {
	limit := c.reinsertLimit()
	for i := range h.entries {
		k, hash := c.entryHash(head, i)
		p := placeOf(h.index, headerBlocks+i)
		w, at := c.index.at(hash, p)
		if at < 0 {
			continue
		}
		uses := usesIn(w)
		if uses > 0 && len(keep) < limit {
			if q == large {
				uses--
			} else {
				uses = 0
			}
			keep = append(keep, survivor{k, hash, uses, i})
			continue
		}
		c.index.remove(hash, p)
		c.counts.evicted++
		if q == small {
			c.ghost.add(hash)
		}
	}
	return keep
}

// move writes survivors of the segment s to the end of the large queue. Each brings that much heat
// to the segment that it comes to.
func (c *Cache) move(s uint32, head []byte, keep []survivor, heat uint32) {
	first, last := keep[0].at, keep[len(keep)-1].at
	data := c.scratch[headerBytes:][:(last-first+1)*BlockSize]
	err := c.readAt(data, placeOf(s, headerBlocks+first))
	for _, v := range keep {
		b := data[(v.at-first)*BlockSize:][:BlockSize]
		sum := entrySum(entry(head, v.at))
		k := c.Key(v.key.Object, 0)
		good := err == nil && k.blockSum(v.key.block, b) == sum
		c.mu.Lock()
		_, was := c.index.remove(v.hash, placeOf(s, headerBlocks+v.at))
		to := nowhere
		if was && good {
			to = c.put(large, 0, &v.key, v.hash, v.uses, sum, b)
		}
		switch {
		case to != nowhere:
			c.counts.moved++
			c.segments[to.segment()].heat.Add(heat)
		case was:
			c.counts.evicted++
		}
		full := c.nextFull()
		c.mu.Unlock()
		if full != nil {
			c.write(full)
		}
	}
}

// Close writes what is in memory to the SSD. No other call may be running or
// follow, but for Stats.
func (c *Cache) Close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.maintain.Lock()
	defer c.maintain.Unlock()
	c.work()
	for q := range queues {
		c.mu.Lock()
		b := c.open[q]
		c.open[q] = nil
		c.mu.Unlock()
		if b != nil && !c.off.Load() {
			c.write(b)
		}
	}
	c.off.Store(true)
	for len(c.warm.list) > 0 {
		c.chill(c.warm.list[0].h.index)
	}
}
