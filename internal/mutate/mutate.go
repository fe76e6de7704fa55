// Package mutate plants bugs, one at a time, to show that the tests find them.
//
// Without the build tag "mutate" nothing is planted, and the compiler drops every
// place where a bug could be. With it, the environment variable LSD_MUTATION names
// the bug. A place looks like this:
//
//	if r.FUA && !mutate.On(mutate.FUAPlain) {
package mutate

// A Bug is one that can be planted.
type Bug string

// The bugs.
const (
	// FlushEarly completes flushes before the data is on stable media.
	FlushEarly Bug = "flush-early"
	// FUAPlain treats FUA writes as plain ones.
	FUAPlain Bug = "fua-plain"
	// AckOutOfOrder acknowledges a record although one before it is in flight.
	AckOutOfOrder Bug = "ack-out-of-order"
	// SyncCoversInFlight takes for durable what was in flight when a sync began.
	SyncCoversInFlight Bug = "sync-covers-in-flight"
	// AcceptOutOfOrder accepts a data object as destaged because the one after it is.
	AcceptOutOfOrder Bug = "accept-out-of-order"
	// PutForgotten takes a put that failed for one that went through.
	PutForgotten Bug = "put-forgotten"
	// ObjectUnverified serves data from objects without a look at its checksums.
	ObjectUnverified Bug = "object-unverified"
	// HeaderUnverified believes the header of a data object as it is.
	HeaderUnverified Bug = "header-unverified"
	// LogReadUnverified serves and destages data from the log on the SSD without a
	// look at its checksums.
	LogReadUnverified Bug = "log-read-unverified"
	// TornRecord accepts a record of the log in recovery whose data is torn.
	TornRecord Bug = "torn-record"
	// ProofIgnored opens a log although it proves that flushed data is gone.
	ProofIgnored Bug = "proof-ignored"
	// RecoveryStopsEarly leaves the newest records of the log out.
	RecoveryStopsEarly Bug = "recovery-stops-early"
	// CutOffKept takes records for whole ones of the log that a recovery has cut off.
	CutOffKept Bug = "cut-off-kept"
	// LogOverwritten lets a full log overwrite what is not in the store.
	LogOverwritten Bug = "log-overwritten"
	// MemoryReused gives memory of the log that others read or write to newer records.
	MemoryReused Bug = "memory-reused"
	// TrimEarly frees log space when an object is sealed, not when it is accepted.
	TrimEarly Bug = "trim-early"
	// DirtyDropped drops what is newer than the batch that was accepted.
	DirtyDropped Bug = "dirty-dropped"
	// DiscardUnrecorded forgets discards in the map.
	DiscardUnrecorded Bug = "discard-unrecorded"
	// DiscardUndestaged forgets discards when objects are accepted.
	DiscardUndestaged Bug = "discard-undestaged"
	// LeaseIgnored acknowledges without a valid lease.
	LeaseIgnored Bug = "lease-ignored"
	// LeaseStretched lets answers through that come too late for the lease.
	LeaseStretched Bug = "lease-stretched"
	// LateForgotten forgets an answer that came too late.
	LateForgotten Bug = "late-forgotten"
	// LeaseNotAwaited takes an image over without waiting for the owner's lease.
	LeaseNotAwaited Bug = "lease-not-awaited"
	// EpochIgnored goes on as owner although the superblock names another epoch.
	EpochIgnored Bug = "epoch-ignored"
	// EpochUnrecorded does not record where an epoch begins.
	EpochUnrecorded Bug = "epoch-unrecorded"
	// StaleLogDropped throws away a log that holds what no store has.
	StaleLogDropped Bug = "stale-log-dropped"
	// DeletedEarly deletes dead data objects that recovery still needs.
	DeletedEarly Bug = "deleted-early"
	// CheckpointMixed writes a checkpoint that holds changes made after it began.
	CheckpointMixed Bug = "checkpoint-mixed"
	// LateCopied takes a segment into a checkpoint as it is when its turn comes, although it
	// has changed since the checkpoint began.
	LateCopied Bug = "late-copied"
	// ChangesLost forgets what has changed in a segment since a checkpoint began, once that
	// has stored it.
	ChangesLost Bug = "changes-lost"
	// DeltaForgotten writes what has changed in a segment since the checkpoint before, and
	// not since the segment was written whole.
	DeltaForgotten Bug = "delta-forgotten"
	// DeltaKept reads what had changed in a segment before it was written whole again.
	DeltaKept Bug = "delta-kept"
	// HalfCounted counts an object of a group without the rest of it.
	HalfCounted Bug = "half-counted"
	// DeadKept leaves dead data objects in the store.
	DeadKept Bug = "dead-kept"
	// SnapshotUnheld deletes dead objects without a look at snapshots.
	SnapshotUnheld Bug = "snapshot-unheld"
	// SnapshotEarly takes a snapshot without what is in the log alone.
	SnapshotEarly Bug = "snapshot-early"
	// ShrinkKept leaves what is beyond the new end of an image where it is.
	ShrinkKept Bug = "shrink-kept"
	// ShrinkEarly says that an image is smaller before what goes is gone from the store.
	ShrinkEarly Bug = "shrink-early"
	// FlattenEarly separates an image from its ancestors whatever it needs of them.
	FlattenEarly Bug = "flatten-early"
	// StatesKept forgets states and not what only they were made of.
	StatesKept Bug = "states-kept"
	// StatesTorn removes with a state what points need of it.
	StatesTorn Bug = "states-torn"
	// ReclaimTorn removes of a removed image what clones need.
	ReclaimTorn Bug = "reclaim-torn"
	// ReclaimKept leaves of a removed image what no clone needs.
	ReclaimKept Bug = "reclaim-kept"
	// ReclaimEarly removes the superblock of an image before the last object of its owner can have
	// come.
	ReclaimEarly Bug = "reclaim-early"
	// MovedOverNewer lets the cleaner put back what has been overwritten meanwhile.
	MovedOverNewer Bug = "moved-over-newer"
	// CacheUnverified serves data from the read cache without a look at its checksums.
	CacheUnverified Bug = "cache-unverified"
	// CacheImageIgnored takes objects of different images for one in the read cache.
	CacheImageIgnored Bug = "cache-image-ignored"
	// CacheFailedKept keeps in the read cache what was fetched wrong.
	CacheFailedKept Bug = "cache-failed-kept"
)

// All are the bugs that can be planted.
func All() []Bug {
	return []Bug{
		FlushEarly, FUAPlain, AckOutOfOrder, SyncCoversInFlight, AcceptOutOfOrder, PutForgotten,
		ObjectUnverified, HeaderUnverified, LogReadUnverified, TornRecord, ProofIgnored, RecoveryStopsEarly,
		CutOffKept, LogOverwritten, MemoryReused, TrimEarly, DirtyDropped, DiscardUnrecorded, DiscardUndestaged,
		LeaseIgnored, LeaseStretched, LateForgotten, LeaseNotAwaited, EpochIgnored, EpochUnrecorded, StaleLogDropped, DeletedEarly, CheckpointMixed, LateCopied, ChangesLost, DeltaForgotten, DeltaKept,
		HalfCounted, DeadKept, SnapshotUnheld, SnapshotEarly, ShrinkKept, ShrinkEarly, FlattenEarly, StatesKept, StatesTorn, ReclaimTorn, ReclaimKept, ReclaimEarly, MovedOverNewer, CacheUnverified, CacheImageIgnored, CacheFailedKept,
	}
}
