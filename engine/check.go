package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/internal/frame"
	"github.com/lsd-ceph/lsd/internal/parallel"
)

const (
	checkParallel = 16        // reads from the store at one time
	checkMemory   = 256 << 20 // bytes of extents kept to compare the map with
	checkRead     = 1 << 20   // bytes of data read back at one time
	// checkTries bounds how often the state of an image that is attached is read
	// anew because its owner has changed it meanwhile.
	checkTries = 10
)

// CheckOptions says how an image is checked.
type CheckOptions struct {
	Deep   bool  // read back all data, too
	Rate   int64 // bounds what Deep reads, bytes a second; 0: no bound
	Repair bool  // mend what can be mended without losing anything
	// Parallel is how many reads are made at one time; 0 means a default. With 1
	// their order is certain.
	Parallel int
	// Progress is told how many bytes of how many have been read; may be nil. The
	// total may grow, and is what has been read in the end. It is called by one
	// goroutine at a time.
	Progress func(done, total uint64)

	memory int // of extents, in tests; 0 means checkMemory
}

// CheckReport is what a check has found.
type CheckReport struct {
	Image      string    `json:"image"`
	ID         uuid.UUID `json:"id"`
	AttachedBy string    `json:"attached_by,omitempty"`
	Epoch      uint64    `json:"epoch"`
	Deep       bool      `json:"deep"`
	Objects    int       `json:"data_objects"`
	Segments   int       `json:"map_segments"`
	Points     int       `json:"points"`
	Snapshots  int       `json:"snapshots"`
	Read       uint64    `json:"read_bytes"`
	Errors     []Finding `json:"errors"`
	// Dead and Stale name objects that nothing needs and the image knows of: they
	// are removed by its owner, or at the next attach. Pending are those that an
	// owner was putting when it died, or is putting now.
	Dead    []string `json:"dead"`
	Stale   []string `json:"stale"`
	Pending []string `json:"pending"`
	Notes   []string `json:"notes"`
	Repairs []Repair `json:"repairs"`
}

// Finding is something that is wrong.
type Finding struct {
	Object  string `json:"object"`  // its key in the store
	Problem string `json:"problem"` // what is wrong with it
	Action  string `json:"action"`  // what to do about it
	Mended  bool   `json:"mended"`

	vanished bool // what was not there may be due to the owner, who has gone on
}

// String returns one line.
func (f Finding) String() string {
	return strings.ReplaceAll(fmt.Sprintf("%s: %s: %s", f.Object, f.Problem, f.Action), "\n", " ")
}

// Repair is something that can be mended without losing anything.
type Repair struct {
	Object string `json:"object"`
	What   string `json:"what"`
	Done   bool   `json:"done"`
}

// Clean reports whether nothing is wrong, or everything that was has been mended.
func (r *CheckReport) Clean() bool {
	return !slices.ContainsFunc(r.Errors, func(f Finding) bool { return !f.Mended })
}

// The advice of findings.
const (
	fromCopy   = "bring it back from a copy of the pool; what it holds cannot be read"
	rmOrphan   = "lsdctl check --repair removes it"
	rmAgain    = "an lsdctl rm that was interrupted leaves this: repeat it; else bring it back from a copy of the pool"
	byHand     = "lsd has not made it: look at it and remove it by hand"
	mendCounts = "lsdctl check --repair corrects it"
	clearMeta  = "bring it back from a copy of the pool, or give it up: lsdctl meta rm STORE/IMAGE --all; the disk itself is not affected"
)

