package daemon

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
)

// unname removes an image of the world's store, and leaves what it was made of.
func (w *world) unname(name string) uuid.UUID {
	w.t.Helper()
	id, err := engine.Remove(context.Background(), w.store, name, engine.RemoveOptions{})
	if err != nil {
		w.t.Fatal(err)
	}
	return id
}

// objectsOf returns how many objects an image has.
func (w *world) objectsOf(id uuid.UUID) (n int) {
	w.t.Helper()
	if err := w.store.List(context.Background(), id.String()+"/", func(string) error { n++; return nil }); err != nil {
		w.t.Fatal(err)
	}
	return n
}

// reclaims returns the records of removed images that a host has.
func (h *host) reclaims() []string {
	h.w.t.Helper()
	list, err := filepath.Glob(filepath.Join(h.dir, "reclaims", "*"))
	if err != nil {
		h.w.t.Fatal(err)
	}
	return list
}

// until waits for something that happens in the background.
func (w *world) until(what string, is func() bool) {
	w.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			w.t.Fatalf("it does not come to be that %s", what)
		}
	}
}

// TestReclaim: what a removed image was made of goes in the background, while another one
// serves; what a daemon has not come to, because the store was away, the next one does.
func TestReclaim(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: -1})
	w.kernel.write(t, id, 8, 1)
	if done, err := h.del(id, api.DetachRequest{}); err != nil || len(done.Remarks) != 0 {
		t.Fatal(done, err)
	}
	other := h.add(api.AttachRequest{Image: "mem:vm2", ID: -1})
	gone := w.unname("vm1")
	before := w.objectsOf(gone)
	if before < 3 {
		t.Fatalf("there are %d objects of it", before)
	}
	h.reclaim.pause = time.Hour
	w.outage.Set(true)
	for range 2 {
		if err := h.reclaim.ask(api.ReclaimRequest{Store: "mem:", ImageID: gone}); err != nil {
			t.Fatal(err)
		}
	}
	w.until("it has been tried", func() bool { return strings.Contains(w.log.String(), "trying again") })
	if n, files := h.reclaim.len(), h.reclaims(); n != 1 || len(files) != 1 || w.objectsOf(gone) != before {
		t.Errorf("%d wait, with the records %q; %d objects are left", n, files, w.objectsOf(gone))
	}
	w.kernel.write(t, other, 8, 2)
	w.kernel.check(t, other, 8, 2)
	h.crash()
	w.outage.Set(false)
	h.start()
	w.until("nothing is left of it", func() bool { return w.objectsOf(gone) == 0 && len(h.reclaims()) == 0 })
	if n := h.reclaim.len(); n != 0 {
		t.Errorf("%d wait", n)
	}
	w.kernel.check(t, other, 8, 2)
}

// TestReclaimRetries: what fails is tried again by the same daemon, and at last given up, with a
// line in its log.
func TestReclaimRetries(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	h.reclaim.pause = time.Millisecond
	first, second := w.unname("vm1"), w.unname("vm2")
	w.outage.Set(true)
	if err := h.reclaim.ask(api.ReclaimRequest{Store: "mem:", ImageID: first}); err != nil {
		t.Fatal(err)
	}
	w.until("it is given up", func() bool { return h.reclaim.len() == 0 })
	if text := w.log.String(); strings.Count(text, "trying again") != maxReclaimTries-1 || !strings.Contains(text, "gives up: lsdctl gc finds what is left") {
		t.Error("it was not tried so often, and then given up")
	}
	if files := h.reclaims(); len(files) != 0 || w.objectsOf(first) == 0 {
		t.Errorf("records: %q, objects: %d", files, w.objectsOf(first))
	}
	h.reclaim.pause = 50 * time.Millisecond // no goroutine is there to see it
	if err := h.reclaim.ask(api.ReclaimRequest{Store: "mem:", ImageID: second}); err != nil {
		t.Fatal(err)
	}
	w.until("it has been tried", func() bool { return strings.Count(w.log.String(), "trying again") == maxReclaimTries })
	w.outage.Set(false)
	w.until("nothing is left of it", func() bool { return w.objectsOf(second) == 0 && len(h.reclaims()) == 0 })
}

// TestReclaimPanics: the daemon does not die of a removed image, and its devices go on.
func TestReclaimPanics(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	other := h.add(api.AttachRequest{Image: "mem:vm2", ID: -1})
	parent := w.imageID("vm1")
	if _, err := engine.Clone(context.Background(), w.store, parent, "copy", engine.CloneOptions{}); err != nil {
		t.Fatal(err)
	}
	gone := w.unname("copy")
	w.bad.Store(parent.String()) // which is to know that its clone is gone
	if err := h.reclaim.ask(api.ReclaimRequest{Store: "mem:", ImageID: gone}); err != nil {
		t.Fatal(err)
	}
	w.until("it is given up", func() bool { return h.reclaim.len() == 0 })
	if text := w.log.String(); !strings.Contains(text, "panic: test") || !strings.Contains(text, "gives up") {
		t.Error("the panic is not in the log")
	}
	w.kernel.write(t, other, 8, 2)
	w.kernel.check(t, other, 8, 2)
	w.bad.Store("")
	if list, err := engine.GC(context.Background(), w.store, engine.GCOptions{}); err != nil || len(list) != 1 || list[0].Image != gone {
		t.Errorf("gc: %+v, %v", list, err)
	}
}

