package readcache

import (
	"container/list"
	"context"
	"errors"
	"math/bits"
	"sync"
	"sync/atomic"

	"github.com/lsd-ceph/lsd/internal/mutate"
)

// A Source reads an object from its store.
type Source interface {
	// Fetch reads the object's data from block first on into p, and verifies it.
	Fetch(ctx context.Context, first uint32, p []byte) error
}

// maxRefused is how many requests for memory are refused before what was read
// ahead the longest time ago, and not asked for since, is let go of: its reader
// has gone elsewhere.
const maxRefused = 16

// A flight is one fetch of blocks of an object: those who want them meanwhile
// wait for it. What was read ahead stays until it has been asked for.
type flight struct {
	object   Object
	first, n uint32
	ahead    bool
	pieces   bool          // as Want has it
	asked    uint32        // as Want has it
	cached   Run           // where the SSD has it, if that is why it is read ahead
	done     chan struct{} // closed when it has ended
	buf      []byte        // valid after done, as err is
	err      error

	// Guarded by flights.mu.
	begun  bool // somebody flies it
	by     any  // Want.By, until that one's Fly has returned
	refs   int
	unread int           // blocks read ahead that will be asked for, and have not been
	kept   *list.Element // in flights.kept
}

// flights are the fetches under way, and what was read ahead.
//
// A fetch begins and ends within one call of a worker, and nobody waits for one
// that has not begun: so those who run one worker at a time, as a simulation
// does, come to an end.
type flights struct {
	budget int // bytes for what is read ahead
	pool   [bufferClasses]sync.Pool
	held   atomic.Int64 // bytes read ahead, or being read; changed under mu

	mu      sync.Mutex
	refused int                  // guarded by mu, as all that follows: claims in a row that had no room
	of      map[Object][]*flight // by what they fetch
	kept    *list.List           // what was read ahead, oldest first
}

// bufferClasses: 4 KiB, 8 KiB, up to 2 MiB.
const bufferClasses = 10

func (fs *flights) init(budget int) {
	fs.budget = budget
	fs.of = map[Object][]*flight{}
	fs.kept = list.New()
}

func bufferClass(n int) int { return bits.Len(uint((n+BlockSize-1)/BlockSize - 1)) }

func (fs *flights) buffer(n int) []byte {
	class := bufferClass(n)
	if class >= bufferClasses {
		return make([]byte, n)
	}
	if p, ok := fs.pool[class].Get().(*[]byte); ok {
		return (*p)[:n]
	}
	return make([]byte, n, BlockSize<<class)
}

func (fs *flights) freeBuffer(b []byte) {
	if class := bufferClass(cap(b)); class < bufferClasses && cap(b) == BlockSize<<class {
		fs.pool[class].Put(&b)
	}
}

// join returns the flight that has block first of an object, or a new one for the
// blocks from first on, at most n. mine says that the caller is to fly it: a new
// one, or one that was claimed and not begun yet. It is to be left afterwards.
func (fs *flights) join(o *Object, first, n uint32) (f *flight, mine bool) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	f, n = fs.find(o, first, n)
	if f == nil {
		f = fs.add(&flight{object: *o, first: first, n: n})
	} else {
		f.refs++
	}
	mine = !f.begun
	f.begun = true
	return f, mine
}

// landed returns what was read ahead and has block first of an object, to be left
// afterwards, or nil; known says that there is a flight that has it, or will, and by is
// that flight's. It takes no lock while nothing is read ahead.
func (fs *flights) landed(o *Object, first uint32) (f *flight, known bool, by any) {
	if fs.held.Load() == 0 {
		return nil, false, nil
	}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	f, _ = fs.find(o, first, 1)
	if f == nil {
		return nil, false, nil
	}
	if f.kept == nil {
		return nil, true, f.by
	}
	f.refs++
	return f, true, nil
}

// begin reports whether the one who has claimed a flight is to fly it.
func (fs *flights) begin(f *flight) bool {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	mine := !f.begun
	f.begun = true
	return mine
}

// find returns the flight that has block first, or how many blocks from there on,
// at most n, have none. The caller holds mu.
func (fs *flights) find(o *Object, first, n uint32) (*flight, uint32) {
	for _, f := range fs.of[*o] {
		if f.first <= first && first < f.first+f.n {
			return f, min(f.first+f.n-first, n)
		}
		if first < f.first && f.first < first+n {
			n = f.first - first
		}
	}
	return nil, n
}