// Check checks the image of that name: everything that its superblock leads to,
// and that nothing else is there under its id. url names the image in messages.
// It changes nothing unless o.Repair is set, and then nothing of an image that is
// attached. If the name cannot be looked up, because the directory is damaged or has
// gone, that is all that the report says, and its ID is uuid.Nil. An error says that
// the check could not be made, or not to its end.
func Check(ctx context.Context, st backend.Store, name, url string, o CheckOptions) (*CheckReport, error) {
	id, err := backend.Lookup(ctx, patient{st, Real{}}, name)
	lost := damagedDirectory(err)
	if errors.Is(err, backend.ErrNotFound) {
		var e error
		if lost, e = LostDirectory(ctx, patient{st, Real{}}); e != nil {
			return nil, e
		}
	}
	switch {
	case lost:
		rep := newReport(url)
		rep.Errors = append(rep.Errors, lostDirectory(err))
		return rep, nil
	case err != nil:
		return nil, err
	}
	if removed, err := isRemoved(ctx, patient{st, Real{}}, id); removed || err != nil {
		return nil, removedError(removed, err)
	}
	return checkImage(ctx, st, id, url, o)
}

// newReport returns a report that says nothing yet.
func newReport(url string) *CheckReport {
	return &CheckReport{Image: url, Errors: []Finding{}, Dead: []string{}, Stale: []string{}, Pending: []string{}, Notes: []string{}, Repairs: []Repair{}}
}

// checkImage is Check without the directory.
func checkImage(ctx context.Context, st backend.Store, id uuid.UUID, url string, o CheckOptions) (*CheckReport, error) {
	o.Parallel = cmp.Or(o.Parallel, checkParallel)
	o.memory = cmp.Or(o.memory, checkMemory)
	if o.Progress == nil {
		o.Progress = func(uint64, uint64) {}
	}
	c := &checker{
		st: patient{st, Real{}}, id: id, url: url, o: o, pace: pace{rate: o.Rate},
		sound: map[uint32]bool{}, missing: map[string]bool{},
		rep: newReport(url),
	}
	c.rep.ID, c.rep.Deep = id, o.Deep
	defer c.close()
	if err := c.run(ctx); err != nil {
		return nil, err
	}
	slices.SortStableFunc(c.rep.Errors, func(a, b Finding) int { return strings.Compare(a.Object, b.Object) })
	return c.rep, nil
}

// checker checks one image.
type checker struct {
	st   backend.Store
	id   uuid.UUID
	url  string
	o    CheckOptions
	pace pace
	rep  *CheckReport
	im   *Image // for its readers; it owns nothing

	reach   *reach
	version backend.Version // of the superblock that reach follows from
	counts  []liveCount     // of the head's table that are wrong
	counted backend.Version // of the superblock that led to them
	missing map[string]bool // objects that were not there in an earlier try

	mu    sync.Mutex      // guards what follows, which workers add to
	found []Finding       // in this try
	sound map[uint32]bool // data objects whose data has been read back
	done  uint64          // bytes read
	total uint64          // bytes to read, about
}

// liveCount is a wrong entry of the table.
type liveCount struct {
	number uint32
	live   uint32 // what it should be
}

func (c *checker) add(f Finding) {
	f.Problem = withoutKey(f.Problem, f.Object)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.found = append(c.found, f)
}

// withoutKey returns an error's text without the key that it is about, which those who
// have made it have named, each for itself.
func withoutKey(text, key string) string {
	text = strings.ReplaceAll(text, " of object "+key+": ", ": ")
	for _, what := range []string{"superblock ", "metadata and locks ", "object ", "checkpoint ", "load ", "get ", "stat "} {
		text = strings.ReplaceAll(text, what+key+": ", "")
	}
	return text
}

// read notes that n bytes have been read.
func (c *checker) read(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.done += uint64(n)
	c.total = max(c.total, c.done)
	c.o.Progress(c.done, c.total)
}

// toRead notes that n bytes are going to be read.
func (c *checker) toRead(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.total += uint64(n)
	c.o.Progress(c.done, c.total)
}

// allRead notes that nothing more is going to be read: what is damaged or has gone was
// not.
func (c *checker) allRead() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.total != c.done {
		c.total = c.done
		c.o.Progress(c.done, c.total)
	}
}

