package writelog

// segmentBlocks is the number of blocks in a segment.
const segmentBlocks = SegmentSize / BlockSize

// blockSums are the checksums of the blocks of one segment of the log.
type blockSums [segmentBlocks]uint32

// sums holds the checksums of the blocks that hold live data, for the segments
// that have any: 8 KiB for each 8 MiB. The reactor changes it; another goroutine
// may read those of blocks that are held or not yet trimmed.
type sums struct {
	held  []*blockSums // by segment of the file; nil where nothing is live
	spare []*blockSums // kept, so that a log in use does not allocate
}

// of returns the checksums of a segment that is about to hold live data.
func (s *sums) of(segment int) *blockSums {
	b := s.held[segment]
	if b == nil {
		if k := len(s.spare); k > 0 {
			b, s.spare = s.spare[k-1], s.spare[:k-1]
		} else {
			b = new(blockSums)
		}
		s.held[segment] = b
	}
	return b
}

// drop says that nothing in a segment is live any more.
func (s *sums) drop(segment int) {
	if b := s.held[segment]; b != nil {
		s.held[segment] = nil
		s.spare = append(s.spare, b)
	}
}
