package engine

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/internal/extmap"
)

// A checkpoint is the map after one data object: a manifest, which lists the
// data objects and the map segments, and the segments, each of which holds the
// extents of a fixed span of the image. A segment is written again only when
// something in it has changed. docs/formats.md gives both byte for byte.
const (
	manifestMagic   = "LSDCKPT\x00"
	segmentMagic    = "LSDMAPS\x00"
	checkpointVers  = 1
	manifestFixed   = 112
	manifestObject  = 32
	manifestSegment = 32
	segmentFixed    = 64
	segmentExtent   = 16

	// segmentPages is the span of a map segment in pages: 256 MiB. It bounds
	// how long the reactor is busy encoding one.
	segmentPages   = 32
	segmentSectors = segmentPages * extmap.PageSectors

	checkpointPuts = 4 // segments that are being put at one time
)

// segmentRef says which checkpoint wrote the current state of a map segment.
type segmentRef struct {
	object  uint64 // 0: the segment is empty
	epoch   uint64
	extents uint32
	sum     uint32 // CRC32C of the whole segment object
}

// manifest is what a checkpoint's manifest holds.
type manifest struct {
	image    uuid.UUID
	epoch    uint64
	at       position
	log      uuid.UUID
	objects  []objectInfo
	segments map[uint32]segmentRef // by index, the empty ones left out
}

// encodeSegment returns the object of map segment index.
func encodeSegment(id uuid.UUID, index uint32, m *extmap.Map) (b []byte, extents int) {
	le := binary.LittleEndian
	b = make([]byte, segmentFixed, segmentFixed+64*segmentExtent)
	base := uint64(index) * segmentSectors
	end := min(base+segmentSectors, m.Sectors())
	for s := base; s < end; {
		e, ok := m.Next(s, end)
		if !ok {
			break
		}
		b = le.AppendUint32(b, uint32(e.Sector-base))
		b = le.AppendUint32(b, e.N)
		b = le.AppendUint64(b, e.Loc)
		extents++
		s = e.End()
	}
	copy(b, segmentMagic)
	le.PutUint32(b[8:], checkpointVers)
	copy(b[16:], id[:])
	le.PutUint32(b[32:], index)
	le.PutUint32(b[36:], uint32(extents))
	le.PutUint32(b[12:], crc32.Checksum(b, castagnoli))
	return b, extents
}

// decodeSegment enters the extents of a segment object into m, which has none
// there, and calls each for every one of them.
func decodeSegment(b []byte, id uuid.UUID, index uint32, m *extmap.Map, each func(loc uint64, n uint32) error) error {
	le := binary.LittleEndian
	if err := checkObject(b, segmentMagic, segmentFixed, id); err != nil {
		return err
	}
	base := uint64(index) * segmentSectors
	size := min(segmentSectors, m.Sectors()-base)
	n := int(le.Uint32(b[36:]))
	if le.Uint32(b[32:]) != index || len(b)-segmentFixed != n*segmentExtent {
		return fmt.Errorf("%w: its header is out of range", ErrCorrupt)
	}
	end := uint64(0)
	for p := b[segmentFixed:]; len(p) > 0; p = p[segmentExtent:] {
		off, n, loc := uint64(le.Uint32(p)), le.Uint32(p[4:]), le.Uint64(p[8:])
		if n == 0 || off < end || uint64(n) > size || off > size-uint64(n) || loc&extmap.Fixed != 0 {
			return fmt.Errorf("%w: an extent is out of range", ErrCorrupt)
		}
		if err := each(loc, n); err != nil {
			return err
		}
		m.Insert(base+off, uint64(n), loc)
		end = off + uint64(n)
	}
	return nil
}

// checkObject checks magic, version, checksum and image of a checkpoint's object.
func checkObject(b []byte, magic string, fixed int, id uuid.UUID) error {
	le := binary.LittleEndian
	if len(b) < fixed || string(b[:8]) != magic {
		return fmt.Errorf("%w: it does not begin as it must", ErrCorrupt)
	}
	if v := le.Uint32(b[8:]); v != checkpointVers {
		return fmt.Errorf("%w or too new: version %d is not known here", ErrCorrupt, v)
	}
	c := crc32.Update(0, castagnoli, b[:12])
	c = crc32.Update(c, castagnoli, make([]byte, 4))
	if crc32.Update(c, castagnoli, b[16:]) != le.Uint32(b[12:]) {
		return fmt.Errorf("%w: its checksum is wrong", ErrCorrupt)
	}
	if [16]byte(b[16:32]) != id {
		return fmt.Errorf("%w: it belongs to another image", ErrCorrupt)
	}
	return nil
}