// each calls fn for 0 to n-1, several at a time, and returns the first error, which
// ends the others.
func (c *checker) each(ctx context.Context, n int, fn func(context.Context, int) error) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	err := parallel.Each(c.o.Parallel, n, func(i int) error {
		err, ended := ctx.Err(), false
		defer func() {
			if err != nil || !ended {
				stop(err) // the first counts
			}
		}()
		if err == nil {
			err = fn(ctx, i)
		}
		ended = true
		return err
	})
	if err != nil {
		return context.Cause(ctx)
	}
	return nil
}

func (c *checker) run(ctx context.Context) error {
	for try := 1; ; try++ {
		ok, err := c.load(ctx)
		if err != nil || !ok {
			return err
		}
		c.found, c.counts, c.counted = nil, nil, c.version
		c.plan()
		for _, v := range c.reach.views {
			if err := c.checkView(ctx, v); err != nil {
				return err
			}
		}
		again, err := c.judge(ctx, try == checkTries)
		if err != nil {
			return err
		}
		if !again {
			break
		}
	}
	c.allRead()
	c.describe()
	if err := c.checkAttributes(ctx); err != nil {
		return err
	}
	if err := c.checkKeys(ctx); err != nil {
		return err
	}
	return c.repair(ctx)
}

// close ends what run has begun.
func (c *checker) close() {
	if c.im != nil {
		c.im.cancel()
	}
}

// load reads the superblock and what the image's states are made of. It reports
// false if there is nothing to go on from.
func (c *checker) load(ctx context.Context) (ok bool, err error) {
	for range checkTries {
		sb, version, err := loadSuperblock(ctx, c.st, c.id)
		switch {
		case errors.Is(err, backend.ErrNotFound):
			c.rep.Errors = append(c.rep.Errors, Finding{Object: SuperblockKey(c.id), Problem: "the superblock is missing, and the directory names the image", Action: rmAgain})
			return false, nil
		case errors.Is(err, frame.ErrVersion):
			return false, err
		case unreadableSuper(err):
			c.rep.Errors = append(c.rep.Errors, Finding{Object: SuperblockKey(c.id), Problem: withoutKey(err.Error(), SuperblockKey(c.id)), Action: "bring it back from a copy of the pool; the image cannot be attached"})
			return false, nil
		case err != nil:
			return false, err
		}
		c.close()
		c.im = newImage(ctx, c.st, sb, &OpenOptions{ReadOnly: true, Parallel: c.o.Parallel})
		c.version = version
		if c.reach, err = loadReach(ctx, c.im, sb); err != nil {
			return false, err
		}
		now, _, err := loadSuperblock(ctx, c.st, c.id)
		if err != nil && !unreadableSuper(err) {
			return false, err
		}
		if err == nil && sameStates(sb, now) {
			return true, nil
		}
	}
	return false, errors.New("the image changes faster than it can be looked at: try again when less is written to it")
}

// unreadableSuper reports whether an error says that the superblock is damaged.
func unreadableSuper(err error) bool {
	return err != nil && !errors.Is(err, backend.ErrNotFound) && !errors.Is(err, backend.ErrTemporary) &&
		!errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded)
}

// sameStates reports whether two superblocks lead to the same states.
func sameStates(a, b *superblock) bool {
	return a.Epoch == b.Epoch && a.span() == b.span() && sameRef(a.Checkpoint, b.Checkpoint) && len(a.Epochs) == len(b.Epochs) && len(a.Rollbacks) == len(b.Rollbacks) && len(a.Forgotten) == len(b.Forgotten) &&
		slices.EqualFunc(a.Points, b.Points, func(p, q cutOff) bool { return p.Log == q.Log && p.same(&q.point) }) &&
		slices.EqualFunc(a.Snapshots, b.Snapshots, sameSnapshot) && slices.EqualFunc(a.Clones, b.Clones, sameSnapshot)
}

