package engine

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/internal/frame"
)

const (
	superMagic   = "LSDSUPER"
	superVersion = 7
	// superTrash is a version that is read as well: its images have one block at least.
	superTrash = 6
	// superSpan is a version that is read as well: nothing is in the trash.
	superSpan = 5
	// superSnapshots is a version that is read as well: its images have kept their size, or
	// grown.
	superSnapshots = 4
	// superOld is a version that is read as well: it has no snapshots either.
	superOld = 3
	// superUnit is what the length of a superblock is a multiple of, in bytes.
	superUnit = 4096
	// maxEpochs is how many ends of ownerships a superblock remembers; they tell
	// whether a log that turns up holds anything that never reached the store.
	maxEpochs = 256
	// maxEpoch bounds the number of ownerships: maps keep epochs in 32 bits.
	maxEpoch  = 1<<32 - 1
	maxClient = 256 // bytes in the name of an owner's client
)

// superblock is an image's one mutable object; docs/formats.md describes it.
type superblock struct {
	Image      uuid.UUID      `json:"image"`
	Name       string         `json:"name"` // the directory has the one that counts
	Created    time.Time      `json:"created"`
	Sectors    uint64         `json:"sectors"`
	Span       uint64         `json:"span,omitempty"` // the largest size of any of its states, in sectors, if that is not Sectors
	BlockSize  uint32         `json:"block_size"`
	ObjectSize uint32         `json:"object_size"`
	Epoch      uint64         `json:"epoch"`
	Owner      *owner         `json:"owner,omitempty"`
	Evict      *eviction      `json:"evict,omitempty"`
	Epochs     []epochStart   `json:"epochs,omitempty"`
	Checkpoint *checkpointRef `json:"checkpoint,omitempty"`
	Seq        uint64         `json:"seq,omitempty"` // the last record in Checkpoint; 0: it is not known here
	Window     int            `json:"window"`        // objects that an owner may have put beyond an unbroken run

	// What a crash may have left behind, so that the next start removes it.
	Intent *checkpointRef  `json:"intent,omitempty"` // a checkpoint that is being written
	Prev   []checkpointRef `json:"prev,omitempty"`   // those that Checkpoint has replaced
	Stale  []staleObjects  `json:"stale,omitempty"`  // put by fenced owners

	// Partial says that what the image is a copy of has not been copied to its end: it
	// gets no name before.
	Partial bool `json:"partial,omitempty"`
	// Copy says how far a partial image is a copy of another one; nil if it is none.
	Copy *CopyState `json:"copy,omitempty"`

	// Trash says that the image is in the trash, or on its way: see trashed.
	Trash *trashed `json:"trash,omitempty"`
	// Points are where the image branched off from write logs that were cut off.
	Points []cutOff `json:"points,omitempty"`
	// Snapshots are in the order in which they were asked for.
	Snapshots []snapshot `json:"snapshots,omitempty"`
	// Clones are the states that clones of the image begin with.
	Clones []snapshot `json:"clones,omitempty"`
	// Parent is the image that it was cloned from, which keeps the state that it began with.
	Parent uuid.UUID `json:"parent,omitzero"`
	// Removed says that the image has been removed: what is left of it has not been reclaimed
	// yet, or clones of it need that. It never becomes false again.
	Removed bool `json:"removed,omitempty"`
	// Late is until when, by the clock of who removed the image, what its owners had begun may
	// still come into the store, of which nothing would tell without the superblock: that stays so
	// long. It is zero if there is nothing of that kind.
	Late time.Time `json:"late,omitzero"`
	// Origins are the ancestors whose objects the image is made of, up to where its own begin.
	Origins []origin `json:"origins,omitempty"`
	// Rollbacks are in ascending order.
	Rollbacks []rollback `json:"rollbacks,omitempty"`
	// RolledBack is the id of the last rollback, uuid.Nil if there was none.
	RolledBack uuid.UUID `json:"rolled_back,omitzero"`
	// Forgotten are states off the path to the present one that nobody needs any more: what
	// only they are made of is to be removed.
	Forgotten []point `json:"forgotten,omitempty"`
	// Lost is the latest epoch of the points that had to go because there were too many:
	// whose logs held what no store has.
	Lost uint64 `json:"lost,omitempty"`
	// Loose says that the last owner has given the image up while objects of its cleaner
	// were under way, or without a checkpoint because part of the map could not be read, or
	// before it knew where the ownership before it ended, or, where no point is kept for its
	// log, before the store had all of it: the next one finds that.
	Loose bool `json:"loose,omitempty"`
}