// add makes a new flight known, and returns it. The caller holds mu.
func (fs *flights) add(f *flight) *flight {
	f.refs, f.done = 1, make(chan struct{})
	fs.of[f.object] = append(fs.of[f.object], f)
	return f
}

// claim is join for reading ahead: it returns a new flight, or none if block w.First
// has one already, and for how many blocks that goes; 0 if there is no memory.
func (fs *flights) claim(o *Object, w Want, cached Run) (*flight, uint32) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	f, n := fs.find(o, w.First, w.N)
	if f != nil {
		return nil, n
	}
	if int(fs.held.Load())+int(n)*BlockSize > fs.budget {
		if fs.refused++; fs.refused >= maxRefused && fs.kept.Len() > 0 {
			fs.refused = 0
			fs.forget(fs.kept.Front().Value.(*flight))
		}
		return nil, 0
	}
	fs.refused = 0
	fs.held.Add(int64(n) * BlockSize)
	f = &flight{object: *o, first: w.First, n: n, ahead: true, pieces: w.Pieces, asked: min(w.Asked, n), by: w.By}
	if cached.Cached {
		f.cached = cached
		f.cached.N = n
	}
	return fs.add(f), n
}

// land ends a flight. found says that what it fetched is in the cache now: it need not stay
// here as well, unless it would be read from there piece by piece.
func (fs *flights) land(f *flight, err error, found bool) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	f.err = err
	close(f.done)
	if f.ahead && err == nil && (!found || f.pieces) {
		f.refs++
		f.unread = int(f.asked)
		f.kept = fs.kept.PushBack(f)
		return
	}
	fs.unlist(f)
	if f.ahead {
		fs.held.Add(-int64(f.n) * BlockSize)
	}
}

// unlist makes a flight unknown to those who come. The caller holds mu.
func (fs *flights) unlist(f *flight) {
	l := fs.of[f.object]
	for i := range l {
		if l[i] == f {
			l[i] = l[len(l)-1]
			l[len(l)-1] = nil
			l = l[:len(l)-1]
			break
		}
	}
	if len(l) == 0 {
		delete(fs.of, f.object)
	} else {
		fs.of[f.object] = l
	}
}

// forget lets go of what was read ahead. The caller holds mu.
func (fs *flights) forget(f *flight) {
	fs.kept.Remove(f.kept)
	f.kept = nil
	fs.unlist(f)
	fs.held.Add(-int64(f.n) * BlockSize)
	fs.unref(f)
}

func (fs *flights) unref(f *flight) {
	if f.refs--; f.refs == 0 && f.buf != nil {
		fs.freeBuffer(f.buf)
		f.buf = nil
	}
}

// leave ends the use of a flight, of which used blocks were asked for.
func (fs *flights) leave(f *flight, used int) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if f.kept != nil {
		if f.unread -= used; f.unread <= 0 {
			fs.forget(f)
		}
	}
	fs.unref(f)
}

// quit ends the claim of a flight.
func (fs *flights) quit(f *flight) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	f.by = nil
	fs.unref(f)
}

// A Client is one image's use of the cache, and counts it.
type Client struct {
	c                *Cache
	hits, hitBytes   atomic.Uint64
	misses, missed   atomic.Uint64 // runs, bytes
	fetched, ahead   atomic.Uint64 // bytes from the store, in all and read ahead
	joined, aheadHit atomic.Uint64 // bytes that another fetch, and a read-ahead, served
}

// Client returns a new user of the cache, which is to be closed.
func (c *Cache) Client() *Client {
	u := &Client{c: c}
	c.mu.Lock()
	c.users[u] = struct{}{}
	c.mu.Unlock()
	return u
}

// Close ends the use.
func (u *Client) Close() {
	u.c.mu.Lock()
	defer u.c.mu.Unlock()
	if _, ok := u.c.users[u]; ok {
		delete(u.c.users, u)
		u.c.gone.add(u)
	}
}

// Hit counts n bytes that a client got from the cache.
func (u *Client) Hit(n int) {
	u.hits.Add(1)
	u.hitBytes.Add(uint64(n))
}

