package engine

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"reflect"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/cache/writelog"
	"github.com/lsd-ceph/lsd/internal/extmap"
	"github.com/lsd-ceph/lsd/internal/frame"
	"github.com/lsd-ceph/lsd/internal/racetest"
)

const fuzzSectors = 1 << 22

// fixSum makes the checksum at bytes 12 to 16 right, so that a fuzzer gets past
// it.
func fixSum(b []byte) {
	if len(b) >= 16 {
		binary.LittleEndian.PutUint32(b[12:], 0)
		binary.LittleEndian.PutUint32(b[12:], crc32.Checksum(b, castagnoli))
	}
}

func testObject() (*objectHeader, []byte) {
	h := &objectHeader{
		image: uuid.New(), epoch: 3, seq: 9, firstSeq: 100, lastSeq: 120, log: uuid.New(), logEnd: 1 << 33,
		extents: []objectExtentInfo{{8, 8, false}, {100, 1 << 20, true}, {3 << 20, 3, false}},
	}
	h.data = dataSize(h.extents)
	h.pack()
	b := make([]byte, h.header+h.data)
	for i := range b[h.header:] {
		b[h.header+i] = byte(i * 7)
	}
	h.encode(b)
	return h, b
}

func TestObjectHeaderRoundTrip(t *testing.T) {
	h, b := testObject()
	got, err := decodeObjectHeader(b[:h.header], fuzzSectors)
	want := *h
	want.packed = nil
	if err != nil || !reflect.DeepEqual(got, &want) {
		t.Fatalf("%+v, %v; want %+v", got, err, h)
	}
	if err := verifyBlocks(b[h.header:], got.sums, 0); err != nil {
		t.Error(err)
	}
	for i := range h.header {
		c := bytes.Clone(b[:h.header])
		c[i] ^= 0x10
		if _, err := decodeObjectHeader(c, fuzzSectors); err == nil {
			t.Fatalf("byte %d flipped: no error", i)
		}
	}
	b[len(b)-1] ^= 1
	if verifyBlocks(b[h.header:], got.sums, 0) == nil {
		t.Error("damaged data verifies")
	}
}

// TestObjectHeaderFlags: an object has no flags that are not known, and no other version.
func TestObjectHeaderFlags(t *testing.T) {
	for _, c := range []struct {
		what           string
		version, flags uint32
		ok, joined     bool
	}{
		{"alone", 4, 0, true, false},
		{"joined", 4, 1, true, true},
		{"an unknown flag", 4, 2, false, false},
		{"too old", 3, 0, false, false},
		{"too new", 5, 0, false, false},
	} {
		h, b := testObject()
		b = b[:h.header]
		binary.LittleEndian.PutUint32(b[8:], c.version)
		binary.LittleEndian.PutUint32(b[112:], c.flags)
		fixSum(b)
		got, err := decodeObjectHeader(b, fuzzSectors)
		if (err == nil) != c.ok || err == nil && got.joined != c.joined {
			t.Errorf("%s: %+v, %v", c.what, got, err)
		}
	}
	h, b := testObject()
	h.joined = true
	h.encode(b)
	if got, err := decodeObjectHeader(b[:h.header], fuzzSectors); err != nil || !got.joined {
		t.Errorf("a joined object: %+v, %v", got, err)
	}
}

// TestObjectHeaderOfAnything: extents of any number, length and order of magnitude are read
// as they were written, and the header of 8 MiB of random writes of 4 KiB is short.
func TestObjectHeaderOfAnything(t *testing.T) {
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 3))
		unit := []uint64{1, 8}[seed%2]
		h := &objectHeader{image: uuid.New(), epoch: 1, seq: 1, firstSeq: 1, lastSeq: 1}
		sector := uint64(0)
		for range rng.IntN(400) {
			sector += unit * (rng.Uint64N(1<<rng.IntN(20)) + rng.Uint64N(2))
			e := objectExtentInfo{sector: sector, n: uint32(unit * (1 + rng.Uint64N(8))), zero: rng.IntN(5) == 0}
			if e.zero {
				e.n *= 1 << rng.IntN(18)
			}
			h.extents = append(h.extents, e)
			sector += uint64(e.n)
		}
		h.data = dataSize(h.extents)
		h.pack()
		b := make([]byte, h.header+h.data)
		h.encode(b)
		got, err := decodeObjectHeader(b[:h.header], sector)
		if err != nil || len(got.extents) != len(h.extents) {
			t.Fatalf("seed %d: %v, %v", seed, got, err)
		}
		for i, e := range got.extents {
			if e != h.extents[i] {
				t.Fatalf("seed %d: extent %d is %+v, want %+v", seed, i, e, h.extents[i])
			}
		}
		if _, err := decodeObjectHeader(b[:h.header], max(sector, 1)-1); err == nil && len(h.extents) > 0 {
			t.Fatalf("seed %d: an extent beyond the end of the image passes", seed)
		}
	}
	st := newHugeStore(t, 1<<40)
	if h := st.header(st.last() + 1); h.header > 16<<10 {
		t.Errorf("the header of %d random writes of 4 KiB to 1 TiB has %d bytes", len(h.extents), h.header)
	}
}

