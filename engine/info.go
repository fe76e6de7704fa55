package engine

import (
	"context"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
)

// Info is what a store says of an image.
type Info struct {
	Name       string    `json:"name"`
	ID         uuid.UUID `json:"id"`
	Size       uint64    `json:"size_bytes"`
	BlockSize  uint32    `json:"block_size"`
	ObjectSize uint32    `json:"object_size"`
	Created    time.Time `json:"created"`
	Epoch      uint64    `json:"epoch"`
	Owner      *Holder   `json:"owner,omitempty"`
	Evicting   string    `json:"evict_asked_by,omitempty"`
	Checkpoint uint64    `json:"checkpoint_object,omitempty"`
	CutOff     []Branch  `json:"cut_off,omitempty"`
	// Removed says that there is no such image any more: whoever removed it was interrupted
	// before the name was gone.
	Removed bool      `json:"removed,omitempty"`
	Parent  uuid.UUID `json:"parent,omitzero"` // the image that it was cloned from
	// Clones are those of the image: their ids, and the names that they were made under.
	Clones []Snapshot `json:"clones,omitempty"`
	// Snapshots are in the order in which they were asked for.
	Snapshots []Snapshot `json:"snapshots,omitempty"`
}

// Branch is a state of an image that is kept for a write log that was cut off by a
// forced take-over, and may hold more.
type Branch struct {
	Log   uuid.UUID `json:"log_id"`
	Host  string    `json:"host"`
	Since time.Time `json:"since"` // of that host's ownership
	Epoch uint64    `json:"epoch"`
}

// Holder is the owner of an image.
type Holder struct {
	Host    string        `json:"host"`
	Log     uuid.UUID     `json:"log_id"`
	Since   time.Time     `json:"since"`
	Lease   time.Duration `json:"lease_ns"`
	Renewal uint64        `json:"renewals"`
	// Command says that it is a command that runs there, not a daemon: see OwnedError.
	Command bool `json:"command,omitempty"`
}

// Describe returns what the store says of the image of that name.
func Describe(ctx context.Context, st backend.Store, name string) (Info, error) {
	id, err := backend.Lookup(ctx, st, name)
	if err != nil {
		return Info{}, err
	}
	info, err := DescribeID(ctx, st, id)
	if err == nil {
		info.Name = name
	}
	return info, err
}

// DescribeID returns what the store says of the image id, with the name that its superblock
// has.
func DescribeID(ctx context.Context, st backend.Store, id uuid.UUID) (Info, error) {
	sb, _, err := loadSuperblock(ctx, st, id)
	if err != nil {
		return Info{}, err
	}
	info := Info{
		Name: sb.Name, ID: id, Size: sb.Sectors * SectorSize, BlockSize: sb.BlockSize, ObjectSize: sb.ObjectSize,
		Created: sb.Created, Epoch: sb.Epoch, Removed: sb.Removed,
	}
	info.Owner = sb.holder()
	if sb.Evict != nil {
		info.Evicting = sb.Evict.By
	}
	if sb.Checkpoint != nil {
		info.Checkpoint = sb.Checkpoint.Object
	}
	for _, p := range sb.Points {
		info.CutOff = append(info.CutOff, Branch{Log: p.Log, Host: p.Host, Since: p.Since, Epoch: p.Epoch})
	}
	info.Parent, info.Clones, info.Snapshots = sb.Parent, describeAll(sb.Clones), describeAll(sb.Snapshots)
	return info, nil
}

// OwnerOf returns the owner of the image id, nil if it has none.
func OwnerOf(ctx context.Context, st backend.Store, id uuid.UUID) (*Holder, error) {
	sb, _, err := loadSuperblock(ctx, st, id)
	if err != nil {
		return nil, err
	}
	return sb.holder(), nil
}

func (s *superblock) holder() *Holder {
	if s.Owner == nil {
		return nil
	}
	return &Holder{Host: s.Owner.Host, Log: s.Owner.Log, Since: s.Owner.Since, Lease: s.Owner.Lease, Renewal: s.Owner.Renewal, Command: s.Owner.Volatile}
}
