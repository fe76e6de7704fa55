package engine

import (
	"fmt"
	"strings"

	"github.com/lsd-ceph/lsd/cache/readcache"
)

// simCounts say how often something happened in many worlds.
type simCounts [simCountKinds]uint64

const (
	countRequests = iota
	countKills
	countPowerCuts
	countAttachDeaths // processes that died, or whose host did, while they attached
	countLostSSDs
	countDetaches
	countOutages   // of the store, which answers nothing
	countFulls     // of the store, which takes no objects
	countRefusals  // of the store, which refuses some keys
	countLate      // operations that took effect after they were given up
	countCorrupt   // damaged answers of the store
	countFlips     // flipped bits in what was read of the SSD
	countDamages   // of the log, at rest
	countObjects   // damaged, at rest
	countSSDErrors // SSDs that fail for good
	countFullLogs
	countSeconds   // attaches beside the owner
	countTakeovers // of an owner that goes on
	countStopped   // of one that is stopped
	countSalvages
	countQuiet      // crashes when everything was in the store
	countRests      // images that came to rest
	countJoined     // objects in the store in the end that are joined to the next
	countStuck      // objects of the store that fail while all else works
	countStuckReads // reads beside such
	countStuckDetaches
	countLeftOut         // detaches without a checkpoint
	countLeaves          // detaches amid faults
	countLeavesEvicted   // of an owner that is to let go
	countUsedDamages     // damaged objects under clients that go on
	countHangs           // operations of the store that were given up after the timeout
	countContests        // of hosts that take the image at once
	countTaken           // attaches in a contest
	countOwnLog          // of these by the owner's own host, with its log
	countReadOnly        // images beside the owner's
	countReadOnlyCells   // that could be read
	countNeighbours      // images beside the owner's in its process
	countNeighboursAlone // that went on while the store of the owner's image was away
	countSnapshots       // that were asked for
	countSnapshotsMade   // of these, at once
	countNudges          // of owners, to make them
	countSnapshotsGone   // that were removed
	countRollbacks       // that were tried
	countRolledBack      // of these, that came to be
	countClones          // of the image that were tried
	countClonesMade      // of any image
	countClonesOfClones  // of these
	countClonesUsed      // attaches of them
	countClonesGone      // that were removed
	countReclaims        // of what was removed, that came to their end
	countFlattens        // clones that were to be flattened
	countFlattened       // of these, that were
	countSeparated       // that were separated from their ancestors
	countForgotten       // times that states were left to be forgotten in the end
	countShrinks         // times that the image was to become smaller
	countShrunk          // of these, that came to be
	countGrown           // of these, that it became larger under its owner
	countForced          // images that were removed under their owners
	countForcedLate      // of these, that their owners put objects of after the first reclamation
	countRemnants        // of these, that objects were there of in the end, and no superblock
	countLent            // segments that logs were lent
	countReturned        // of these, that came back before the end of the process

	cacheHits    // bytes
	cacheMisses  // bytes
	cacheFound   // bytes that processes found on the disk
	cacheEvicted // bytes
	cacheMoved   // bytes
	cacheWarmed  // bytes of segments that were taken into memory
	cacheReads   // of blocks of the disk
	cacheFlips   // of these, with a flipped bit
	cacheMismatches
	cacheErrors
	cacheOff // caches that were given up
	simCountKinds
)

func (n *simCounts) names() [simCountKinds]string {
	return [simCountKinds]string{
		"requests", "kills", "power cuts", "deaths in an attach", "SSDs lost", "clean detaches",
		"store outages", "stores full", "stores that refuse keys", "operations that took effect late", "damaged answers of stores",
		"flipped bits read from SSDs", "logs damaged at rest", "objects damaged at rest", "SSDs that failed", "full logs",
		"second attaches", "takeovers of owners that went on", "takeovers of stopped owners", "logs salvaged",
		"crashes with all in the store", "images at rest",
		"objects joined to the next", "times some objects were stuck", "reads beside these", "detaches beside these", "detaches without a checkpoint", "detaches amid faults", "detaches of evicted owners",
		"objects damaged in use", "operations given up", "contests for the image", "attaches in these", "attaches by the owner's own host",
		"read-only images beside the owner", "cells of these that were read", "images beside the owner's in its process", "that went on while its store was away",
		"snapshots asked for", "snapshots made at once", "owners nudged", "snapshots removed", "rollbacks tried", "images rolled back", "clones tried", "clones made", "clones of clones", "attaches of clones", "clones removed", "removals reclaimed", "clones to be flattened", "flattened", "separated from their ancestors", "states left to be forgotten",
		"images to be made smaller", "made smaller", "made larger under their owners",
		"images removed under their owners", "that objects came for later", "that had objects and no superblock",
		"segments lent to logs", "segments returned",
		"bytes of read caches' hits", "bytes of their misses", "bytes found at a start", "bytes evicted", "bytes moved", "bytes that were taken into memory",
		"reads of their disks", "flipped bits in these", "mismatches", "errors", "read caches given up",
	}
}

// add adds what others have done.
func (n *simCounts) add(o *simCounts) {
	for i := range n {
		n[i] += o[i]
	}
}

// addStats adds what the read cache of one process has done.
func (n *simCounts) addStats(s *readcache.Stats) {
	n.add(&simCounts{
		cacheHits: s.HitBytes, cacheMisses: s.MissBytes, cacheEvicted: s.Evicted, cacheMoved: s.Moved, cacheWarmed: s.Warmed, cacheMismatches: s.Mismatches, cacheErrors: s.Errors,
	})
}

func (n *simCounts) String() string {
	var b strings.Builder
	for i, name := range n.names() {
		fmt.Fprintf(&b, ", %d %s", n[i], name)
	}
	return b.String()[2:]
}

// idle returns what did not happen, or hardly, "" if everything did.
func (n *simCounts) idle() string {
	if 10*n[cacheHits] < n[cacheHits]+n[cacheMisses] {
		return "hits of read caches to speak of"
	}
	for i, name := range n.names() {
		if n[i] == 0 {
			return name
		}
	}
	return ""
}
