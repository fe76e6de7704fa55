package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/parallel"
)

const (
	reclaimVersion = 1
	// maxReclaims bounds how many removed images wait; lsdctl reclaims the others itself.
	maxReclaims = 1000
	// maxReclaimTries bounds how often one is tried that fails, over some hours; lsdctl gc
	// finds what is left of it then.
	maxReclaimTries = 10
	reclaimPause    = time.Minute // before the second try; it doubles
	maxReclaimPause = time.Hour
	// reclaimEnd is how long the end of the daemon waits for the call of a store that is under
	// way.
	reclaimEnd = time.Second
)

// reclaim is what is written down of a removed image until nothing of it is left that can go.
type reclaim struct {
	Version int       `json:"version"`
	Store   string    `json:"store"` // URL
	ImageID uuid.UUID `json:"image_id"`
	Asked   time.Time `json:"asked"`
}

// waiting is a reclaim that waits for its turn.
type waiting struct {
	reclaim
	tries int       // that have failed
	due   time.Time // for the next one
}

// reclaimer reclaims what removed images were made of, one after the other, on one goroutine,
// which is there while there is any. No attachment waits for it. Each has a file in its
// directory, so that what is not done when the daemon ends the next one takes up.
type reclaimer struct {
	dir    string
	ctx    context.Context // ends when the daemon is told to
	logger *slog.Logger
	openSt func(context.Context, backend.URL) (backend.Store, error)
	engine reclaimFunc   // engine.Reclaim
	pause  time.Duration // reclaimPause
	wake   chan struct{} // has room for one

	mu      sync.Mutex
	queue   []waiting     // guarded by mu; in the order in which they were asked for
	running chan struct{} // guarded by mu; closed by the goroutine when it ends, nil without one
}

// reclaimFunc is what engine.Reclaim is.
type reclaimFunc func(ctx context.Context, st backend.Store, id uuid.UUID, progress func(done, total int)) (late time.Duration, err error)

func newReclaimer(ctx context.Context, dir string, logger *slog.Logger, openSt func(context.Context, backend.URL) (backend.Store, error)) *reclaimer {
	return &reclaimer{dir: dir, ctx: ctx, logger: logger, openSt: openSt, engine: engine.Reclaim, pause: reclaimPause, wake: make(chan struct{}, 1)}
}

func (r *reclaimer) path(id uuid.UUID) string { return filepath.Join(r.dir, id.String()+recordSuffix) }

// takeUp takes up what an earlier daemon has left.
func (r *reclaimer) takeUp() error {
	list, err := loadAll(r.dir, func(path string, err error) {
		r.logger.Error("this record of a removed image cannot be read, and is left as it is: lsdctl gc finds what is left of the image", "path", path, "err", err)
	}, readReclaim)
	if err != nil {
		return err
	}
	slices.SortStableFunc(list, func(a, b reclaim) int { return a.Asked.Compare(b.Asked) })
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, x := range list {
		r.put(x)
	}
	return nil
}

func readReclaim(path, base string) (reclaim, error) {
	var x reclaim
	b, err := os.ReadFile(path)
	if err != nil {
		return x, err
	}
	if err := json.Unmarshal(b, &x); err != nil {
		return x, err
	}
	switch {
	case x.Version != reclaimVersion:
		return x, fmt.Errorf("version %d of the format is not known here", x.Version)
	case x.ImageID.String() != base:
		return x, fmt.Errorf("it is about image %s", x.ImageID)
	}
	_, err = backend.ParseStore(x.Store)
	return x, err
}

// ask has it reclaim what a removed image was made of. When it returns that is written down.
func (r *reclaimer) ask(q api.ReclaimRequest) error {
	u, err := backend.ParseStore(q.Store)
	switch {
	case err != nil:
		return err
	case q.ImageID == uuid.Nil:
		return errors.New("the request names no image")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.ctx.Err() != nil:
		return errEnding
	case len(r.queue) >= maxReclaims:
		return fmt.Errorf("%d removed images wait already to be reclaimed", len(r.queue))
	}
	x := reclaim{Version: reclaimVersion, Store: u.String(), ImageID: q.ImageID, Asked: time.Now().UTC()}
	if err := saveJSON(r.path(x.ImageID), x); err != nil {
		return fmt.Errorf("write down the removed image: %w", err)
	}
	r.put(x)
	return nil
}