func FuzzObjectHeader(f *testing.F) {
	h, b := testObject()
	f.Add(b[:h.header], false)
	f.Add(b[:h.header], true)
	h.joined = true
	h.encode(b)
	f.Add(b[:h.header], true)
	f.Fuzz(func(t *testing.T, b []byte, fix bool) {
		if fix {
			fixSum(b)
		}
		h, err := decodeObjectHeader(b, fuzzSectors)
		if err != nil {
			return
		}
		end := uint64(0)
		for _, e := range h.extents {
			if e.n == 0 || e.sector < end || e.sector+uint64(e.n) > fuzzSectors {
				t.Fatalf("extent %+v passed", e)
			}
			end = e.sector + uint64(e.n)
		}
		if len(h.sums) != (h.data+objectBlock-1)/objectBlock || h.data > MaxObjectSize {
			t.Fatalf("%d checksums for %d bytes", len(h.sums), h.data)
		}
	})
}

func TestSegmentRoundTrip(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	id := uuid.New()
	m := extmap.New(3*segmentSectors + 5000)
	for range 5000 {
		n := 1 + rng.Uint64N(100)
		m.Insert(rng.Uint64N(m.Sectors()-n), n, refOfSeq(1+rng.Uint64N(1<<20)).loc(rng.IntN(MaxObjectSize/SectorSize-100)))
	}
	got := extmap.New(m.Sectors())
	for i := range uint32(4) {
		want := segmentHead{segmentPart{index: i}, 7}
		b := encodeSegment(nil, id, want, extentsOf(m.Copy(segmentStart(i), segmentPages), segmentStart(i)))
		span := extmap.NewSpan(segmentStart(i), segmentPages)
		if head, err := decodeSegment(b, id, segmentPart{index: i}, m.Sectors(), enterInto(span)); err != nil || head != want {
			t.Fatalf("segment %d: %+v, %v", i, head, err)
		}
		got.Attach(span)
		for _, p := range []segmentPart{{i + 1, kindWhole}, {i, kindDelta}} {
			if _, err := decodeSegment(b, id, p, m.Sectors(), func(segmentExtent) {}); err == nil {
				t.Errorf("segment %d passes for a %v", i, p)
			}
		}
	}
	for s := uint64(0); ; {
		a, ok1 := m.Next(s, m.Sectors())
		b, ok2 := got.Next(s, m.Sectors())
		if a != b || ok1 != ok2 {
			t.Fatalf("from sector %d: %+v, want %+v", s, b, a)
		}
		if !ok1 {
			break
		}
		s = a.End()
	}
}

// TestSegmentSize holds a segment of random 4 KiB writes to what their places need: 17 bits
// for the object, 11 for that in it.
func TestSegmentSize(t *testing.T) {
	rng := rand.New(rand.NewPCG(2, 2))
	m := extmap.New(segmentSectors)
	for i := range uint64(segmentSectors / 8) {
		m.Insert(i*8, 8, refOfSeq(1+rng.Uint64N(1<<17)).loc(rng.IntN(2048)*8))
	}
	b := encodeSegment(nil, uuid.New(), segmentHead{}, extentsOf(m.Copy(0, segmentPages), 0))
	if limit := segmentSectors / 8 * 37 / 10; len(b) > limit {
		t.Errorf("%d bytes, more than %d", len(b), limit)
	}
}

