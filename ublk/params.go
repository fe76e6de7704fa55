package ublk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"os"
)

const sectorSize = 512

// MaxID is the greatest number of a device: the kernel has 20 bits for it.
const MaxID = 1<<20 - 1

// Params describe a device. Sizes are in bytes. The zero value of a field means
// its default.
type Params struct {
	// ID is the N of /dev/ublkbN; -1 lets the kernel choose.
	ID int

	// SizeBytes is the device's size, a multiple of LogicalBlock.
	SizeBytes uint64

	// LogicalBlock is the unit of all I/O (512 to 4096 and a power of two;
	// default 512), PhysicalBlock what is written without a read (default:
	// 4096). IOMin and IOOpt are the preferred least and best sizes of I/O,
	// powers of two (default: PhysicalBlock).
	LogicalBlock  int
	PhysicalBlock int
	IOMin         int
	IOOpt         int

	// MaxIOBytes is the greatest request, a multiple of the page size (default
	// 1 MiB). Each of Queues*Depth tags has a buffer of this size; it takes up
	// memory as far as it has been used.
	MaxIOBytes int

	// ReadOnly makes writes fail in the kernel.
	ReadOnly bool

	// VolatileCache says that writes are not durable when they complete: the
	// kernel sends flushes, and with FUA also writes with IO.FUA set. Without
	// it the kernel sends neither.
	VolatileCache bool
	FUA           bool

	// MaxDiscardBytes and MaxZeroesBytes are the greatest discard and
	// write-zeroes requests; 0 means that there are none. DiscardGranule is
	// the unit that discards should be aligned to (default: PhysicalBlock).
	MaxDiscardBytes uint64
	MaxZeroesBytes  uint64
	DiscardGranule  int

	// Queues is the number of hardware queues (default 1; the kernel lowers
	// it to the number of processors), Depth the number of requests in each
	// (default 128, at most 4096).
	Queues int
	Depth  int

	// NoData says that the handler neither fills IO.Buf nor looks at it. Where the
	// kernel can leave it out (FeatureUserCopy) nothing is copied and there is none:
	// a read returns what was in the reader's memory.
	NoData bool

	// NoRecovery makes the device vanish with its server instead of waiting
	// for the next one.
	NoRecovery bool
}

const (
	defaultLogical  = 512
	defaultPhysical = 4096
	defaultMaxIO    = 1 << 20
	defaultDepth    = 128
)

// withDefaults returns p with its defaults filled in.
func (p Params) withDefaults() Params {
	def := func(v *int, to int) {
		if *v == 0 {
			*v = to
		}
	}
	def(&p.LogicalBlock, defaultLogical)
	def(&p.PhysicalBlock, max(defaultPhysical, p.LogicalBlock))
	def(&p.IOMin, p.PhysicalBlock)
	def(&p.IOOpt, p.IOMin)
	def(&p.MaxIOBytes, defaultMaxIO)
	def(&p.DiscardGranule, p.PhysicalBlock)
	def(&p.Queues, 1)
	def(&p.Depth, defaultDepth)
	return p
}

// check returns what is wrong with p, whose defaults are filled in. The kernel
// would say EINVAL to all of it.
func (p Params) check() error {
	var errs []error
	bad := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	page := os.Getpagesize()
	bad(p.ID >= -1 && p.ID <= MaxID, "device number %d is not from 0 to %d", p.ID, MaxID)
	bad(powerOfTwo(p.LogicalBlock) && p.LogicalBlock >= 512 && p.LogicalBlock <= page,
		"logical block of %d bytes is not a power of two from 512 to %d", p.LogicalBlock, page)
	bad(powerOfTwo(p.PhysicalBlock) && p.PhysicalBlock >= p.LogicalBlock,
		"physical block of %d bytes is not a power of two, or smaller than the logical one", p.PhysicalBlock)
	bad(powerOfTwo(p.IOMin) && powerOfTwo(p.IOOpt), "preferred I/O sizes %d and %d are not powers of two", p.IOMin, p.IOOpt)
	bad(p.MaxIOBytes > 0 && p.MaxIOBytes%page == 0 && p.MaxIOBytes <= maxIOBytes,
		"greatest request of %d bytes is not a multiple of %d up to %d", p.MaxIOBytes, page, maxIOBytes)
	bad(p.Queues > 0 && p.Queues <= maxQueues, "%d queues; the kernel has 1 to %d", p.Queues, maxQueues)
	bad(p.Depth > 0 && p.Depth <= maxQueueDepth, "queue depth %d; the kernel has 1 to %d", p.Depth, maxQueueDepth)
	if p.LogicalBlock > 0 {
		bad(p.SizeBytes > 0 && p.SizeBytes%uint64(p.LogicalBlock) == 0,
			"size of %d bytes is not a multiple of the block size %d", p.SizeBytes, p.LogicalBlock)
	}
	bad(!p.FUA || p.VolatileCache, "FUA without a volatile cache")
	bad(powerOfTwo(p.DiscardGranule), "discard granule of %d bytes is not a power of two", p.DiscardGranule)
	bad(p.MaxDiscardBytes%sectorSize == 0 && p.MaxZeroesBytes%sectorSize == 0 &&
		p.MaxDiscardBytes>>32 < sectorSize && p.MaxZeroesBytes>>32 < sectorSize,
		"greatest discard of %d or write-zeroes of %d bytes is not in whole sectors, or above 2 TiB", p.MaxDiscardBytes, p.MaxZeroesBytes)
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("ublk: %w", err)
	}
	return nil
}