// staleObjects are what the owner of an epoch may have put, or may still put, that
// does not count: data objects beyond where its epoch ended, or a checkpoint that
// it did not publish.
type staleObjects struct {
	Epoch      uint64 `json:"epoch"`
	Object     uint64 `json:"object"`               // the first data object, of as many as Window; or that of the checkpoint
	Checkpoint bool   `json:"checkpoint,omitempty"` // which of the two
}

// ref names the checkpoint that was not published.
func (x *staleObjects) ref() checkpointRef { return checkpointRef{Object: x.Object, Epoch: x.Epoch} }

// owner says who may write the image.
type owner struct {
	Host    string        `json:"host"`
	Log     uuid.UUID     `json:"log"`              // its write log
	Lease   time.Duration `json:"lease"`            // how long a renewal is good for, in nanoseconds
	Renewal uint64        `json:"renewal"`          // counts renewals
	Since   time.Time     `json:"since"`            // by its own clock, for people
	Client  string        `json:"client,omitempty"` // of the store, to be fenced: see backend.Fencer
	// Volatile says that the log is in the memory of a process, which writes nothing that it
	// could not write anew. If its lease is over it has died, and nobody misses its log.
	Volatile bool   `json:"volatile,omitempty"`
	Reads    uint32 `json:"reads,omitempty"` // the latest version of superblocks that it reads; 0: superOld
}

// eviction asks the owner of an epoch to let go.
type eviction struct {
	Epoch uint64 `json:"epoch"`
	By    string `json:"by"`
}

// epochStart says where an ownership began, which is where the one before ended.
type epochStart struct {
	Epoch  uint64 `json:"epoch"`
	Object uint64 `json:"object"` // first object of this epoch
	Seq    uint64 `json:"seq"`    // first record that no earlier epoch's object holds
}

// checkpointRef names a checkpoint's manifest.
type checkpointRef struct {
	Object uint64 `json:"object"` // the checkpoint holds the map after this object
	Epoch  uint64 `json:"epoch"`  // that wrote it
}

// epochOf returns the epoch that wrote, or would have written, the object.
func (s *superblock) epochOf(object uint64) uint64 {
	for i := len(s.Epochs) - 1; i >= 0; i-- {
		if s.Epochs[i].Object <= object {
			return s.Epochs[i].Epoch
		}
	}
	return 0
}

// ended reports whether it is known where the ownership epoch ended.
func (s *superblock) ended(epoch uint64) bool {
	n := len(s.Epochs)
	return n > 0 && s.Epochs[n-1].Epoch > epoch
}

// encode returns the superblock's bytes, filled up with spaces: a store that is full takes
// the renewal of a lease only if that is no longer than what it replaces.
func (s *superblock) encode() []byte {
	p, err := json.Marshal(s)
	if err != nil {
		panic("engine: superblock does not marshal: " + err.Error())
	}
	const header = frame.HeaderSize
	room := (header + len(p) + superUnit - 1) / superUnit * superUnit
	p = append(p, bytes.Repeat([]byte{' '}, room-header-len(p))...)
	return frame.Encode(superMagic, s.version(), p)
}

// version returns the least version that has all that there is to say: an owner of an earlier
// lsd goes on where nothing new is used.
func (s *superblock) version() uint32 {
	if s.Sectors == 0 {
		return superVersion
	}
	if s.Trash != nil {
		return superTrash
	}
	if s.Span > 0 {
		return superSpan
	}
	if len(s.Snapshots)+len(s.Clones)+len(s.Origins)+len(s.Rollbacks)+len(s.Forgotten) > 0 || s.Parent != uuid.Nil || s.RolledBack != uuid.Nil || s.Removed {
		return superSnapshots
	}
	return superOld
}