func (m *manifest) encode() []byte {
	le := binary.LittleEndian
	b := make([]byte, manifestFixed, manifestFixed+len(m.objects)*manifestObject+len(m.segments)*manifestSegment)
	copy(b, manifestMagic)
	le.PutUint32(b[8:], checkpointVers)
	copy(b[16:], m.image[:])
	le.PutUint64(b[32:], m.epoch)
	le.PutUint64(b[40:], m.at.object)
	le.PutUint64(b[48:], m.at.seq)
	copy(b[56:], m.log[:])
	le.PutUint64(b[72:], m.at.logEnd)
	le.PutUint32(b[80:], uint32(len(m.objects)))
	le.PutUint32(b[84:], uint32(len(m.segments)))
	for _, o := range m.objects {
		b = le.AppendUint64(b, uint64(o.ref))
		b = le.AppendUint64(b, o.epoch)
		b = le.AppendUint32(b, o.header)
		b = le.AppendUint32(b, o.sectors)
		b = le.AppendUint32(b, o.live)
		b = le.AppendUint32(b, 0)
	}
	for i := range m.segmentsBound() {
		s, ok := m.segments[i]
		if !ok {
			continue
		}
		b = le.AppendUint32(b, i)
		b = le.AppendUint32(b, s.extents)
		b = le.AppendUint64(b, s.object)
		b = le.AppendUint64(b, s.epoch)
		b = le.AppendUint32(b, s.sum)
		b = le.AppendUint32(b, 0)
	}
	le.PutUint32(b[12:], crc32.Checksum(b, castagnoli))
	return b
}

// segmentsBound returns one more than the greatest index.
func (m *manifest) segmentsBound() uint32 {
	bound := uint32(0)
	for i := range m.segments {
		bound = max(bound, i+1)
	}
	return bound
}

// decodeManifest decodes a checkpoint's manifest of an image of the given size.
func decodeManifest(b []byte, id uuid.UUID, sectors uint64) (*manifest, error) {
	le := binary.LittleEndian
	if err := checkObject(b, manifestMagic, manifestFixed, id); err != nil {
		return nil, err
	}
	m := &manifest{image: id, epoch: le.Uint64(b[32:]), segments: map[uint32]segmentRef{}}
	m.at = position{le.Uint64(b[40:]), le.Uint64(b[48:]), le.Uint64(b[72:])}
	copy(m.log[:], b[56:])
	objects, segments := int(le.Uint32(b[80:])), int(le.Uint32(b[84:]))
	if len(b)-manifestFixed != objects*manifestObject+segments*manifestSegment || m.at.object == 0 || m.at.object > maxObjectSeq {
		return nil, fmt.Errorf("%w: its header is out of range", ErrCorrupt)
	}
	p := b[manifestFixed:]
	m.objects = make([]objectInfo, objects)
	for i := range m.objects {
		o := objectInfo{ref: objectRef(le.Uint64(p)), epoch: le.Uint64(p[8:]), header: le.Uint32(p[16:]), sectors: le.Uint32(p[20:]), live: le.Uint32(p[24:])}
		if o.ref.source() != 0 || o.ref.seq() == 0 || o.ref.seq() > m.at.object || i > 0 && !m.objects[i-1].ref.less(o.ref) ||
			o.sectors > MaxObjectSize/SectorSize || o.live > o.sectors || o.header < objectAlign || o.header > maxObjectHeader || o.header%objectAlign != 0 {
			return nil, fmt.Errorf("%w: the entry of data object %d is out of range", ErrCorrupt, i)
		}
		m.objects[i], p = o, p[manifestObject:]
	}
	bound := uint32((sectors + segmentSectors - 1) / segmentSectors)
	for range segments {
		i := le.Uint32(p)
		s := segmentRef{extents: le.Uint32(p[4:]), object: le.Uint64(p[8:]), epoch: le.Uint64(p[16:]), sum: le.Uint32(p[24:])}
		if _, twice := m.segments[i]; twice || i >= bound || s.object == 0 || s.object > m.at.object || s.extents == 0 || s.extents > segmentSectors {
			return nil, fmt.Errorf("%w: the entry of map segment %d is out of range", ErrCorrupt, i)
		}
		m.segments[i], p = s, p[manifestSegment:]
	}
	return m, nil
}