// Miss counts n bytes that the cache did not have.
func (u *Client) Miss(n int) {
	u.misses.Add(1)
	u.missed.Add(uint64(n))
}

// Fetched counts n bytes that were read from the store beside the Source.
func (u *Client) Fetched(n int) { u.fetched.Add(uint64(n)) }

// A How says what becomes of blocks that came from the store.
type How uint8

const (
	// Keep keeps them.
	Keep How = iota
	// KeepKnown keeps those that were let go of, or not kept, not long ago, and
	// remembers the rest: for long sequential streams.
	KeepKnown
	// Pass keeps none.
	Pass
)

// Read reads from the byte off of an object's data into dst: from the SSD, from
// what others have under way, else from src. fetched says that src was asked.
func (u *Client) Read(ctx context.Context, k *Key, off int, dst []byte, src Source, how How) (fetched bool, err error) {
	for len(dst) > 0 {
		n, ok := u.Lookup(k, off, dst)
		if !ok {
			first, skip := uint32(off/BlockSize), off%BlockSize
			blocks := uint32((skip + n + BlockSize - 1) / BlockSize)
			var mine bool
			n, mine, err = u.fetch(ctx, k, first, blocks, skip, dst[:n], src, how)
			fetched = fetched || mine
			if err != nil {
				return fetched, err
			}
		}
		off, dst = off+n, dst[n:]
	}
	return fetched, nil
}

// Lookup is Read without a Source and without waiting, for the first n bytes of dst: those that
// are found in one place, or, if not ok, those that a Source has to be asked for.
func (u *Client) Lookup(k *Key, off int, dst []byte) (n int, ok bool) {
	first, skip := uint32(off/BlockSize), off%BlockSize
	got, coming := u.ready(k, off, dst)
	if got > 0 {
		return got, true
	}
	r := Run{N: uint32((skip + len(dst) + BlockSize - 1) / BlockSize)}
	if !coming.Known {
		r = u.c.Next(k, first, r.N, false)
	}
	n = min(int(r.N)*BlockSize-skip, len(dst))
	return n, r.Cached && u.c.readRun(k, first, r, skip, dst[:n])
}

// A Coming says what is known of blocks that were, or are, read ahead.
type Coming struct {
	// Known says that Read would have a fetch to wait for, or to copy from, and need not ask
	// the cache.
	Known bool
	// By is the Want's of who has claimed them, and whose Fly has not returned.
	By any

	cached bool // the SSD had them
}

// Ready copies to dst what was read ahead from the byte off of an object's data on,
// and returns how many bytes that were: none if somebody has to fetch, or to wait. It counts
// them as Hit or Miss, by where they came from. It does not block, and takes no lock when
// nothing is read ahead.
func (u *Client) Ready(k *Key, off int, dst []byte) (n int, c Coming) {
	n, c = u.ready(k, off, dst)
	switch {
	case n > 0 && c.cached:
		u.Hit(n)
	case n > 0:
		u.Miss(n)
	}
	return n, c
}

// ready is Ready without counting.
func (u *Client) ready(k *Key, off int, dst []byte) (n int, c Coming) {
	fs := &u.c.flights
	first, skip := uint32(off/BlockSize), off%BlockSize
	f, known, by := fs.landed(&k.Object, first)
	if f == nil {
		return 0, Coming{Known: known, By: by}
	}
	n = copy(dst, f.buf[int(first-f.first)*BlockSize+skip:])
	u.aheadHit.Add(uint64(n))
	c = Coming{Known: true, cached: f.cached.Cached}
	fs.leave(f, k.blocksTo(first, skip+n))
	return n, c
}

// blocksTo returns how many blocks are read to their end by n bytes from block first on: the
// last one of an object may be shorter than others.
func (k *Key) blocksTo(first uint32, n int) int {
	if uint64(first)*BlockSize+uint64(n) >= k.Size {
		n += BlockSize - 1
	}
	return n / BlockSize
}

// readRun reads a run that was found, from memory or SSD.
func (c *Cache) readRun(k *Key, first uint32, r Run, skip int, dst []byte) bool {
	if r.Memory && c.Copy(k, first, r, skip, dst) {
		return true
	}
	if r.Memory {
		return false
	}
	b := c.file.Buffer(int(r.N) * BlockSize)
	if c.readAt(b, r.place) != nil || !c.Verify(k, first, r, b) {
		return false
	}
	copy(dst, b[skip:])
	return true
}

