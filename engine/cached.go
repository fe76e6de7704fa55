package engine

import (
	"context"
	"encoding/binary"
	"fmt"
	"syscall"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/cache/readcache"
	"github.com/lsd-ceph/lsd/internal/mutate"
)

// sumsBlock is where the read cache has the checksums of an object's blocks, far
// behind its data: four bytes each, in order, little-endian.
const sumsBlock = 1 << 31

const blockSectors = objectBlock / SectorSize

// maxReady is the most that the reactor copies by itself of what was read ahead:
// workers copy more than that side by side, and it goes on meanwhile.
const maxReady = 256 << 10 // bytes

// objectName returns the name of an object for the read cache.
func (im *Image) objectName(info *objectInfo) readcache.Object {
	return readcache.Object{Image: im.line.of(uint64(info.number)), Number: uint64(info.number), Epoch: uint64(info.epoch)}
}

// key returns the read cache's key of an object's data.
func (im *Image) key(info *objectInfo) readcache.Key {
	return im.cache.Key(im.objectName(info), uint64(info.sectors)*SectorSize)
}

// readFromObject reads n of r's sectors from s on, which are at loc in an object:
// what the read cache has from there, the rest on workers.
func (im *Image) readFromObject(r *Request, s uint64, n uint32, loc uint64, info *objectInfo) {
	k := im.key(info)
	for n > 0 {
		if m := im.readComing(r, s, n, loc, info, &k); m > 0 {
			s, n, loc = s+uint64(m), n-m, loc+uint64(m)
			continue
		}
		first, skip := uint32(offsetOf(loc)/blockSectors), uint32(offsetOf(loc)%blockSectors)
		run := im.cache.Next(&k, first, (skip+n+blockSectors-1)/blockSectors, true)
		m := min(run.N*blockSectors-skip, n)
		dst := r.part(s, m)
		switch {
		case !run.Cached:
			im.readSlow(slowStore, r, s, m, loc, info, &k)
			im.reads.Miss(len(dst))
		case run.Memory && im.cache.Copy(&k, first, run, int(skip)*SectorSize, dst):
			im.reads.Hit(len(dst))
		case run.Memory || im.cacheDev == nil || skip != 0 || m%blockSectors != 0 || !r.direct(s):
			im.reads.Hit(len(dst))
			im.readSlow(slowLocal, r, s, m, loc, info, &k)
		default:
			im.readCached(r, s, m, loc, info, &k, run)
		}
		s, n, loc = s+uint64(m), n-m, loc+uint64(m)
	}
}

// readComing reads what has been read ahead, or is being read: at once if it is there
// and not large, else when it has come. It returns how many of the n sectors it has seen
// to. Only requests of which some may be on its way look for that, before they ask the cache.
func (im *Image) readComing(r *Request, s uint64, n uint32, loc uint64, info *objectInfo, k *readcache.Key) uint32 {
	if !r.stream {
		return 0
	}
	dst := r.part(s, n)
	if len(dst) > maxReady {
		dst = nil
	}
	got, coming := im.reads.Ready(k, offsetOf(loc)*SectorSize, dst)
	if !coming.Known {
		return 0
	}
	if got > 0 {
		return uint32(got / SectorSize)
	}
	if o, ok := coming.By.(*aheadRead); ok && o.im == im && dst != nil {
		r.pending++
		o.waiting = append(o.waiting, waitingPart{r, s, n})
		return n
	}
	im.readSlow(slowStore, r, s, n, loc, info, k)
	im.reads.Miss(int(n) * SectorSize)
	return n
}

// readSlow reads a part of r on a worker.
func (im *Image) readSlow(kind slowKind, r *Request, s uint64, n uint32, loc uint64, info *objectInfo, k *readcache.Key) {
	o := im.newSlowRead(r, s, n, r.part(s, n))
	o.kind, o.object, o.loc, o.key, o.src = kind, true, loc, *k, objectSource{im, *info}
	im.startSlow(o)
}

// cacheRead is a read of whole blocks of the read cache, through the reactor's
// ring.
type cacheRead struct {
	im     *Image
	r      *Request
	sector uint64
	n      uint32
	loc    uint64
	info   objectInfo
	key    readcache.Key
	run    readcache.Run
	dst    []byte
}

// readCached reads a part of r that the read cache has on the SSD.
func (im *Image) readCached(r *Request, s uint64, n uint32, loc uint64, info *objectInfo, k *readcache.Key, run readcache.Run) {
	var o *cacheRead
	if l := len(im.cacheOps); l > 0 {
		o, im.cacheOps = im.cacheOps[l-1], im.cacheOps[:l-1]
	} else {
		o = new(cacheRead)
	}
	*o = cacheRead{im, r, s, n, loc, *info, *k, run, r.part(s, n)}
	r.pending++
	im.cacheReads++
	im.cacheDev.ReadAt(o.dst, im.cache.Offset(run), o)
}