func sameSnapshot(p, q snapshot) bool { return p.ID == q.ID && p.same(&q.point) }

func sameRef(a, b *checkpointRef) bool {
	return a == b || a != nil && b != nil && *a == *b
}

// loadReach reads what the states of an image are made of.
func loadReach(ctx context.Context, im *Image, sb *superblock) (*reach, error) {
	r := &reach{sb: sb, holds: sb.holds(), head: &view{ref: sb.Checkpoint, last: maxObjectSeq}}
	r.views = []*view{r.head}
	add := func(p *point, what string) {
		v := &view{point: p, ref: p.Checkpoint, last: p.Object, what: what}
		if !p.Settled {
			v.last = maxObjectSeq
		}
		if !slices.ContainsFunc(r.views, func(o *view) bool { return sameRef(o.ref, v.ref) && o.last == v.last }) {
			r.views = append(r.views, v)
		}
	}
	for i := range sb.Points {
		p := &sb.Points[i]
		add(&p.point, fmt.Sprintf("the state kept for log %s of %s", p.Log, p.Host))
	}
	for i := range sb.Snapshots {
		if p := &sb.Snapshots[i]; p.Settled {
			add(&p.point, "snapshot "+p.Name)
		}
	}
	for i := range sb.Clones {
		if p := &sb.Clones[i]; p.Settled {
			add(&p.point, "what "+p.Name+" was cloned from")
		}
	}
	for _, v := range r.views {
		if err := im.loadView(ctx, sb, v); err != nil {
			return nil, err
		}
	}
	return r, r.loadGone(ctx, im.store)
}

// judge decides about what was found in a try, and reports whether another one is
// needed. What is missing while the image's owner goes on may be what it has
// deleted since: only what was missing before a state was read, and is needed by
// that state, is missed.
func (c *checker) judge(ctx context.Context, last bool) (again bool, err error) {
	vanished := slices.ContainsFunc(c.found, func(f Finding) bool { return f.vanished })
	moved := false
	if vanished {
		_, version, err := loadSuperblock(ctx, c.st, c.id)
		if err != nil {
			return false, err
		}
		// An owner deletes what has died without a word in the superblock.
		moved = version != c.version || c.reach.sb.Owner != nil
	}
	var sure, unsure []Finding
	for _, f := range c.found {
		if f.vanished && moved && !c.missing[f.Object] {
			unsure = append(unsure, f)
		} else {
			sure = append(sure, f)
		}
	}
	if len(unsure) > 0 && !last {
		for _, f := range unsure {
			c.missing[f.Object] = true
		}
		return true, nil
	}
	if n := len(unsure); n > 0 {
		c.rep.Notes = append(c.rep.Notes, fmt.Sprintf("%d objects were gone each time they were looked at because the owner had moved on: they are not counted", n))
	}
	c.rep.Errors = append(c.rep.Errors, sure...)
	return false, nil
}

// describe tells what was looked at.
func (c *checker) describe() {
	r, sb := c.reach, c.reach.sb
	c.rep.Epoch, c.rep.Objects, c.rep.Segments = sb.Epoch, r.head.objects(), r.head.m.filled()
	c.rep.Points, c.rep.Snapshots, c.rep.Read = len(sb.Points), len(sb.Snapshots), c.done
	if sb.Owner != nil {
		c.rep.AttachedBy = sb.Owner.Host
		c.rep.Notes = append(c.rep.Notes, fmt.Sprintf("it is attached by %s: what that host changes meanwhile is not counted, and nothing is repaired", sb.Owner.Host))
	}
}

// checkAttributes reports metadata and locks that cannot be read.
func (c *checker) checkAttributes(ctx context.Context) error {
	_, _, err := loadAttributes(ctx, c.st, c.id)
	switch {
	case errors.Is(err, frame.ErrVersion):
		return err
	case damagedAttributes(err):
		key := attributesKey(c.id)
		f := Finding{Object: key, Problem: withoutKey(err.Error(), key), Action: clearMeta}
		c.rep.Errors = append(c.rep.Errors, f)
		return nil
	}
	return err
}