func FuzzSegment(f *testing.F) {
	id := uuid.UUID{1}
	m := extmap.New(fuzzSectors)
	m.Insert(8, 8, refOfSeq(9).loc(64))
	m.Insert(80, 3, refOfSeq(7).loc(5))
	span := m.Copy(0, segmentPages)
	delta := segmentHead{segmentPart{kind: kindDelta}, 3}
	f.Add(encodeSegment(nil, id, segmentHead{}, extentsOf(span, 0)), true)
	f.Add(encodeSegment(nil, id, delta, within(span, 0, []sectorRange{{0, 12}, {80, 100}, {1000, 1001}})), true)
	f.Fuzz(func(t *testing.T, b []byte, fix bool) {
		if fix {
			fixSum(b)
		}
		span := extmap.NewSpan(0, segmentPages)
		end := uint64(0)
		enter := func(e segmentExtent) {
			if e.Sector < end || e.End() > fuzzSectors || e.N == 0 {
				t.Fatalf("extent %+v passed, after sector %d", e, end)
			}
			end = e.End()
			enterInto(span)(e)
		}
		_, err := decodeSegment(b, id, segmentPart{}, fuzzSectors, enter)
		if err != nil {
			end = 0
			span = extmap.NewSpan(0, segmentPages)
			_, err = decodeSegment(b, id, delta.segmentPart, fuzzSectors, enter)
		}
		if err != nil {
			return
		}
		m := extmap.New(fuzzSectors)
		m.Attach(span)
		m.Invariants()
		for s := uint64(0); ; {
			e, ok := m.Next(s, fuzzSectors)
			if !ok {
				break
			}
			if refOf(e.Loc).seq() == 0 || offsetOf(e.Loc)+int(e.N) > MaxObjectSize/SectorSize {
				t.Fatalf("extent %+v passed", e)
			}
			s = e.End()
		}
	})
}

func testManifest() manifest {
	return manifest{image: uuid.UUID{1}, epoch: 2, at: position{7, 70, 4096}, log: uuid.UUID{2},
		objects: []objectInfo{
			{number: 1, epoch: 1, header: 1, sectors: 64, live: 3, born: 1},
			{number: 5, epoch: 1, header: 1, sectors: 64, died: 6, born: 5},
			{number: 7, epoch: 2, header: 1, sectors: 8, live: 8, born: 2},
		},
		storedMap: storedMap{
			maps:     []mapObject{{at: checkpointRef{3, 1}, part: 1, size: 1000, live: 600}, {at: checkpointRef{7, 2}, size: 100, live: 100}},
			segments: [segmentKinds][]storedSegment{{{1, 0, 100}, {}, {0, 500, 500}}, {{0, 0, 100}}},
		},
	}
}

// TestManifestLimit: images whose manifests could become too large to be read are not
// made, and no such manifest is written.
func TestManifestLimit(t *testing.T) {
	if n := leastObjectSize(MaxSize); n > DefaultObjectSize {
		t.Errorf("the largest image needs objects of %d bytes, more than the default", n)
	}
	for least := uint32(MinObjectSize); least < leastObjectSize(MaxSize); least += 1 << 20 {
		// The largest image for which objects of this size will do.
		blocks := uint64(sort.Search(MaxSize/4096, func(n int) bool { return leastObjectSize(uint64(n)*4096) > least })) - 1
		for _, c := range []struct {
			size   uint64
			object uint32
			ok     bool
		}{
			{blocks * 4096, least, true},
			{(blocks + 1) * 4096, least, false},
			{(blocks + 1) * 4096, least + 1<<20, true},
		} {
			_, err := Create(context.Background(), mem.New(), "disk", CreateOptions{Size: c.size, ObjectSize: c.object})
			if n := largestManifest(c.size, uint64(c.object)); (err == nil) != c.ok || c.ok != (n <= maxManifest) {
				t.Errorf("size %d, objects of %d, manifest of up to %d: %v", c.size, c.object, n, err)
			}
			if want := fmt.Sprintf("needs %d at least", least+1<<20); !c.ok && !strings.Contains(fmt.Sprint(err), want) {
				t.Errorf("size %d, objects of %d: %v does not say %q", c.size, c.object, err, want)
			}
		}
	}
	if racetest.Enabled {
		return // which would touch all of what follows
	}
	st, m := mem.New(), &manifest{image: uuid.New(), epoch: 1, at: position{1, 1, 0}}
	if err := putManifest(context.Background(), st, m, make([]byte, maxManifest+1)); err == nil {
		t.Error("a manifest was written that is too large to be read")
	}
	if err := st.List(context.Background(), "", func(key string) error { return errors.New(key) }); err != nil {
		t.Errorf("part of it is in the store: %v", err)
	}
}

func FuzzManifest(f *testing.F) {
	m := testManifest()
	got, err := decodeManifest(m.encode(), m.image, fuzzSectors)
	if err != nil || !reflect.DeepEqual(*got, m) {
		f.Fatalf("%+v, %v; want %+v", got, err, m)
	}
	f.Add(m.encode(), true)
	f.Fuzz(func(t *testing.T, b []byte, fix bool) {
		if fix {
			fixSum(b)
		}
		if m, err := decodeManifest(b, uuid.UUID{1}, fuzzSectors); err == nil {
			if _, err := decodeManifest(m.encode(), m.image, fuzzSectors); err != nil {
				t.Fatalf("decoded a manifest that does not decode again: %v", err)
			}
			(&objectTable{}).load(m.objects)
		}
	})
}

