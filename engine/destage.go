package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/internal/mutate"
)

// seal ends the open batch, whose records are closed, and gives it its number.
func (im *Image) seal() {
	im.sealAt(im.log.Seq(), im.log.Head())
	im.pumpNow()
}

// sealAt ends the open batch with the record seq, which ends at the log position
// end.
func (im *Image) sealAt(seq, end uint64) {
	b := im.open
	im.open = nil
	im.split(b)
	b.object, b.lastSeq, b.end, b.state = im.sealed.object+1, seq, end, batchSealed
	if b.last() > maxObjectSeq {
		panic("engine: the image has used up its object numbers")
	}
	im.sealed = b.at()
	im.queue = append(im.queue, b)
	if mutate.On(mutate.TrimEarly) && im.env != nil {
		im.log.Trim(end)
	}
}

// sealByAge seals a batch that did not fill in time.
func (im *Image) sealByAge() {
	if im.open == nil || im.state == Fenced || im.state == Released {
		return
	}
	im.log.Commit()
	im.seal()
}

// pumpNow starts what the window allows of building and putting.
func (im *Image) pumpNow() {
	if im.state == Fenced || im.state == Released {
		return
	}
	last := im.accepted.object + uint64(im.window)
	now, next := im.env.Now(), time.Duration(0)
	again := func(wait time.Duration) {
		if next == 0 || wait < next {
			next = wait
		}
	}
	held := im.holdBack(now)
	if im.burst.over {
		again(burstCalm)
	}
	free := len(im.queue) // batches that never wait for the cleaner: its own, and what is before them
	for free > 0 && !im.queue[free-1].cleaned() {
		free--
	}
	queue := im.queue[:min(len(im.queue), maxUnderWay)]
	n := inState(queue)
	for i, b := range queue {
		if b.last() > last {
			break // the next owner looks no further for what this one may have put
		}
		if b.state != batchSealed && b.state != batchBuilt {
			continue
		}
		if wait := b.notBefore - now; wait > 0 {
			again(wait)
			continue
		}
		lags := i >= free && im.clean.lags()
		switch {
		case b.state == batchBuilt:
			if n[batchPutting] < maxPuts {
				n[batchPutting]++
				im.put(b)
			}
		case n[batchBuilding] >= maxBuilds:
		case !im.readable(b):
			im.unread = true
		case lags && im.clean.credit <= 0:
		case held > 0 && !b.cleaned():
			again(held)
		case im.takeMemory(b):
			if lags {
				im.clean.credit -= int64(b.sectors)
			}
			n[batchBuilding]++
			if im.build(b); !b.cleaned() {
				im.burst.started(b, now)
				held = im.holdBack(now)
			}
		}
	}
	if next > 0 {
		im.pump.Reset(next)
	}
}

// underWay returns how many sectors clients' objects have that are on their way to the store and
// have not been accepted.
func (im *Image) underWay() (sectors int64) {
	for _, b := range im.queue[:min(len(im.queue), maxUnderWay)] {
		if b.state != batchSealed && !b.cleaned() {
			sectors += int64(b.sectors)
		}
	}
	return sectors
}

// inState returns how many of the batches are in each state.
func inState(queue []*batch) (n [batchDurable + 1]int) {
	for _, b := range queue {
		n[b.state]++
	}
	return n
}

// readable reports whether what b holds can be read: from memory, or from the SSD once
// it has taken all of b's records.
func (im *Image) readable(b *batch) bool {
	return b.cleaned() || im.log.Completed() >= b.lastSeq || im.log.Err() != nil || im.log.InMemory(b.start)
}

// logMoved is told that records have been written, or never will be: batches may have
// waited for that.
func (im *Image) logMoved() {
	if im.unread {
		im.unread = false
		im.pumpNow()
	}
}

// backoff returns the pause before another attempt.
func (im *Image) backoff(tries int) time.Duration {
	d := im.cfg.RetryMin << min(tries, 16)
	return min(d, im.cfg.RetryMax)
}

// retry puts b back to an earlier state after a failure.
func (im *Image) retry(b *batch, to batchState, err error) {
	use := usePut
	if b.state = to; to == batchSealed {
		use = useOther // it is the log that could not be read
		im.giveMemory(b)
	}
	b.notBefore = im.env.Now() + im.backoff(b.tries)
	b.tries++
	im.storeFailed(use, err)
	im.pumpNow()
}