// fetch gets blocks that are not cached, or the first of them, and returns how
// many bytes of dst it filled; none means to look again.
func (u *Client) fetch(ctx context.Context, k *Key, first, n uint32, skip int, dst []byte, src Source, how How) (got int, mine bool, err error) {
	fs := &u.c.flights
	f, mine := fs.join(&k.Object, first, n)
	if mine {
		err = u.fly(ctx, f, k, src, how)
	} else {
		err = f.wait(ctx)
	}
	if err != nil {
		fs.leave(f, 0)
		if !mine && errors.Is(err, context.Canceled) && ctx.Err() == nil {
			return 0, mine, nil // the other one was told to stop, not this one
		}
		return 0, mine, err
	}
	got = copy(dst, f.buf[int(first-f.first)*BlockSize+skip:])
	if f.ahead {
		u.aheadHit.Add(uint64(got))
	} else if !mine {
		u.joined.Add(uint64(got))
	}
	fs.leave(f, k.blocksTo(first, skip+got))
	return got, mine, nil
}

// wait waits until the flight has ended.
func (f *flight) wait(ctx context.Context) error {
	select {
	case <-f.done:
		return f.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// errEnded is what those get who wait for a fetch that panicked.
var errEnded = errors.New("a fetch of the same blocks did not come to its end")

// fly does the fetch of a flight, and keeps what it got.
func (u *Client) fly(ctx context.Context, f *flight, k *Key, src Source, how How) (err error) {
	err = errEnded
	found := false
	defer func() { u.c.flights.land(f, err, found) }()
	f.buf = u.c.flights.buffer(int(f.n) * BlockSize)
	data := f.buf
	if end := k.Size - uint64(f.first)*BlockSize; uint64(len(data)) > end {
		data = data[:end]
	}
	if f.cached.Cached {
		if u.c.readRun(k, f.first, f.cached, 0, data) {
			err = nil
			return nil
		}
		f.cached = Run{}
	}
	if err = src.Fetch(ctx, f.first, data); err != nil {
		if mutate.On(mutate.CacheFailedKept) {
			u.c.insert(k, f.first, data, how)
		}
		return err
	}
	u.fetched.Add(uint64(len(data)))
	if f.ahead {
		u.ahead.Add(uint64(len(data)))
	}
	found = u.c.insert(k, f.first, data, how)
	return nil
}

// A Want is what is to be read ahead: N blocks of an object from First on.
type Want struct {
	First, N uint32
	// Asked is how many of them will be asked for to their end: what was read ahead stays
	// until so many have been.
	Asked uint32
	// Pieces says that they will be asked for in many pieces, each for itself: they are
	// read ahead from the SSD as well, and wait in memory where the cache has them too.
	Pieces bool
	// By is what Ready returns to those who ask for them before they have come, for as long as
	// Fly is under way or has not been called.
	By any
}

// A Claim is blocks that are to be read ahead.
type Claim struct{ f *flight }

// Claim claims blocks for reading ahead, all that w says or the first of them, and returns
// how many blocks are seen to: by the claim, which is then to be flown; or without
// one, since they are cached or under way. None are when there is no memory.
func (u *Client) Claim(k *Key, w Want) (c Claim, seen uint32, claimed bool) {
	r := u.c.Next(k, w.First, w.N, false)
	if r.Cached && (!w.Pieces || r.Memory || r.N == 1) {
		return Claim{}, r.N, false
	}
	w.N = r.N
	f, seen := u.c.flights.claim(&k.Object, w, r)
	return Claim{f}, seen, f != nil
}

// AheadRoom returns for how many bytes more there is memory to read ahead into, of what
// all clients share. It takes no lock.
func (u *Client) AheadRoom() int { return max(0, u.c.flights.budget-int(u.c.flights.held.Load())) }

// Fly fetches what was claimed, unless somebody who could not wait does so.
func (u *Client) Fly(ctx context.Context, c Claim, k *Key, src Source, how How) (err error) {
	if u.c.flights.begin(c.f) {
		err = u.fly(ctx, c.f, k, src, how)
	}
	u.c.flights.quit(c.f)
	return err
}