func powerOfTwo(n int) bool { return n > 0 && n&(n-1) == 0 }

func shift(n int) uint8 { return uint8(bits.TrailingZeros(uint(n))) }

// flags returns the device's feature flags with a driver that has the features f.
func (p Params) flags(f Features) Features {
	flags := FeatureIoctlEncode
	if p.Depth > 1 { // the driver's queue of tags (a kfifo) has at least two
		flags |= f & FeatureBatchIO
	}
	if p.NoData { // user space copies, if it wants to
		flags |= f & FeatureUserCopy
	}
	if !p.NoRecovery {
		flags |= FeatureRecovery | FeatureReissue
	}
	return flags
}

// encode returns p as struct ublk_params.
func (p Params) encode() []byte {
	a := paramsABI{
		Len:           sizeofParams,
		Types:         paramBasic,
		LogicalShift:  shift(p.LogicalBlock),
		PhysicalShift: shift(p.PhysicalBlock),
		IOOptShift:    shift(p.IOOpt),
		IOMinShift:    shift(p.IOMin),
		MaxSectors:    uint32(p.MaxIOBytes / sectorSize),
		DevSectors:    p.SizeBytes / sectorSize,
	}
	for _, attr := range []struct {
		on  bool
		bit uint32
	}{
		{p.ReadOnly, attrReadOnly},
		{p.VolatileCache, attrVolatileCache},
		{p.FUA, attrFUA},
	} {
		if attr.on {
			a.Attrs |= attr.bit
		}
	}
	if p.MaxDiscardBytes != 0 || p.MaxZeroesBytes != 0 {
		a.Types |= paramDiscard
		a.DiscardGranule = uint32(p.DiscardGranule)
		a.MaxDiscardSectors = uint32(p.MaxDiscardBytes / sectorSize)
		a.MaxZeroesSectors = uint32(p.MaxZeroesBytes / sectorSize)
		a.MaxDiscardSegs = 1 // the driver takes one range in a request
	}
	b, err := binary.Append(nil, binary.NativeEndian, &a)
	if err != nil {
		panic(err) // paramsABI has fields of fixed size only
	}
	return b
}

// decodeParams is the reverse of encode, for what struct ublk_params holds.
func decodeParams(b []byte) (Params, error) {
	var a paramsABI
	if _, err := binary.Decode(b, binary.NativeEndian, &a); err != nil {
		return Params{}, fmt.Errorf("ublk: decode parameters: %w", err)
	}
	p := Params{
		SizeBytes:     a.DevSectors * sectorSize,
		LogicalBlock:  1 << (a.LogicalShift & 31),
		PhysicalBlock: 1 << (a.PhysicalShift & 31),
		IOMin:         1 << (a.IOMinShift & 31),
		IOOpt:         1 << (a.IOOptShift & 31),
		MaxIOBytes:    int(a.MaxSectors) * sectorSize,
		ReadOnly:      a.Attrs&attrReadOnly != 0,
		VolatileCache: a.Attrs&attrVolatileCache != 0,
		FUA:           a.Attrs&attrFUA != 0,
	}
	if a.Types&paramDiscard != 0 {
		p.MaxDiscardBytes = uint64(a.MaxDiscardSectors) * sectorSize
		p.MaxZeroesBytes = uint64(a.MaxZeroesSectors) * sectorSize
		p.DiscardGranule = int(a.DiscardGranule)
	}
	return p, nil
}
