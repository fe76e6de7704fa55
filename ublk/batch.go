package ublk

import (
	"encoding/binary"
	"fmt"
	"os"

	"github.com/lsd-ceph/lsd/internal/uring"
	"golang.org/x/sys/unix"
)

const (
	// maxBatches is how many batches of a queue can be on their way at a time. Two fill
	// up while others are in flight, which the kernel ends as it takes them; more results
	// than they hold wait in a list.
	maxBatches = 8

	// The kernel tells at most 128 tags at a time (MAX_NR_TAG, drivers/block/ublk_drv.c).
	// If it should find no buffer it ends the fetch, and we send another one.
	fetchBuffers = 64
	fetchBytes   = 128 * tagBytes
	tagBytes     = 2
)

// batchQueue is the carrier of a queue's tags with UBLK_F_BATCH_IO. One command waits in
// the kernel for all requests and completes for several at a time, with their tags
// (UBLK_U_IO_FETCH_IO_CMDS, of which a batchQueue is the Completer). All results of a turn
// go in one command (UBLK_U_IO_COMMIT_IO_CMDS), see batch.
//
// Everything in it is the reactor's.
type batchQueue struct {
	d      *Device
	number uint16
	tags   []tag
	mem    []byte     // arena memory: fetched's, then that of the batches
	elem   int        // size of an element, which has the buffer's address if
	flags  batchFlags // say so

	buffers int            // how many there are in fetched
	fetched *uring.Buffers // tags that the kernel tells
	held    int            // requests and results that have come and not gone, see settled
	over    bool           // the kernel has ended the fetch
	res     int32          // with this

	refetched int // how often the kernel has found no buffer

	batches [maxBatches]batch
	free    *batch    // a list
	open    [2]*batch // those that may take one more result; the second's come in time or not
	// Results for which there was no batch.
	first, last *tag
}

// batch is one command for several tags: to commit results or, first of all, to offer the
// tags. It is in the submission queue from the first result on, and more join it until the
// ring is submitted.
type batch struct {
	q      *batchQueue
	op     command
	inTime bool
	elems  []byte // arena memory for an element for each tag
	n      int    // elements in it
	at     uring.Queued
	next   *batch
}

// batchMemory returns how many bytes newBatchQueues needs for each queue.
func batchMemory(depth int) int {
	page := os.Getpagesize()
	n := uring.BuffersSize(fetchBuffers, fetchBytes) + maxBatches*depth*sizeofElement
	return (n + page - 1) / page * page
}

// newBatchQueues returns the carriers of all tags; mem is page-aligned arena memory.
func newBatchQueues(d *Device, mem []byte) []carrier {
	list := make([]carrier, d.info.Queues)
	depth, size := d.info.Depth, batchMemory(d.info.Depth)
	for i := range list {
		q := &batchQueue{d: d, number: uint16(i), buffers: fetchBuffers, tags: d.tags[i*depth : (i+1)*depth], mem: mem[i*size : (i+1)*size], elem: sizeofElement, flags: batchHasBufAddr}
		if d.info.Flags.Has(FeatureUserCopy) {
			q.elem, q.flags = sizeofElemHeader, 0
		}
		for t := range q.tags {
			q.tags[t].via = q
		}
		list[i] = q
	}
	return list
}

// offer implements carrier: it readies the tags, each with its buffer's address. The fetch
// follows when that is done, for in a recovery the kernel refuses it before.
func (q *batchQueue) offer() error {
	var err error
	if q.fetched, err = q.d.ring.NewBuffers(q.mem, q.buffers, fetchBytes); err != nil {
		return err
	}
	elems := q.mem[uring.BuffersSize(fetchBuffers, fetchBytes):]
	size := len(q.tags) * q.elem
	for i := range q.batches {
		q.batches[i] = batch{q: q, elems: elems[i*size : (i+1)*size], next: q.free}
		q.free = &q.batches[i]
	}
	b := q.take(ioPrepIOCmds, false)
	for i := range q.tags {
		b.put(&q.tags[i])
	}
	q.held++
	b.send()
	return nil
}

// take takes a batch off the free list, which is not empty.
func (q *batchQueue) take(op command, inTime bool) *batch {
	b := q.free
	q.free, b.next = b.next, nil
	b.op, b.inTime, b.n = op, inTime, 0
	return b
}

// put adds a tag's element (struct ublk_elem_header, and the buffer's address where there
// is one). There is room for it.
func (b *batch) put(t *tag) {
	e := b.elems[b.n*b.q.elem : (b.n+1)*b.q.elem]
	binary.NativeEndian.PutUint16(e[0:], t.io.Tag)
	binary.NativeEndian.PutUint16(e[2:], 0)
	binary.NativeEndian.PutUint32(e[4:], uint32(t.res))
	if len(e) > sizeofElemHeader {
		binary.NativeEndian.PutUint64(e[sizeofElemHeader:], t.addr)
	}
	b.n++
}

// tag returns the tag of element i.
func (b *batch) tag(i int) *tag {
	return &b.q.tags[binary.NativeEndian.Uint16(b.elems[i*b.q.elem:])]
}