// put puts a removed image at the end of the queue, unless it is there, and has it be seen to.
// r.mu is held.
func (r *reclaimer) put(x reclaim) {
	if !slices.ContainsFunc(r.queue, func(w waiting) bool { return w.ImageID == x.ImageID }) {
		r.queue = append(r.queue, waiting{reclaim: x})
	}
	select {
	case r.wake <- struct{}{}:
	default:
	}
	if r.running == nil && len(r.queue) > 0 {
		r.running = make(chan struct{})
		go r.run(r.running)
	}
}

// len returns how many removed images there are still.
func (r *reclaimer) len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.queue)
}

// wait waits for the goroutine to end, after r.ctx, for a time at most.
func (r *reclaimer) wait(most time.Duration) {
	r.mu.Lock()
	running := r.running
	r.mu.Unlock()
	if running == nil {
		return
	}
	select {
	case <-running:
	case <-time.After(most):
	}
}

// run reclaims until there is nothing more to do, or the daemon ends.
func (r *reclaimer) run(ended chan struct{}) {
	defer close(ended)
	for {
		w, pause := r.next(time.Now())
		switch {
		case w == nil && pause == 0:
			return
		case w == nil:
			select {
			case <-r.wake:
			case <-time.After(pause):
			case <-r.ctx.Done():
			}
			continue
		}
		began := time.Now()
		objects, late, err := r.reclaim(w)
		if err != nil && r.ctx.Err() != nil {
			continue // the next daemon takes it up
		}
		r.settle(w, objects, time.Since(began), late, err)
	}
}

// next returns what is to be reclaimed now, or how long there is nothing to do; 0 means that
// the goroutine ends.
func (r *reclaimer) next(now time.Time) (*waiting, time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.queue) == 0 || r.ctx.Err() != nil {
		r.running = nil
		return nil, 0
	}
	first := slices.MinFunc(r.queue, func(a, b waiting) int { return a.due.Compare(b.due) })
	if pause := first.due.Sub(now); pause > 0 {
		return nil, pause
	}
	return &first, 0
}

// reclaim reclaims what one removed image was made of, and returns how many objects have gone,
// and for how long others may come. A panic is its error: the daemon goes on.
func (r *reclaimer) reclaim(w *waiting) (objects int, late time.Duration, err error) {
	u, err := backend.ParseStore(w.Store)
	if err != nil {
		return 0, 0, err
	}
	err = parallel.Catch(func() error {
		st, err := r.openSt(r.ctx, u)
		if err != nil {
			return err
		}
		defer st.Close()
		late, err = r.engine(r.ctx, st, w.ImageID, func(int, int) { objects++ })
		return err
	})
	return objects, late, err
}

// settle notes what has become of an attempt. One after which something may come for so long as
// late is made again then.
func (r *reclaimer) settle(w *waiting, objects int, took, late time.Duration, err error) {
	logger := r.logger.With("store", w.Store, "image", w.ImageID, "objects", objects)
	panicked := (*parallel.Panicked)(nil)
	r.mu.Lock()
	defer r.mu.Unlock()
	i := slices.IndexFunc(r.queue, func(x waiting) bool { return x.ImageID == w.ImageID })
	again := &r.queue[i]
	again.tries++
	switch {
	case err == nil && late > 0:
		again.tries, again.due = 0, time.Now().Add(late)
		logger.Info("reclaimed what a removed image was made of, but for what a host may still put: looking again", "in", late.Round(time.Second), "took", took.Round(time.Millisecond))
		return
	case err == nil:
		logger.Info("reclaimed what a removed image was made of", "took", took.Round(time.Millisecond))
	case again.tries < maxReclaimTries && !errors.As(err, &panicked):
		pause := min(r.pause<<(again.tries-1), maxReclaimPause)
		again.due = time.Now().Add(pause)
		logger.Warn("cannot reclaim what a removed image was made of: trying again", "in", pause, "err", err)
		return
	default:
		logger.Error("cannot reclaim what a removed image was made of, and gives up: lsdctl gc finds what is left", "err", err)
	}
	r.queue = slices.Delete(r.queue, i, i+1)
	if err := removeDurably(r.path(w.ImageID)); err != nil {
		logger.Error("remove the record of a removed image", "err", err)
	}
}