// span returns the largest size of any of the image's states, in sectors: what is beyond is
// referred to by nothing of the image, nor of what it was cloned from.
func (s *superblock) span() uint64 { return max(s.Span, s.Sectors) }

// setSectors changes the image's size.
func (s *superblock) setSectors(n uint64) {
	for i := range s.Points {
		if p := &s.Points[i]; p.Sectors == 0 {
			p.Sectors = s.Sectors // as far as is known
		}
	}
	span := max(s.span(), n)
	if s.Sectors, s.Span = n, span; span == n {
		s.Span = 0
	}
}

// decodeSuperblock decodes and checks the superblock of the image id.
func decodeSuperblock(b []byte, id uuid.UUID) (*superblock, error) {
	p, err := frame.Decode(superMagic, b, superVersion, superTrash, superSpan, superSnapshots, superOld)
	if err != nil {
		return nil, err
	}
	s := new(superblock)
	if err := json.Unmarshal(p, s); err != nil {
		return nil, fmt.Errorf("%w: %v", frame.ErrCorrupt, err)
	}
	bad := func(what string) (*superblock, error) {
		return nil, fmt.Errorf("%w: %s is out of range", frame.ErrCorrupt, what)
	}
	switch {
	case s.Image != id:
		return nil, fmt.Errorf("%w: it is that of image %s", frame.ErrCorrupt, s.Image)
	case s.BlockSize != 512 && s.BlockSize != 4096:
		return bad("block_size")
	case s.Sectors == 0 && (s.Span == 0 || len(s.Snapshots)+len(s.Clones) > 0):
		return bad("sectors")
	case s.Sectors > MaxSize/SectorSize || s.Sectors%uint64(s.BlockSize/SectorSize) != 0:
		return bad("sectors")
	case s.Span > 0 && (s.Span <= s.Sectors || s.Span > MaxSize/SectorSize):
		return bad("span")
	case s.ObjectSize < MinObjectSize || s.ObjectSize > MaxObjectSize:
		return bad("object_size")
	case s.Window < 1 || s.Window > maxWindow:
		return bad("window")
	case s.Epoch > maxEpoch:
		return bad("epoch")
	case s.Copy != nil && !s.Copy.valid():
		return bad("copy")
	case s.Trash != nil && (s.Trash.ID == uuid.Nil || s.Trash.Epoch > s.Epoch):
		return bad("trash")
	case s.Owner != nil && (s.Owner.Lease < MinLease || s.Owner.Lease > MaxLease):
		return bad("lease")
	case s.Owner != nil && len(s.Owner.Client) > maxClient:
		return bad("client")
	}
	for i, e := range s.Epochs {
		if e.Epoch > s.Epoch || e.Object == 0 || e.Object > maxObjectSeq || e.Seq == 0 ||
			i > 0 && (e.Epoch <= s.Epochs[i-1].Epoch || e.Object < s.Epochs[i-1].Object || e.Seq < s.Epochs[i-1].Seq) {
			return bad("epochs")
		}
	}
	for _, c := range []*checkpointRef{s.Checkpoint, s.Intent} {
		if !s.validRef(c) {
			return bad("checkpoint")
		}
	}
	for _, c := range s.Prev {
		if !s.validRef(&c) {
			return bad("prev")
		}
	}
	for _, x := range s.Stale {
		if x.Object == 0 || x.Object > maxObjectSeq || x.Epoch > s.Epoch {
			return bad("stale")
		}
	}
	for p := range s.states() {
		if p.Object > maxObjectSeq || !s.validRef(p.Checkpoint) || p.Settled && p.base() > p.Object {
			return bad("points")
		}
	}
	for i := range s.Points {
		if s.Points[i].Sectors > MaxSize/SectorSize {
			return bad("points")
		}
	}
	switch {
	case !s.validSnapshots():
		return bad("snapshots")
	case !s.validOrigins():
		return bad("origins")
	case !s.validPaths():
		return bad("rollbacks")
	}
	return s, nil
}

func (s *superblock) validRef(c *checkpointRef) bool {
	return c == nil || c.Object > 0 && c.Object <= maxObjectSeq && c.Epoch <= s.Epoch
}