// send queues the command.
func (b *batch) send() {
	d, cmd := b.q.d, b.header()
	elems := b.elems[:b.n*b.q.elem]
	if b.inTime {
		b.at = d.ring.CommandBefore(d.char, uint32(b.op), cmd[:], elems, b)
		return
	}
	b.at = d.ring.Command(d.char, uint32(b.op), cmd[:], elems, b)
	if b.op == ioCommitIOCmds {
		d.ring.Prompt() // but for results that the kernel refuses
	}
}

// header returns the struct ublk_batch_io of the command.
func (b *batch) header() [sizeofBatchIO]byte {
	return batchIO(b.q.number, b.q.flags, b.n, b.q.elem)
}

// commit implements carrier.
func (q *batchQueue) commit(t *tag) {
	if q.join(t) {
		return
	}
	t.next = nil
	if q.last != nil {
		q.last.next = t
	} else {
		q.first = t
	}
	q.last = t
}

// join puts a tag's result into a batch that has not been submitted. It reports whether
// there was one, or could be.
func (q *batchQueue) join(t *tag) bool {
	open := &q.open[0]
	if t.inTime {
		open = &q.open[1]
	}
	if b := *open; b != nil && b.n < len(q.tags) {
		b.put(t)
		cmd := b.header()
		if q.d.ring.Amend(b.at, cmd[:]) {
			return true
		}
		b.n-- // it is in flight: the kernel does not know of that one
	}
	if q.free == nil {
		return false
	}
	*open = q.take(ioCommitIOCmds, t.inTime)
	(*open).put(t)
	(*open).send()
	return true
}

// idle implements carrier.
func (q *batchQueue) idle() bool { return q.held == 0 }

// Complete implements uring.Completer: the kernel has done with the batch what it could.
func (b *batch) Complete(res int32, _ uint32) {
	q := b.q
	for i := range q.open {
		if q.open[i] == b {
			q.open[i] = nil
		}
	}
	switch {
	case b.op == ioPrepIOCmds:
		q.offered(res)
		b.release()
	case b.inTime && uring.TooLate(res):
		for i := range b.n {
			b.tag(i).late()
		}
		b.release()
	default:
		b.committed(res)
	}
}

// committed takes note of how far the kernel came. It stops at the first result that it
// does not take and says how many bytes of elements come before that, or the error if
// there are none. As with any carrier, a tag whose result it does not take is lost; the
// others must not be.
func (b *batch) committed(res int32) {
	q := b.q
	done := int(res) / q.elem
	if res <= 0 || done == 0 || done > b.n {
		q.d.fault(fmt.Errorf("ublk: device %d: result of request %d.%d refused: %w", q.d.info.ID, q.number, b.tag(0).io.Tag, unix.Errno(max(-res, 0))))
		done = 1
	}
	b.n -= done
	if b.n == 0 {
		b.release()
	} else {
		copy(b.elems, b.elems[done*q.elem:(done+b.n)*q.elem])
		b.send()
	}
	q.settled(done)
}

// release puts the batch, which the kernel does not use, on the free list, and lets
// results that wait have it.
func (b *batch) release() {
	q := b.q
	b.next, q.free = q.free, b
	for q.first != nil && q.join(q.first) {
		q.first = q.first.next
	}
	if q.first == nil {
		q.last = nil
	}
}

// offered takes note of whether the kernel has all tags, and waits for requests.
func (q *batchQueue) offered(res int32) {
	if res == 0 {
		q.fetch()
	} else {
		q.over, q.res = true, res
	}
	q.settled(1)
}

// fetch waits for requests.
func (q *batchQueue) fetch() {
	cmd := batchIO(q.number, 0, 0, tagBytes)
	q.d.ring.CommandMultishot(q.d.char, uint32(ioFetchIOCmds), cmd[:], q.fetched, q)
}

// Complete implements uring.Completer: the kernel has put requests into tags, or ends the
// fetch, or both.
func (q *batchQueue) Complete(res int32, flags uint32) {
	if res > 0 {
		q.arrived(q.fetched.Get(flags), int(res))
	}
	q.fetched.Put(flags)
	switch {
	case uring.More(flags):
	case res >= 0 || res == -int32(unix.ENOBUFS):
		// All of the buffers were taken. They have been given back meanwhile, and the
		// kernel has kept the requests.
		q.refetched++
		q.fetch()
	default:
		q.over, q.res = true, res
		q.settled(0)
	}
}

// arrived gives the handler the requests in the tags that are in the first n bytes of buf.
func (q *batchQueue) arrived(buf []byte, n int) {
	if n > len(buf) || n%tagBytes != 0 {
		q.d.fault(fmt.Errorf("ublk: device %d: %d bytes of requests in %d", q.d.info.ID, n, len(buf)))
		return
	}
	for buf = buf[:n]; len(buf) != 0; buf = buf[tagBytes:] {
		i := int(binary.NativeEndian.Uint16(buf))
		if i >= len(q.tags) || q.tags[i].busy {
			q.d.fault(fmt.Errorf("ublk: device %d: a request in slot %d.%d, which has none to offer", q.d.info.ID, q.number, i))
			continue
		}
		q.held++
		q.tags[i].arrived()
	}
}

// settled takes note that n of what was held has gone: the kernel knows the results. The
// last to go after the end of the fetch ends the queue.
func (q *batchQueue) settled(n int) {
	q.held -= n
	if !q.over || q.held != 0 {
		return
	}
	if err := q.fetched.Close(); err != nil {
		q.d.fault(err)
	}
	q.d.ended(q.res)
}