// checkpointer writes checkpoints. The reactor owns it.
//
// A checkpoint begins after a data object has been accepted and must hold the
// map as it was then. The segments that have changed are encoded a few at a
// time; one that is about to change before its turn is encoded at once.
type checkpointer struct {
	im       *Image
	segments map[uint32]segmentRef // as of the last checkpoint that was published
	last     *checkpointRef        // that one, or nil
	dirty    map[uint32]bool       // changed since the last checkpoint began

	running *runningCheckpoint
	waiters []func(error) // want a checkpoint that begins from now on
}

// runningCheckpoint is a checkpoint that is being written.
type runningCheckpoint struct {
	at      position
	objects []objectInfo
	pending map[uint32]bool // to be encoded
	order   []uint32        // the same, in order
	ready   []encodedSegment
	puts    int
	written map[uint32]segmentRef
	old     []string // keys that it replaces
	final   bool     // the manifest is being put
	waiters []func(error)
	tries   int
}

type encodedSegment struct {
	index uint32
	b     []byte
	ref   segmentRef
}

func (c *checkpointer) start(im *Image) {
	c.im = im
}

// touch says that the map is about to change.
func (c *checkpointer) touch(s, n uint64) {
	for i := uint32(s / segmentSectors); i <= uint32((s+n-1)/segmentSectors); i++ {
		if c.running != nil && c.running.pending[i] {
			c.encode(i)
		}
		c.dirty[i] = true
	}
}

// maybe begins a checkpoint when enough objects have been accepted since the
// last one.
func (c *checkpointer) maybe() {
	since := c.im.accepted.object
	if c.last != nil {
		since -= c.last.Object
	}
	if c.running == nil && since >= uint64(c.im.cfg.CheckpointEvery) {
		c.begin(nil)
	}
}

// now writes a checkpoint of the map as it is, unless there is one; fn is told
// when it is published.
func (c *checkpointer) now(fn func(error)) {
	switch {
	case c.im.accepted.object == 0 || c.last != nil && c.last.Object == c.im.accepted.object:
		fn(nil)
	case c.running == nil:
		c.begin([]func(error){fn})
	default:
		c.waiters = append(c.waiters, fn)
	}
}

func (c *checkpointer) begin(waiters []func(error)) {
	im := c.im
	r := &runningCheckpoint{
		at: im.accepted, objects: append([]objectInfo(nil), im.table.list...),
		pending: c.dirty, written: map[uint32]segmentRef{}, waiters: waiters,
	}
	c.dirty = map[uint32]bool{}
	for i := range (im.sectors + segmentSectors - 1) / segmentSectors {
		if r.pending[uint32(i)] {
			r.order = append(r.order, uint32(i))
		}
	}
	c.running = r
	c.step()
}

// encode takes segment i of the running checkpoint as it is now.
func (c *checkpointer) encode(i uint32) {
	r, im := c.running, c.im
	delete(r.pending, i)
	b, extents := encodeSegment(im.id, i, im.objs)
	ref := segmentRef{object: r.at.object, epoch: im.super.sb.Epoch, extents: uint32(extents), sum: crc32.Checksum(b, castagnoli)}
	if old, ok := c.segments[i]; ok {
		r.old = append(r.old, segmentKey(im.id, i, old.object, old.epoch))
	}
	if extents == 0 {
		r.written[i] = segmentRef{}
		return
	}
	r.ready = append(r.ready, encodedSegment{i, b, ref})
}