func FuzzSuperblock(f *testing.F) {
	id := uuid.UUID{1}
	sb := &superblock{Image: id, Sectors: 8, BlockSize: 4096, ObjectSize: MinObjectSize, Window: 8}
	f.Add(sb.encode()[frame.HeaderSize:])
	sb.Trash = &trashed{ID: uuid.UUID{2}, Since: time.Unix(1<<30, 0), Until: time.Unix(1<<31, 0)}
	f.Add(sb.encode()[frame.HeaderSize:])
	f.Add([]byte(`{"image":"01000000-0000-0000-0000-000000000000","sectors":18446744073709551615,"block_size":512}`))
	f.Fuzz(func(t *testing.T, payload []byte) {
		s, err := decodeSuperblock(frame.Encode(superMagic, superVersion, payload), id)
		if err != nil {
			return
		}
		if s.Sectors > MaxSize/SectorSize || s.Window > maxWindow || s.Image != id {
			t.Fatalf("%+v passed", s)
		}
		s.epochOf(5)
		s.clone().pruneEpochs()
		if _, err := decodeSuperblock(s.encode(), id); err != nil {
			t.Fatalf("decoded a superblock that does not decode again: %v", err)
		}
	})
}

func TestSurvivors(t *testing.T) {
	const size = 400
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 9))
		want := make([]uint64, size) // log position, ^0 for zeroes
		written := make([]bool, size)
		var extents []writelog.Extent
		pos := uint64(1)
		for range 1 + rng.IntN(40) {
			n := 1 + rng.Uint32N(50)
			e := writelog.Extent{Sector: rng.Uint64N(size - uint64(n)), N: n, Pos: pos, Zero: rng.IntN(4) == 0}
			pos += 1000
			extents = append(extents, e)
			for i := range uint64(n) {
				want[e.Sector+i], written[e.Sector+i] = e.Pos+i, true
				if e.Zero {
					want[e.Sector+i] = ^uint64(0)
				}
			}
		}
		pieces := survivors(extents, make([]dataKind, len(extents)))
		end := uint64(0)
		for _, p := range pieces {
			if p.sector < end {
				t.Fatalf("seed %d: pieces overlap or are out of order", seed)
			}
			end = p.sector + uint64(p.n)
			for i := range uint64(p.n) {
				w := p.pos + i
				if p.zero {
					w = ^uint64(0)
				}
				if !written[p.sector+i] || want[p.sector+i] != w {
					t.Fatalf("seed %d: sector %d from %d, want %d", seed, p.sector+i, w, want[p.sector+i])
				}
				written[p.sector+i] = false
			}
		}
		for s, left := range written {
			if left {
				t.Fatalf("seed %d: sector %d is lost", seed, s)
			}
		}
		ext, bytes := layout(pieces)
		if dataSize(ext) != bytes {
			t.Fatalf("seed %d: extents have %d bytes of data, the pieces %d", seed, dataSize(ext), bytes)
		}
	}
}

// BenchmarkSurvivors is of a batch of blocks written at random, of which hardly two are the same.
func BenchmarkSurvivors(b *testing.B) {
	rng := rand.New(rand.NewPCG(1, 2))
	extents := make([]writelog.Extent, 2048)
	for i := range extents {
		extents[i] = writelog.Extent{Sector: rng.Uint64N(1<<18) * blockSectors, N: blockSectors, Pos: uint64(i) * 2 * blockSectors}
	}
	kinds := make([]dataKind, len(extents))
	for b.Loop() {
		survivors(extents, kinds)
	}
}

// TestManifestOfDeltas: the limit holds when each segment and each delta is alone in its map
// object, and so are the deltas that a checkpoint has replaced.
func TestManifestOfDeltas(t *testing.T) {
	const segments, size = 1000, 1000 * segmentSectors * SectorSize
	m := &manifest{}
	for i := range uint32(segments) {
		m.maps = append(m.maps, mapObject{}, mapObject{}, mapObject{})
		m.set(kindWhole, i, storedSegment{3 * i, 0, segmentFixed})
		m.set(kindDelta, i, storedSegment{3*i + 1, 0, segmentFixed})
	}
	m.objects = make([]objectInfo, fragments*segments+spareObjects)
	if n, most := m.size(), largestManifest(size, segmentSectors*SectorSize); uint64(n) > most {
		t.Errorf("a manifest of %d bytes, where %d are the most", n, most)
	}
}