// TestReclaimEnds: the daemon ends while a store does not answer, and what it was at stays
// written down.
func TestReclaimEnds(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: -1})
	w.kernel.write(t, id, 8, 1)
	if _, err := h.del(id, api.DetachRequest{}); err != nil {
		t.Fatal(err)
	}
	// A clone has it read what that needs, for which the store does not answer.
	if _, err := engine.Clone(context.Background(), w.store, w.imageID("vm1"), "copy", engine.CloneOptions{}); err != nil {
		t.Fatal(err)
	}
	gone := w.unname("vm1")
	w.hang = faultstore.NewGate()
	if err := h.reclaim.ask(api.ReclaimRequest{Store: "mem:", ImageID: gone}); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithTimeout(context.Background(), 20*time.Second)
	defer stop()
	if err := w.hang.AwaitWaiting(ctx, 1); err != nil {
		t.Fatal(err)
	}
	h.leave(exitRequest{timeout: 5 * time.Second, progress: func(api.Progress) {}})
	h.reclaim.mu.Lock()
	running := h.reclaim.running != nil
	h.reclaim.mu.Unlock()
	if files := h.reclaims(); running || len(files) != 1 {
		t.Errorf("it runs: %v; records: %q", running, files)
	}
	if err := h.reclaim.ask(api.ReclaimRequest{Store: "mem:", ImageID: gone}); err != errEnding {
		t.Errorf("a daemon that ends: %v", err)
	}
	h.crash()
	w.hang.Open()
	h.start()
	w.until("it is done", func() bool { return len(h.reclaims()) == 0 })
	if text := w.log.String(); !strings.Contains(text, "reclaimed what a removed image") {
		t.Error("the log does not say so")
	}
}

// TestReclaimRefuses: what makes no sense is refused, and more than there is room for; records
// that cannot be read are left alone.
func TestReclaimRefuses(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	for _, q := range []api.ReclaimRequest{{}, {Store: "mem:"}, {Store: "nonsense", ImageID: uuid.New()}, {Store: "file://x", ImageID: uuid.New()}} {
		if err := h.reclaim.ask(q); err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("%+v: %v", q, err)
		}
	}
	h.reclaim.mu.Lock()
	h.reclaim.queue = make([]waiting, maxReclaims)
	h.reclaim.mu.Unlock()
	if err := h.reclaim.ask(api.ReclaimRequest{Store: "mem:", ImageID: uuid.New()}); err == nil || !strings.Contains(err.Error(), "wait already") {
		t.Errorf("one more than there is room for: %v", err)
	}
	if files := h.reclaims(); len(files) != 0 {
		t.Errorf("records: %q", files)
	}
	h.crash()
	id := uuid.New()
	for name, text := range map[string]string{
		uuid.NewString() + ".json": `{"version": 1, "store": "mem:", "image_id": "` + id.String() + `"}`,
		id.String() + ".json":      `{"version": 2, "store": "mem:", "image_id": "` + id.String() + `"}`,
		"x.json":                   `{`,
	} {
		if err := os.WriteFile(filepath.Join(h.dir, "reclaims", name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	h.start()
	if n, files := h.reclaim.len(), h.reclaims(); n != 0 || len(files) != 3 || strings.Count(w.log.String(), "record of a removed image cannot be read") != 3 {
		t.Errorf("%d wait; records: %q", n, files)
	}
}

// TestReclaimLate: what an owner puts of an image that was removed under it is seen to when its
// time has come, however often that is put off, and by the next daemon where this one has ended.
func TestReclaimLate(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	h := w.newHost()
	remove := func(name string) uuid.UUID {
		w.kernel.write(t, h.add(api.AttachRequest{Image: "mem:" + name, ID: -1}), 8, 1)
		gone, err := engine.Remove(ctx, w.store, name, engine.RemoveOptions{Force: true})
		if err != nil {
			t.Fatal(err)
		}
		return gone
	}
	gone := remove("vm1")
	const puts = 2 * maxReclaimTries
	calls := 0 // the reclaimer's, until it has ended
	h.reclaim.engine = func(ctx context.Context, st backend.Store, id uuid.UUID, progress func(done, total int)) (time.Duration, error) {
		late, err := engine.Reclaim(ctx, st, id, progress)
		if err != nil || late < 2*time.Minute {
			t.Errorf("something may come for %v, %v", late, err)
		}
		if calls++; calls <= puts {
			return time.Millisecond, nil
		}
		_, err = engine.GC(ctx, st, engine.GCOptions{Now: func() time.Time { return time.Now().Add(2 * engine.MaxLease) }})
		return 0, err
	}
	if err := h.reclaim.ask(api.ReclaimRequest{Store: "mem:", ImageID: gone}); err != nil {
		t.Fatal(err)
	}
	w.until("it is done", func() bool { return h.reclaim.len() == 0 })
	if text := w.log.String(); calls != puts+1 || strings.Count(text, "looking again") != puts || strings.Contains(text, "trying again") {
		t.Errorf("it was looked at %d times", calls)
	}
	if files := h.reclaims(); len(files) != 0 || w.objectsOf(gone) != 0 {
		t.Errorf("records: %q, objects: %d", files, w.objectsOf(gone))
	}
	h.reclaim.engine = engine.Reclaim // no goroutine is there to see it
	if err := h.reclaim.ask(api.ReclaimRequest{Store: "mem:", ImageID: remove("vm2")}); err != nil {
		t.Fatal(err)
	}
	for daemons := 1; daemons <= 2; daemons++ {
		w.until("it waits", func() bool { return strings.Count(w.log.String(), "looking again") == puts+daemons })
		if n, files := h.reclaim.len(), h.reclaims(); n != 1 || len(files) != 1 {
			t.Errorf("%d wait, with the records %q", n, files)
		}
		if daemons == 1 {
			h.crash()
			h.start()
		}
	}
}