// storeUse is a set of uses of the store. Each of those that are named is repeated until
// it goes through, so that what they have to say of the store is not over before.
type storeUse uint8

const (
	usePut        storeUse = 1 << iota // of data objects
	useCheckpoint                      // of what checkpoints are made of
	useOther      storeUse = 0
)

// storeFailed counts an error of the store, and logs the first of a run of them.
func (im *Image) storeFailed(use storeUse, err error) {
	if !im.countStoreError(err) {
		return
	}
	im.stats.failing |= use
	if !im.stats.storeDown {
		im.stats.storeDown = true
		im.logger.Warn("the store fails: trying again until it does not; writes go on until the log is full", "err", err)
	}
}

// countStoreError counts an error of the store, and reports whether it is one: a call
// that the image has given up itself says nothing of the store.
func (im *Image) countStoreError(err error) bool {
	if errors.Is(err, context.Canceled) {
		return false
	}
	im.stats.storeErrors++
	im.stats.lastStoreErr, im.stats.lastStoreErrAt = err, im.env.Now()
	return true
}

// storeWorks notes a success, which ends an outage unless other operations have
// failed a moment ago, or go on failing: a store that is full takes small changes.
func (im *Image) storeWorks(use storeUse) {
	const calm = 2 * time.Second
	im.stats.failing &^= use
	if im.stats.storeDown && im.stats.failing == 0 && im.env.Now()-im.stats.lastStoreErrAt >= calm {
		im.stats.storeDown = false
		im.logger.Info("the store works again", "errors", im.stats.storeErrors)
	}
}

// headerFor returns what the headers of b's objects say of their place.
func (im *Image) headerFor(b *batch) objectHeader {
	return objectHeader{
		image: im.id, epoch: im.super.sb.Epoch, seq: b.object,
		firstSeq: b.firstSeq, lastSeq: b.lastSeq, log: im.logID, logEnd: b.end,
	}
}

// buildCleaned makes the object of a batch of moved data on a worker.
func (im *Image) buildCleaned(b *batch) {
	h := im.headerFor(b)
	var buf []byte
	im.spawn(func() { buf = b.buildMoved(&h, im.buffer) }, func() {
		if im.state == Fenced || im.state == Released {
			return
		}
		b.moved = nil
		im.clean.built()
		im.built(b, buf, []builtObject{{header: &h, bytes: buf}})
	})
}

// built says that the objects of b are in buf.
func (im *Image) built(b *batch, buf []byte, objects []builtObject) {
	b.buf, b.built, b.state, b.tries = buf, objects, batchBuilt, 0
	im.pumpNow()
}

// build makes b's objects on a worker, from memory if all of b is still there.
func (im *Image) build(b *batch) {
	b.state = batchBuilding
	if b.cleaned() {
		im.buildCleaned(b)
		return
	}
	h := im.headerFor(b)
	pinned := im.log.Pin(b.start)
	var buf []byte
	var objects []builtObject
	var err error
	work := func() { buf, objects, err = im.buildFromSSD(b, h) }
	if pinned {
		mirror := im.log.Mirror(b.start, b.end)
		work = func() { buf, objects, err = b.build(h, mirrorSource{im.log, mirror}, im.buffer) }
	}
	im.spawn(work, func() {
		if pinned {
			im.log.Unpin(b.start)
		}
		if im.state == Fenced || im.state == Released {
			return
		}
		if err != nil {
			im.logger.Error("cannot read back the write log: what it holds cannot be destaged", "log", im.logID, "err", err)
			im.retry(b, batchSealed, fmt.Errorf("log %s: %w", im.logID, err))
			return
		}
		im.built(b, buf, objects)
	})
}

// buildFromSSD builds b's objects from what the SSD has of them. Workers call it.
func (im *Image) buildFromSSD(b *batch, h objectHeader) ([]byte, []builtObject, error) {
	window := im.windows.take(readWindow)
	if window == nil {
		window = im.log.Buffer(readWindow)
	}
	defer im.windows.give(window)
	return b.build(h, &diskSource{log: im.log, end: b.end / SectorSize, window: window}, im.buffer)
}

// objectHeadroom is the room for headers in the memory that objects are built in, in bytes.
const objectHeadroom = 128 << 10

// bufferSize is the memory that an object is built in: all of them have room for the
// largest one with a usual header, so that each may be used for any.
func (im *Image) bufferSize() int { return int(im.object)*SectorSize + objectHeadroom }

