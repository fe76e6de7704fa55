package engine

import (
	"syscall"

	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/internal/extmap"
	"github.com/lsd-ceph/lsd/internal/mutate"
)

// The path of requests: writes, discards and flushes, from when they are submitted until they
// may be acknowledged. Reads go on in read.go.

// Submit starts a request. Its Done is called when it has ended.
func (im *Image) Submit(r *Request) {
	r.Err, r.Leased, r.at, r.seq, r.pending = 0, false, 0, 0, 0
	im.stint.requests++
	switch {
	case r.Op != Flush && (uint64(r.Sectors) > im.sectors || r.Sector > im.sectors-uint64(r.Sectors)),
		(r.Op == Read || r.Op == Write) && len(r.Buf) != int(r.Sectors)*SectorSize:
		im.finish(r, syscall.EINVAL)
	case im.state == Fenced || im.state == Released:
		im.finish(r, syscall.EIO)
	case r.Op == Read:
		im.stats.reads++
		im.stats.readBytes += uint64(len(r.Buf))
		im.read(r)
	case r.Op == Flush:
		im.stats.flushes++
		im.flush(r)
	case im.readOnly:
		im.finish(r, syscall.EROFS)
	case im.state != Active || im.usedUp():
		im.finish(r, syscall.EIO)
	default:
		if r.Op == Write {
			im.stats.writes++
			im.stats.writeBytes += uint64(len(r.Buf))
		} else {
			im.stats.discards++
		}
		im.write(r)
	}
}

// usedUp reports whether the image has no more numbers for objects.
func (im *Image) usedUp() bool {
	if im.sealed.object < lastWritten {
		return false
	}
	if !im.stats.usedUp {
		im.stats.usedUp = true
		im.logger.Error("the image has used up its numbers for objects: it is as good as read-only from here on; copy it to a new one")
	}
	return true
}

func (im *Image) finish(r *Request, err syscall.Errno) {
	if r.Err == 0 {
		r.Err = err
	}
	r.Done.RequestDone(r)
}

// EndTurn closes the turn's record, starts what has become possible, and
// acknowledges what is due. The reactor calls it at the end of each turn, right
// before it hands what the turn has queued to the kernel.
func (im *Image) EndTurn() {
	if im.objs.grown {
		im.objs.grown = false
		im.objs.evict()
	}
	if im.readOnly {
		return
	}
	if im.unblock {
		im.unblock = false
		im.admitBlocked()
	}
	im.log.Commit()
	if im.open != nil && im.full(im.open, 0) {
		im.seal()
	}
	im.checkpoint.step()
	im.stint.renew()
	im.confirm()
	im.log.Commit() // what those who were told have submitted at once
}

// write appends r to the log, or makes it wait until there is room.
func (im *Image) write(r *Request) {
	if r.Sectors == 0 {
		im.finish(r, 0)
		return
	}
	if im.blocked.n > 0 || !im.admits(len(r.Buf)) || !im.appendWrite(r) {
		im.block(r)
	}
}

func (im *Image) block(r *Request) {
	if im.log.Err() != nil {
		im.finish(r, syscall.EIO)
		return
	}
	im.stats.stalls++
	if im.stats.stalledSince == 0 {
		im.stats.stalledSince = max(im.env.Now(), 1)
	}
	im.blocked.push(r)
}

// appendWrite appends what is left of r, as records take it, and reports whether
// all of it is in the log.
func (im *Image) appendWrite(r *Request) bool {
	for r.at < r.Sectors {
		sector, n := r.Sector+uint64(r.at), r.Sectors-r.at
		data, more := r.Op == Write, uint32(0) // sectors of data
		if data {
			n = min(n, writelog.MaxData/SectorSize)
			more = n
		}
		if im.open != nil && im.full(im.open, more) {
			im.log.Commit()
			im.seal()
		}
		var pos uint64
		var st writelog.Status
		if data {
			pos, st = im.log.Append(sector, r.Buf[r.at*SectorSize:][:n*SectorSize])
		} else {
			pos, st = im.log.AppendZeroes(sector, n)
		}
		if st != writelog.Appended {
			if st == writelog.Full && im.open != nil {
				// Room comes from destaging what is there, however little.
				im.log.Commit()
				im.seal()
			}
			return false
		}
		im.note(writelog.Extent{Sector: sector, N: n, Pos: pos, Zero: !data})
		r.at += n
	}
	r.seq = im.log.Seq()
	im.acks.push(r)
	return true
}

// full reports whether a batch should be sealed rather than take n more sectors of data.
func (im *Image) full(b *batch, n uint32) bool {
	return b.sectors+uint64(n) > im.object || n == 0 && b.sectors == im.object ||
		len(b.extents) >= maxBatchExtents || im.log.Head()-b.start > im.log.Size()/8
}

// note enters a write that is in the log into the dirty map and the open batch.
func (im *Image) note(e writelog.Extent) {
	if im.open == nil {
		im.openBatch()
	}
	b := im.open
	kind := dataKind(0) // of what is dirty already, too
	if !e.Zero && !im.dirty.Insert(e.Sector, uint64(e.N), e.Pos) {
		var over bool
		if kind, over = im.kindAt(e.Sector); over {
			im.hazards.overwritten[kind] += uint64(e.N)
		}
	}
	b.extents, b.kind = append(b.extents, e), append(b.kind, kind)
	if !e.Zero {
		b.sectors += uint64(e.N)
		b.kinds[kind] += uint64(e.N)
		return
	}
	if mutate.On(mutate.DiscardUnrecorded) {
		return
	}
	for s, end := e.Sector, e.Sector+uint64(e.N); s < end; {
		to := min((s/extmap.PageSectors+1)*extmap.PageSectors, end)
		if im.shows(s, to) {
			im.dirty.Insert(s, to-s, extmap.Fixed|e.Pos)
		}
		s = to
	}
}