// clone returns a copy that shares nothing that changes.
func (s *superblock) clone() *superblock {
	c := *s
	if s.Owner != nil {
		o := *s.Owner
		c.Owner = &o
	}
	c.Epochs = slices.Clone(s.Epochs)
	c.Prev = slices.Clone(s.Prev)
	c.Stale = slices.Clone(s.Stale)
	c.Points = slices.Clone(s.Points)
	c.Snapshots = slices.Clone(s.Snapshots)
	c.Clones = slices.Clone(s.Clones)
	c.Origins = slices.Clone(s.Origins)
	c.Rollbacks = slices.Clone(s.Rollbacks)
	c.Forgotten = slices.Clone(s.Forgotten)
	return &c
}

// dropIntent notes that the checkpoint that has been begun, if one has, is not going to
// be published.
func (s *superblock) dropIntent() {
	if c := s.Intent; c != nil {
		s.Stale = append(s.Stale, staleObjects{Epoch: c.Epoch, Object: c.Object, Checkpoint: true})
		s.Intent = nil
	}
}

// pruneEpochs forgets where old ownerships ended, as far as neither the objects
// after a checkpoint that is still needed nor the bound on their number need it.
func (s *superblock) pruneEpochs() {
	if s.Checkpoint == nil {
		return
	}
	needed := s.Checkpoint.Object
	for i := range s.Points {
		needed = min(needed, s.Points[i].base())
	}
	for p := range s.named() {
		if p.Settled {
			needed = min(needed, p.base())
		}
	}
	for i := range s.Forgotten {
		needed = min(needed, s.Forgotten[i].base())
	}
	for len(s.Epochs) > maxEpochs && s.Epochs[1].Object <= needed+1 {
		s.Epochs = s.Epochs[1:]
	}
}

// changeInsistently is changeSuperblock, and repeats a change of which the outcome is not
// known a few times. What it does must be right also where an earlier attempt has done it.
func changeInsistently(ctx context.Context, st backend.Store, id uuid.UUID, change func(*superblock) error) error {
	p := patiently(st)
	return p.try(ctx, func() error {
		_, _, err := changeSuperblock(ctx, p, id, change)
		return err
	})
}

// loadSuperblock reads the superblock of an image.
func loadSuperblock(ctx context.Context, st backend.Store, id uuid.UUID) (*superblock, backend.Version, error) {
	b, v, err := st.Load(ctx, SuperblockKey(id))
	if err != nil {
		return nil, "", fmt.Errorf("superblock: %w", err)
	}
	s, err := decodeSuperblock(b, id)
	if err != nil {
		return nil, "", fmt.Errorf("superblock %s: %w", SuperblockKey(id), err)
	}
	return s, v, nil
}

// changeSuperblock applies change to the image's superblock until it is not
// disturbed by others, and returns the result. An error of change ends it; errNothing
// says that there is nothing to change, and is no error.
func changeSuperblock(ctx context.Context, st backend.Store, id uuid.UUID, change func(*superblock) error) (*superblock, backend.Version, error) {
	for {
		s, v, err := loadSuperblock(ctx, st, id)
		if err != nil {
			return nil, "", err
		}
		switch err := change(s); {
		case errors.Is(err, errNothing):
			return s, v, nil
		case err != nil:
			return nil, "", err
		}
		if o := s.Owner; o != nil && s.version() > max(o.Reads, superOld) {
			return nil, "", fmt.Errorf("%s, which has the image attached, runs an earlier lsd, which could not go on with that: restart its daemon with this version first", o.Host)
		}
		b := s.encode()
		if _, err := decodeSuperblock(b, id); err != nil {
			return nil, "", fmt.Errorf("change superblock of image %s: nobody could read it any more: %w", id, err)
		}
		v, err = st.Swap(ctx, SuperblockKey(id), v, b)
		switch {
		case err == nil:
			return s, v, nil
		case !errors.Is(err, backend.ErrConflict):
			return nil, "", fmt.Errorf("change superblock of image %s: %w", id, err)
		}
	}
}