// buffer returns n bytes for an object, perhaps used before. Workers call it.
func (im *Image) buffer(n int) []byte {
	if b := im.shared.buffers.take(n); b != nil {
		return b
	}
	return make([]byte, n, max(n, im.bufferSize()))
}

// takeMemory takes the memory for b's object, if it may.
func (im *Image) takeMemory(b *batch) bool {
	n := int64(im.bufferSize())
	if !im.shared.destage.take(im.memory, n) {
		return false
	}
	im.memory, b.memory = im.memory+n, n
	return true
}

// giveMemory gives back what memory b's object has.
func (im *Image) giveMemory(b *batch) {
	if b.memory > 0 {
		im.shared.destage.give(im.memory, b.memory)
		im.memory, b.memory = im.memory-b.memory, 0
	}
}

// put writes those of b's objects to the store that are not there, side by side: a store
// that is far away takes as long for a small one.
func (im *Image) put(b *batch) {
	b.state, b.failed = batchPutting, nil
	for i := range b.built {
		if o := &b.built[i]; o.bytes != nil {
			b.putting++
			im.putOne(b, o)
		}
	}
}

func (im *Image) putOne(b *batch, o *builtObject) {
	key := dataKey(im.id, o.header.seq, o.header.epoch)
	var err error
	im.spawn(func() { err = im.putObject(key, o.bytes, o.header.header) }, func() {
		if mutate.On(mutate.PutForgotten) && errors.Is(err, backend.ErrTemporary) {
			err = nil
		}
		switch {
		case im.state == Fenced || im.state == Released:
			return
		case errors.Is(err, errOtherContents):
			im.fenced(err)
			return
		case err != nil:
			b.failed = err
		default:
			im.storeWorks(usePut)
			im.stats.objects++
			im.stats.objectBytes += uint64(len(o.bytes))
			o.bytes = nil
		}
		if b.putting--; b.putting > 0 {
			return
		}
		if b.failed != nil {
			im.retry(b, batchBuilt, b.failed)
			return
		}
		im.stored(b)
	})
}

// stored says that all of b's objects are in the store.
func (im *Image) stored(b *batch) {
	b.state = batchDurable
	im.shared.buffers.give(b.buf)
	b.buf = nil
	im.giveMemory(b)
	im.advance()
}

var errOtherContents = errors.New("another writer has put an object of this number")

// putObject puts an object. One that is there already is our own, of an attempt
// whose outcome was not known, if its header, which vouches for the data, is the
// same.
func (im *Image) putObject(key string, object []byte, header int) error {
	ctx, stop := context.WithTimeout(im.ctx, im.cfg.StoreTimeout)
	defer stop()
	err := im.store.Put(ctx, key, object)
	if !errors.Is(err, backend.ErrExists) {
		return err
	}
	there := make([]byte, header)
	n, err := im.store.Get(ctx, key, there, 0)
	if err != nil {
		return err
	}
	if _, err := decodeObjectHeader(there[:n], im.span.Load()); err != nil {
		return fmt.Errorf("object %s, which is there: %w", key, err) // not another writer's: it may be the answer that is damaged
	}
	if n != header || !bytes.Equal(there, object[:header]) {
		return fmt.Errorf("%w: %s", errOtherContents, key)
	}
	return nil
}

// notifyDestaged tells those who waited for what has been accepted.
func (im *Image) notifyDestaged() {
	kept := im.waiters[:0]
	var ready []waiter
	for _, w := range im.waiters {
		if w.object <= im.accepted.object {
			ready = append(ready, w)
		} else {
			kept = append(kept, w)
		}
	}
	im.waiters = kept
	for _, w := range ready {
		w.fn(nil)
	}
}

// recoverRecord enters a record that recovery found in the log into the dirty
// map and the batches that are to be destaged.
func (im *Image) recoverRecord(r writelog.Record, before position) {
	sectors := uint32(0)
	for _, e := range r.Extents {
		if !e.Zero {
			sectors += e.N
		}
	}
	if im.open != nil && (im.open.sectors+uint64(sectors) > im.object || len(im.open.extents)+len(r.Extents) > maxBatchExtents || r.End-im.open.start > im.log.Size()/8) {
		im.sealAt(before.seq, before.logEnd)
	}
	for _, e := range r.Extents {
		im.note(e)
	}
}
