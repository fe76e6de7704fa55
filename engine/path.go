package engine

import (
	"slices"
)

// rollback is where the image has gone back to an earlier state. It has a number, as data
// objects have, and no object: the state after it is the one after the object From, and
// the next data object goes on from there. Those between the two are not the image's any
// more; they may be those of points.
type rollback struct {
	Object uint64 `json:"object"` // its number
	From   uint64 `json:"from"`
	Seq    uint64 `json:"seq"` // the last record of all before it
}

// run64 is a run of numbers, from after the first to the last.
type run64 struct{ after, last uint64 }

// path is what a state is made of: runs of data objects, ascending, of which each but the
// first comes after a rollback. States and the paths to them are a tree.
type path []run64

// pathTo returns the path to the state after the object last, which may be a rollback;
// maxObjectSeq stands for the image's present state.
func (s *superblock) pathTo(last uint64) path {
	var p path
	for i := len(s.Rollbacks) - 1; i >= 0; i-- {
		if b := s.Rollbacks[i]; b.Object <= last {
			p = append(p, run64{b.Object, last})
			last = b.From
		}
	}
	p = append(p, run64{0, last})
	slices.Reverse(p)
	return p
}

// common returns the last number on both paths, 0 if there is none.
func (p path) common(q path) (n uint64) {
	for i := range min(len(p), len(q)) {
		if p[i].after != q[i].after {
			break
		}
		if n = min(p[i].last, q[i].last); p[i].last != q[i].last {
			break
		}
	}
	return n
}

// has reports whether a data object or a rollback of that number is on the path, or the
// number is 0, where all begin.
func (p path) has(n uint64) bool {
	return slices.ContainsFunc(p, func(r run64) bool { return r.after <= n && n <= r.last })
}

// after returns the runs of data objects of the path after number n, which is on it.
func (p path) after(n uint64) []run64 {
	var runs []run64
	for _, r := range p {
		if r.last > max(r.after, n) {
			runs = append(runs, run64{max(r.after, n), r.last})
		}
	}
	return runs
}

// validPaths reports whether the rollbacks are such as there can be, and each state's
// checkpoint is on the path to it.
func (s *superblock) validPaths() bool {
	for i, b := range s.Rollbacks {
		if b.Object > maxObjectSeq || b.From >= b.Object || i > 0 && (b.Object <= s.Rollbacks[i-1].Object || b.Seq < s.Rollbacks[i-1].Seq) {
			return false
		}
	}
	if s.Checkpoint != nil && !s.pathTo(maxObjectSeq).has(s.Checkpoint.Object) {
		return false
	}
	for p := range s.states() {
		if p.Settled && !s.pathTo(p.Object).has(p.base()) {
			return false
		}
	}
	for i := range s.Forgotten {
		if p := &s.Forgotten[i]; p.Object > maxObjectSeq || !s.validRef(p.Checkpoint) || !s.pathTo(p.Object).has(p.base()) {
			return false
		}
	}
	return true
}

// pruneRollbacks forgets rollbacks that nobody's path tells from a run without them: there
// is no state between where they went back to and themselves, and none that is replayed
// from before them. What was rolled back there in between goes with them.
func (s *superblock) pruneRollbacks() {
	for i := len(s.Rollbacks) - 1; i >= 0; i-- {
		b := s.Rollbacks[i]
		if s.needsRollback(b) {
			continue
		}
		s.Rollbacks = slices.DeleteFunc(s.Rollbacks, func(x rollback) bool { return x.Object > b.From && x.Object <= b.Object })
		i = min(i, len(s.Rollbacks))
	}
}

func (s *superblock) needsRollback(b rollback) bool {
	if slices.ContainsFunc(s.Rollbacks, func(c rollback) bool { return c.Object > b.Object && c.From > b.From && c.From < b.Object }) {
		return true // a path that passes what was rolled back
	}
	needs := func(p *point) bool {
		return p.Object > b.From && p.Object < b.Object || p.base() < b.Object && b.Object <= p.Object
	}
	if needs(&point{Object: maxObjectSeq, Checkpoint: s.Checkpoint}) {
		return true
	}
	for p := range s.states() {
		if p.Settled && needs(p) {
			return true
		}
	}
	return slices.ContainsFunc(s.Forgotten, func(p point) bool { return needs(&p) })
}