// step goes on with the running checkpoint: at most one segment is encoded in a
// turn, so that no request waits for long.
func (c *checkpointer) step() {
	r := c.running
	if r == nil || r.final || c.im.state == Fenced || c.im.state == Released {
		return
	}
	if len(r.ready) == 0 && r.puts < checkpointPuts {
		for len(r.order) > 0 && !r.pending[r.order[0]] {
			r.order = r.order[1:]
		}
		if len(r.order) > 0 {
			c.encode(r.order[0])
		}
	}
	for r.puts < checkpointPuts && len(r.ready) > 0 {
		s := r.ready[0]
		r.ready = r.ready[1:]
		c.put(segmentKey(c.im.id, s.index, s.ref.object, s.ref.epoch), s.b, func() {
			r.puts--
			r.written[s.index] = s.ref
			c.step()
		})
		r.puts++
	}
	switch {
	case r.puts > 0:
	case len(r.pending) == 0:
		c.finish()
	default: // an empty segment was encoded: go on in a later turn
		c.im.env.AfterFunc(0, c.step)
	}
}

// put writes an object of the checkpoint, until it is there, and then calls fn.
func (c *checkpointer) put(key string, b []byte, fn func()) {
	im, r := c.im, c.running
	var err error
	im.spawn(func() {
		ctx, stop := context.WithTimeout(im.ctx, im.cfg.StoreTimeout)
		defer stop()
		// One that exists is this very object, put by an attempt whose outcome
		// was not known: its name holds this epoch, and one epoch begins one
		// checkpoint after an object.
		if err = im.store.Put(ctx, key, b); errors.Is(err, backend.ErrExists) {
			err = nil
		}
	}, func() {
		switch {
		case im.state == Fenced || im.state == Released:
		case err != nil:
			im.storeFailed(err)
			wait := im.backoff(r.tries)
			r.tries++
			im.env.AfterFunc(wait, func() {
				if c.running == r {
					c.put(key, b, fn)
				}
			})
		default:
			im.storeWorks()
			r.tries = 0
			fn()
		}
	})
}

// finish writes the manifest, publishes it, and removes what it replaces.
func (c *checkpointer) finish() {
	im, r := c.im, c.running
	r.final = true
	m := manifest{image: im.id, epoch: im.super.sb.Epoch, at: r.at, log: im.logID, objects: r.objects, segments: map[uint32]segmentRef{}}
	for i, s := range c.segments {
		m.segments[i] = s
	}
	for i, s := range r.written {
		if s.object == 0 {
			delete(m.segments, i)
		} else {
			m.segments[i] = s
		}
	}
	ref := &checkpointRef{Object: r.at.object, Epoch: im.super.sb.Epoch}
	c.put(manifestKey(im.id, ref.Object, ref.Epoch), m.encode(), func() {
		im.super.point = ref
		im.super.pointFn = func(error) { c.published(ref, m.segments) }
		im.updateSuper()
	})
}

func (c *checkpointer) published(ref *checkpointRef, segments map[uint32]segmentRef) {
	r, im := c.running, c.im
	if c.last != nil {
		r.old = append(r.old, manifestKey(im.id, c.last.Object, c.last.Epoch))
	}
	c.last, c.segments, c.running = ref, segments, nil
	waiters := c.waiters
	c.waiters = nil
	for _, fn := range waiters {
		c.now(fn)
	}
	c.maybe()
	// Those who waited may be about to end the image's work: they are told when
	// nothing is left to clean up.
	c.remove(r.old, func() {
		for _, fn := range r.waiters {
			fn(nil)
		}
	})
}

// remove deletes objects that nothing refers to any more, and then calls done.
// What cannot be deleted now wastes space until a collection finds it.
func (c *checkpointer) remove(keys []string, done func()) {
	im := c.im
	if len(keys) == 0 {
		done()
		return
	}
	im.spawn(func() {
		ctx, stop := context.WithTimeout(im.ctx, im.cfg.StoreTimeout+time.Duration(len(keys))*time.Second)
		defer stop()
		for _, k := range keys {
			if err := im.store.Delete(ctx, k); err != nil && !errors.Is(err, backend.ErrNotFound) {
				im.logger.Warn("an old part of a checkpoint could not be removed", "object", k, "err", err)
				return
			}
		}
	}, done)
}

// fail ends the running checkpoint with the image.
func (c *checkpointer) fail(err error) {
	var waiters []func(error)
	if c.running != nil {
		waiters = c.running.waiters
	}
	waiters = append(waiters, c.waiters...)
	c.running, c.waiters = nil, nil
	for _, fn := range waiters {
		fn(err)
	}
}
