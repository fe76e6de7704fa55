package daemon

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/internal/api"
)

// slowKernel is a kernel in which it takes until go for a device to be deleted.
type slowKernel struct {
	*fakeKernel
	deleting, goOn chan struct{}
}

func (k *slowKernel) Delete(ctx context.Context, id int) error {
	k.deleting <- struct{}{}
	<-k.goOn
	return k.fakeKernel.Delete(ctx, id)
}

// detachLater attaches an image and detaches it without a store: that goes on in the
// background.
func (h *host) detachLater(t *testing.T) (id int, a *attachment) {
	t.Helper()
	id = h.add(api.AttachRequest{ID: -1})
	h.w.kernel.write(t, id, 8, 1)
	a = h.find(id)
	if err := a.flush(context.Background(), func(api.Progress) {}); err != nil {
		t.Fatal(err)
	}
	h.w.outage.Set(true)
	ctx, stop := context.WithTimeout(context.Background(), 500*time.Millisecond)
	defer stop()
	if _, err := a.detach(ctx, api.DetachRequest{}, func(api.Progress) {}); err == nil {
		t.Fatal("detached without a store")
	}
	return id, a
}

// TestDetachTwice: a detach that went on in the background comes to its end while its
// user asks for it again.
func TestDetachTwice(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	slow := &slowKernel{w.kernel, make(chan struct{}), make(chan struct{})}
	h.kern = slow
	id, a := h.detachLater(t)
	w.outage.Set(false)
	<-slow.deleting // by the keeper, which has closed the image
	again := make(chan error)
	go func() {
		_, err := a.detach(context.Background(), api.DetachRequest{}, func(api.Progress) {})
		again <- err
	}()
	for len(a.op) == 0 {
		time.Sleep(time.Millisecond)
	}
	close(slow.goOn)
	if err := <-again; err != nil {
		t.Errorf("the second detach: %v", err)
	}
	if h.find(id) != nil {
		t.Error("it is attached")
	}
	if a.kept != nil {
		a.stopKeeper()
		t.Error("a keeper is at what is detached")
	}
}

// TestPanicWhileDetaching: the reactor dies under an image that is being detached in the
// background. Another one comes to the end of it.
func TestPanicWhileDetaching(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id, a := h.detachLater(t)
	dk := a.getDisk()
	dk.reactor.Post(func() { panic("test") })
	<-dk.reactor.Done()
	w.outage.Set(false)
	h.await(id, "absent")
	if r, l := h.files(); r != 0 || l != 0 {
		t.Errorf("%d records and %d logs are left", r, l)
	}
}

// TestLogGoesOnElsewhere: while an image is being detached, another lsdd of the host
// attaches it, with the same log. That stays.
func TestLogGoesOnElsewhere(t *testing.T) {
	w := newWorld(t)
	h, other := w.newHost(), w.newHost()
	slow := &slowKernel{w.kernel, make(chan struct{}), make(chan struct{})}
	h.kern = slow
	cache := t.TempDir()
	id := h.add(api.AttachRequest{ID: -1, Cache: cache})
	w.kernel.write(t, id, 8, 1)
	ended := make(chan error)
	go func() {
		_, err := h.del(id, api.DetachRequest{})
		ended <- err
	}()
	<-slow.deleting // the image has been let go of
	id = other.add(api.AttachRequest{ID: -1, Cache: cache})
	w.kernel.write(t, id, 16, 2) // in the log alone
	close(slow.goOn)
	if err := <-ended; err != nil {
		t.Error(err)
	}
	other.crash()
	other.start()
	w.kernel.check(t, id, 8, 1)
	w.kernel.check(t, id, 16, 2)
}

// TestQuietInTime: what the reactor says too late of an image is nobody's any more.
func TestQuietInTime(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: -1})
	dk := h.find(id).getDisk()
	dk.reactor.Post(func() { time.Sleep(100 * time.Millisecond) })
	ctx, stop := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer stop()
	if dk.awaitQuiet(ctx) {
		t.Error("the reactor has not answered")
	}
	w.kernel.write(t, id, 8, 1)
}

// TestDetachDamagedMap: an image of whose map a part is damaged, and which waits for a
// checkpoint for that, is detached nonetheless, with all that was written, and its user hears
// what is damaged.
func TestDetachDamagedMap(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	id := h.add(api.AttachRequest{ID: -1})
	w.kernel.write(t, id, 8, 1)
	if _, err := h.del(id, api.DetachRequest{}); err != nil {
		t.Fatal(err)
	}
	key, mend := w.damageMap(t)
	id = h.add(api.AttachRequest{ID: -1, CheckpointEvery: 1})
	a := h.find(id)
	w.kernel.write(t, id, 16, 2)
	if err := a.flush(context.Background(), func(api.Progress) {}); err != nil {
		t.Fatal(err)
	}
	w.kernel.write(t, id, 24, 3) // which is not accepted before there is a checkpoint
	q := api.DetachRequest{Timeout: 700 * time.Millisecond}
	ctx, stop := context.WithTimeout(context.Background(), 3*q.Timeout)
	defer stop()
	shown := ""
	if _, err := a.detach(ctx, q, func(p api.Progress) { shown = p.What }); err == nil || !strings.Contains(err.Error(), "goes on") {
		t.Fatalf("the detach has not waited for the map: %v", err)
	}
	if !strings.Contains(shown, key) {
		t.Errorf("it has shown %q, and not that it waits for %s", shown, key)
	}
	if im := h.await(id, api.StateDetaching); len(im.Advice) != 1 || !strings.Contains(im.Advice[0], key) {
		t.Errorf("the status says %q, and not that it waits for %s", im.Advice, key)
	}
	done, err := h.del(id, q)
	if err != nil || len(done.Remarks) != 1 || !strings.Contains(done.Remarks[0], key) || !strings.Contains(done.Remarks[0], "lsdctl check mem:vm1") || strings.Contains(done.Remarks[0], "\n") {
		t.Errorf("detached: %v, %q", err, done.Remarks)
	}
	if r, l := h.files(); r != 0 || l != 0 {
		t.Errorf("%d records and %d logs are left", r, l)
	}
	mend()
	other := w.newHost()
	id = other.add(api.AttachRequest{ID: -1})
	for n := range uint64(3) {
		w.kernel.check(t, id, 8+8*n, byte(1+n))
	}
}

// damageMap flips a bit of the one map object in the store, and returns its key and what mends it.
func (w *world) damageMap(t *testing.T) (key string, mend func()) {
	t.Helper()
	ctx := context.Background()
	if err := w.store.List(ctx, "", func(k string) error {
		if strings.Contains(k, "/m/") {
			key = k
		}
		return nil
	}); err != nil || key == "" {
		t.Fatalf("there is no map object: %v", err)
	}
	is, err := w.store.Stat(ctx, key)
	if err != nil {
		t.Fatal(err)
	}
	whole := make([]byte, is.Size)
	if _, err := w.store.Get(ctx, key, whole, 0); err != nil {
		t.Fatal(err)
	}
	put := func(b []byte) {
		if err := errors.Join(w.store.Delete(ctx, key), w.store.Put(ctx, key, b)); err != nil {
			t.Fatal(err)
		}
	}
	bad := slices.Clone(whole)
	bad[len(bad)-1] ^= 1
	put(bad)
	return key, func() { put(whole) }
}