// shows reports whether something other than zeroes may be read in [s, end), which
// lies in one page: only there a hole needs an entry.
func (im *Image) shows(s, end uint64) bool {
	if !im.ready(segmentOf(s)) {
		return true
	}
	_, ok := im.dirty.Next(s, end)
	if !ok {
		_, ok = im.objs.Next(s, end)
	}
	return ok
}

func (im *Image) openBatch() {
	var b *batch
	if k := len(im.spare); k > 0 {
		b, im.spare = im.spare[k-1], im.spare[:k-1]
		*b = batch{extents: b.extents[:0], kind: b.kind[:0]}
	} else {
		b = new(batch)
	}
	b.start, b.firstSeq = im.sealed.logEnd, im.sealed.seq+1
	im.open = b
	if im.env != nil { // nil during recovery
		b.began = im.env.Now()
		im.ageTimer.Reset(im.cfg.BatchAge)
	}
}

// flush completes r when everything that has completed is durable.
func (im *Image) flush(r *Request) {
	if im.readOnly {
		im.finish(r, 0)
		return
	}
	r.seq = im.log.Completed()
	im.awaitDurable(r)
}

// awaitDurable completes r once record r.seq, which is complete, is durable.
func (im *Image) awaitDurable(r *Request) {
	switch {
	case im.log.Err() != nil:
		im.finish(r, syscall.EIO)
	case mutate.On(mutate.FlushEarly) && im.leased():
		im.finish(r, 0)
	default:
		im.flushes.push(r)
		im.acknowledge()
		im.syncNext()
	}
}

// syncNext makes the log durable up to what the oldest flush waits for.
func (im *Image) syncNext() {
	if im.flushes.n > 0 && im.flushes.head.seq > im.log.Durable() {
		im.log.Sync(im.flushes.head.seq)
	}
}

// LogCompleted implements writelog.Client.
func (im *Image) LogCompleted(uint64) {
	im.acknowledge()
	im.logMoved()
}

// LogDurable implements writelog.Client.
func (im *Image) LogDurable(uint64) { im.acknowledge() }

// LogSpace implements writelog.Client.
func (im *Image) LogSpace() { im.unblock = true }

// LogFailed implements writelog.Client. Reads go on, and so does the destaging
// of what is still in memory, of what got an error too: the last writes of the order.
// Nothing is acknowledged any more.
func (im *Image) LogFailed(err error) {
	im.logger.Error("the write log failed: writes get errors until the image is attached with another log", "err", err)
	im.why = err
	im.failPending(syscall.EIO)
	im.logMoved()
}

// acknowledge says that writes or flushes may have become due. They are told at
// the end of the turn: see confirm.
func (im *Image) acknowledge() { im.ackable = true }

// confirm completes the writes whose records are written, in log order, and the
// flushes whose records are durable, unless the lease has run out.
//
// It is the last thing in a turn, so that next to nothing lies between the look
// at the clock and the system call that tells the kernel; what does, the kernel
// looks at: see Request.Leased.
func (im *Image) confirm() {
	for im.ackable {
		im.ackable = false
		if im.late.n+im.acks.n+im.flushes.n == 0 || !im.leased() {
			return
		}
		for im.late.n > 0 {
			im.confirmed(im.late.pop())
		}
		for im.acks.n > 0 && im.acks.head.seq <= im.log.Completed() {
			r := im.acks.pop()
			if r.FUA && !mutate.On(mutate.FUAPlain) {
				im.awaitDurable(r)
			} else {
				im.confirmed(r)
			}
		}
		for im.flushes.n > 0 && im.flushes.head.seq <= im.log.Durable() {
			im.confirmed(im.flushes.pop())
		}
		im.syncNext()
	}
}

// confirmed ends a request while the lease lasts.
func (im *Image) confirmed(r *Request) {
	r.Leased = true
	im.finish(r, 0)
}

// TakeBack takes a request back that had ended without an error, Leased, and was not
// told in time. It ends again once the lease is renewed, or with an error. It is
// called on the reactor, before the request is submitted anew.
func (im *Image) TakeBack(r *Request) {
	r.Leased = false
	if im.state == Fenced || im.state == Released {
		im.finish(r, syscall.EIO)
		return
	}
	if !mutate.On(mutate.LateForgotten) {
		im.late.push(r)
	}
	im.acknowledge()
}

// admitBlocked lets waiting writes into the log, in order.
func (im *Image) admitBlocked() {
	for im.blocked.n > 0 {
		if im.log.Err() != nil {
			im.finish(im.blocked.pop(), syscall.EIO)
			continue
		}
		r := im.blocked.head
		if r.at == 0 && !im.admits(len(r.Buf)) {
			return
		}
		rest := r.next
		if !im.appendHead(r, rest) {
			return
		}
	}
	im.stats.stalledSince = 0
}

// appendHead appends the first blocked request. It leaves the queue before it is
// appended, since that links it into another one, and goes back to its front if
// it does not fit.
func (im *Image) appendHead(r, rest *Request) bool {
	im.blocked.pop()
	if im.appendWrite(r) {
		return true
	}
	r.next = rest
	im.blocked.head = r
	if rest == nil {
		im.blocked.tail = r
	}
	im.blocked.n++
	return false
}

// failPending ends every write and flush that is waiting.
func (im *Image) failPending(err syscall.Errno) {
	for _, q := range []*fifo{&im.blocked, &im.late, &im.acks, &im.flushes} {
		for q.n > 0 {
			im.finish(q.pop(), err)
		}
	}
}