// checkKeys looks for objects that nothing needs.
func (c *checker) checkKeys(ctx context.Context) error {
	for _, v := range c.reach.views {
		if v.err != nil {
			c.rep.Notes = append(c.rep.Notes, "what is left over cannot be told from what is needed before the errors are gone")
			return nil
		}
	}
	keys := map[keyClass][]string{}
	err := c.st.List(ctx, c.id.String()+"/", func(key string) error {
		if class := c.reach.class(key); class != classNeeded {
			keys[class] = append(keys[class], key)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("list the objects of image %s: %w", c.id, err)
	}
	for _, list := range keys {
		slices.Sort(list)
	}
	c.rep.Dead = append(c.rep.Dead, keys[classDead]...)
	c.rep.Stale = append(c.rep.Stale, keys[classStale]...)
	c.rep.Pending = append(c.rep.Pending, keys[classPending]...)
	suspects := slices.Concat(keys[classGap], keys[classOrphan], keys[classForeign])
	if len(suspects) == 0 {
		return nil
	}
	return c.lookAgain(ctx, suspects)
}

// lookAgain reports objects that should not be there, if they still are once the
// image's present state is known.
func (c *checker) lookAgain(ctx context.Context, keys []string) error {
	now, died := c.reach.now, c.reach.died
	version := c.version
	if ok, err := c.load(ctx); err != nil || !ok {
		return err
	}
	if c.version == version && len(now) == c.reach.head.objects() {
		c.reach.now, c.reach.died = now, died
	} else {
		// Of the objects that the map refers to nothing is known now; they are in
		// the table in any case.
		c.reach.now, c.reach.died = make([]uint32, c.reach.head.objects()), make([]uint32, c.reach.head.objects())
	}
	for _, key := range keys {
		class := c.reach.class(key)
		if class != classGap && class != classOrphan && class != classForeign {
			continue
		}
		_, err := c.st.Stat(ctx, key)
		switch {
		case errors.Is(err, backend.ErrNotFound):
			continue
		case err != nil && !damaged(err):
			return err
		}
		c.reportKey(key, class)
	}
	return nil
}

func (c *checker) reportKey(key string, class keyClass) {
	f := Finding{Object: key, Problem: "orphan: nothing refers to it", Action: rmOrphan}
	switch class {
	case classGap:
		next := c.reach.head.end() + 1
		f.Problem = fmt.Sprintf("data object %d, which comes before it, is missing: the image ends at object %d", next, next-1)
		f.Action = fmt.Sprintf("bring %s back from a copy of the pool: what was written later is there, and is not read", dataKey(c.id, next, c.reach.sb.epochOf(next)))
	case classForeign:
		f.Problem, f.Action = "no object of an image has such a name", byHand
	default:
		c.rep.Repairs = append(c.rep.Repairs, Repair{Object: key, What: "remove the orphan"})
	}
	c.rep.Errors = append(c.rep.Errors, f)
}

// pace bounds the rate at which something is done. Any goroutine may use it.
type pace struct {
	rate int64 // a second; 0: no bound

	mu   sync.Mutex
	next time.Time // when more may be done; guarded by mu
}

// wait waits until n more may be done, or ctx ends.
func (p *pace) wait(ctx context.Context, n int) error {
	if p.rate <= 0 {
		return ctx.Err()
	}
	p.mu.Lock()
	now := time.Now()
	if p.next.Before(now) {
		p.next = now
	}
	at := p.next
	p.next = at.Add(time.Duration(float64(n) / float64(p.rate) * float64(time.Second)))
	p.mu.Unlock()
	t := time.NewTimer(at.Sub(now))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