// Complete receives the device's result. Whatever is wrong with it, the store has
// the truth.
func (o *cacheRead) Complete(res int32, _ uint32) {
	im, r := o.im, o.r
	im.cacheReads--
	good := false
	switch {
	case res < 0:
		im.cache.Failed(syscall.Errno(-res))
	case int(res) != len(o.dst):
		im.cache.Failed(fmt.Errorf("it ended after %d of %d bytes", res, len(o.dst)))
	default:
		good = im.cache.Verify(&o.key, uint32(offsetOf(o.loc)/blockSectors), o.run, o.dst)
	}
	if good {
		im.reads.Hit(len(o.dst))
	} else {
		im.reads.Miss(len(o.dst))
		im.readSlow(slowStore, r, o.sector, o.n, o.loc, &o.info, &o.key)
	}
	o.r, o.dst = nil, nil
	im.cacheOps = append(im.cacheOps, o)
	im.maintainCache() // it may be worth some memory
	im.partDone(r, 0)
}

// maintainCache has a worker write and evict what the read cache has gathered.
func (im *Image) maintainCache() {
	if im.maintaining || !im.cache.Wants() {
		return
	}
	im.maintaining = true
	im.spawn(im.cache.Maintain, func() { im.maintaining = false })
}

// objectSource reads a data object from the store. Workers use it.
type objectSource struct {
	im   *Image
	info objectInfo
}

// Fetch implements readcache.Source.
func (s *objectSource) Fetch(ctx context.Context, first uint32, p []byte) error {
	r := backend.Range{Off: int64(s.info.headerBytes()) + int64(first)*objectBlock, P: p}
	n, err := s.im.store.Get(ctx, s.key(), r.P, r.Off)
	if err != nil {
		return err
	}
	// Fetched meanwhile, if they were not at hand: see fetchSums.
	sums, err := s.im.objectSums(ctx, &s.info)
	if err != nil {
		return err
	}
	r.N = n
	return s.verify(r, sums)
}

// fetchRanges reads ranges of the object, each of whole blocks of its data, in one operation
// of the store, and verifies them.
func (s *objectSource) fetchRanges(ctx context.Context, ranges []backend.Range, sums []uint32) error {
	if err := backend.GetRanges(ctx, s.im.store, s.key(), ranges); err != nil {
		return err
	}
	for _, r := range ranges {
		if err := s.verify(r, sums); err != nil {
			return err
		}
		s.im.reads.Fetched(r.N)
	}
	return nil
}

// key returns the store's key of the object.
func (s *objectSource) key() string {
	return s.im.line.dataKey(uint64(s.info.number), uint64(s.info.epoch))
}

// verify checks whole blocks that the store has read by the checksums of the object's data.
func (s *objectSource) verify(r backend.Range, sums []uint32) error {
	header := s.info.headerBytes()
	if r.N != len(r.P) {
		return fmt.Errorf("object %s: %w: it ends after %d bytes, it should have %d", s.key(), ErrCorrupt, r.Off+int64(r.N), header+int(s.info.sectors)*SectorSize)
	}
	if err := verifyBlocks(r.P, sums, int(r.Off-int64(header))/objectBlock); err != nil && !mutate.On(mutate.ObjectUnverified) {
		return fmt.Errorf("object %s: %w", s.key(), err)
	}
	return nil
}

// objectSums returns the checksums of an object's data: those at hand, else from
// the read cache, else from the object's header.
func (im *Image) objectSums(ctx context.Context, info *objectInfo) ([]uint32, error) {
	if s := im.sums.get(info.number); s != nil {
		return s, nil
	}
	sums := make([]uint32, sumCount(info))
	b := make([]byte, 4*len(sums))
	k, _ := im.sumsKey(info)
	if _, err := im.reads.Read(ctx, &k, sumsBlock*objectBlock, b, &sumsSource{im, *info}, readcache.Keep); err != nil {
		return nil, err
	}
	for i := range sums {
		sums[i] = binary.LittleEndian.Uint32(b[4*i:])
	}
	im.sums.add(info.number, sums)
	return sums, nil
}

// sumCount returns how many checksums an object's data has.
func sumCount(info *objectInfo) int { return int((info.sectors + blockSectors - 1) / blockSectors) }

// sumsKey returns the read cache's key of an object's checksums, and the number of
// blocks that they fill.
func (im *Image) sumsKey(info *objectInfo) (k readcache.Key, blocks uint32) {
	n := 4 * sumCount(info)
	return im.cache.Key(im.objectName(info), sumsBlock*objectBlock+uint64(n)), uint32(n+objectBlock-1) / objectBlock
}

// sumsSource reads the checksums of an object's data from its header.
type sumsSource struct {
	im   *Image
	info objectInfo
}

// Fetch implements readcache.Source.
func (s *sumsSource) Fetch(ctx context.Context, first uint32, p []byte) error {
	h, err := s.im.readHeader(ctx, s.info)
	if err != nil {
		return err
	}
	s.im.reads.Fetched(h.header - len(p))
	skip := int(first-sumsBlock) * objectBlock / 4
	for i, sum := range h.sums[skip : skip+len(p)/4] {
		binary.LittleEndian.PutUint32(p[4*i:], sum)
	}
	return nil
}
