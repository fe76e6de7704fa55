package backend_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/backend/storetest"
)

func wantNames(t *testing.T, s backend.Store, want ...backend.Entry) {
	t.Helper()
	got, err := backend.Names(context.Background(), s)
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("Names = %v, %v; want %v", got, err, want)
	}
}

func TestDirectory(t *testing.T) {
	ctx := context.Background()
	s := mem.New()
	id1, id2 := uuid.New(), uuid.New()
	wantNames(t, s)
	_, err := backend.Lookup(ctx, s, "a")
	storetest.WantError(t, "Lookup", err, backend.ErrNotFound)

	for _, e := range []backend.Entry{{Name: "b", ID: id2}, {Name: "a", ID: id1}, {Name: "a", ID: id1}} {
		if err := backend.Link(ctx, s, e.Name, e.ID); err != nil {
			t.Fatal(err)
		}
	}
	wantNames(t, s, backend.Entry{Name: "a", ID: id1}, backend.Entry{Name: "b", ID: id2})
	if id, err := backend.Lookup(ctx, s, "b"); id != id2 || err != nil {
		t.Errorf("Lookup = %v, %v; want %v", id, err, id2)
	}
	storetest.WantError(t, "Link of a taken name", backend.Link(ctx, s, "a", id2), backend.ErrExists)
	storetest.WantError(t, "Link of a bad name", backend.Link(ctx, s, "a/b", id2), backend.ErrPermanent)
	storetest.WantError(t, "Link of no id", backend.Link(ctx, s, "c", uuid.Nil), backend.ErrPermanent)

	storetest.WantError(t, "Rename of an absent name", backend.Rename(ctx, s, "x", "y"), backend.ErrNotFound)
	storetest.WantError(t, "Rename to a taken name", backend.Rename(ctx, s, "a", "b"), backend.ErrExists)
	storetest.WantError(t, "Rename to itself", backend.Rename(ctx, s, "a", "a"), backend.ErrExists)
	storetest.WantError(t, "Rename to a bad name", backend.Rename(ctx, s, "a", ""), backend.ErrPermanent)
	if err := backend.Rename(ctx, s, "a", "c"); err != nil {
		t.Fatal(err)
	}
	wantNames(t, s, backend.Entry{Name: "b", ID: id2}, backend.Entry{Name: "c", ID: id1})

	storetest.WantError(t, "Unlink of an absent name", backend.Unlink(ctx, s, "a", id1), backend.ErrNotFound)
	storetest.WantError(t, "Unlink of another image", backend.Unlink(ctx, s, "b", id1), backend.ErrConflict)
	for name, id := range map[string]uuid.UUID{"b": id2, "c": id1} {
		if err := backend.Unlink(ctx, s, name, id); err != nil {
			t.Fatal(err)
		}
	}
	wantNames(t, s)
}

// TestTrashedNames: an image in the trash has a name that no user can give, and is the last.
func TestTrashedNames(t *testing.T) {
	ctx, s := context.Background(), mem.New()
	id, other := uuid.New(), uuid.New()
	place := backend.TrashName(id)
	if backend.CheckImageName(place) == nil || !backend.InTrash(place) || backend.InTrash("a") || backend.InTrash("~") || backend.InTrash(strings.ToUpper(place)) {
		t.Errorf("%s is what an image can be called", place)
	}
	storetest.WantError(t, "Link", backend.Link(ctx, s, place, id), backend.ErrPermanent)
	for name, id := range map[string]uuid.UUID{"a": id, "zz": other} {
		if err := backend.Link(ctx, s, name, id); err != nil {
			t.Fatal(err)
		}
	}
	storetest.WantError(t, "Rename", backend.Rename(ctx, s, "a", place), backend.ErrPermanent)
	storetest.WantError(t, "Move to another's place", backend.Move(ctx, s, other, "zz", place), backend.ErrPermanent)
	storetest.WantError(t, "Move of another image", backend.Move(ctx, s, other, "a", backend.TrashName(other)), backend.ErrNotFound)
	if err := backend.Move(ctx, s, id, "a", place); err != nil {
		t.Fatal(err)
	}
	wantNames(t, s, backend.Entry{Name: "zz", ID: other}, backend.Entry{Name: place, ID: id})
	b, _, err := s.Load(ctx, backend.DirectoryKey)
	if err != nil || b[8] != 2 {
		t.Errorf("the directory is of version %d, %v", b[8], err)
	}
	storetest.WantError(t, "Move to a taken name", backend.Move(ctx, s, id, place, "zz"), backend.ErrExists)
	if err := backend.Move(ctx, s, id, place, "a"); err != nil {
		t.Fatal(err)
	}
	if b, _, err := s.Load(ctx, backend.DirectoryKey); err != nil || b[8] != 1 {
		t.Errorf("the directory is of version %d, %v", b[8], err)
	}
	wantNames(t, s, backend.Entry{Name: "a", ID: id}, backend.Entry{Name: "zz", ID: other})
}

func TestDirectoryRace(t *testing.T) {
	ctx := context.Background()
	s := mem.New()
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			id := uuid.New()
			name := fmt.Sprintf("vm-%02d", i)
			for _, err := range []error{
				backend.Link(ctx, s, name, id),
				backend.Rename(ctx, s, name, name+"-new"),
			} {
				if err != nil {
					t.Errorf("%s: %v", name, err)
				}
			}
			if i%2 == 0 {
				if err := backend.Unlink(ctx, s, name+"-new", id); err != nil {
					t.Errorf("%s: %v", name, err)
				}
			}
		})
	}
	wg.Wait()
	entries, err := backend.Names(ctx, s)
	if err != nil || len(entries) != 8 {
		t.Errorf("Names = %v, %v; want 8", entries, err)
	}
}

// TestDirectoryUnknownOutcome lets Swaps fail after they took effect: each
// change must then be found done, not reported as failed or done twice.
func TestDirectoryUnknownOutcome(t *testing.T) {
	ctx := context.Background()
	for _, fault := range []faultstore.Fault{{Before: backend.ErrTemporary}, {After: backend.ErrTemporary}} {
		s := faultstore.New(mem.New())
		id := uuid.New()
		for what, change := range map[string]func() error{
			"1 Link":   func() error { return backend.Link(ctx, s, "a", id) },
			"2 Rename": func() error { return backend.Rename(ctx, s, "a", "b") },
			"3 Unlink": func() error { return backend.Unlink(ctx, s, "b", id) },
		} {
			// Each change starts from the state that the one before it leaves.
			s.Inject()
			for _, e := range []string{"a", "b"} {
				if err := backend.Unlink(ctx, s, e, id); err != nil && !errors.Is(err, backend.ErrNotFound) {
					t.Fatal(err)
				}
			}
			if what[0] != '1' {
				if err := backend.Link(ctx, s, string("ab"[what[0]-'2']), id); err != nil {
					t.Fatal(err)
				}
			}
			s.Inject(faultstore.If(faultstore.All(faultstore.Method(faultstore.Swap), faultstore.First(2)), fault))
			if err := change(); err != nil {
				t.Errorf("%s: %v", what, err)
			}
		}
	}
}

func TestDirectoryStoreFails(t *testing.T) {
	ctx := context.Background()
	s := faultstore.New(mem.New(), faultstore.If(faultstore.Method(faultstore.Swap), faultstore.Fault{Before: backend.ErrTemporary}))
	storetest.WantError(t, "Link", backend.Link(ctx, s, "a", uuid.New()), backend.ErrTemporary)
	s.Inject(faultstore.If(faultstore.Any, faultstore.Fault{Before: backend.ErrPermanent}))
	storetest.WantError(t, "Link", backend.Link(ctx, s, "a", uuid.New()), backend.ErrPermanent)
	_, err := backend.Names(ctx, s)
	storetest.WantError(t, "Names", err, backend.ErrPermanent)

	s.Inject()
	if _, err := s.Swap(ctx, backend.DirectoryKey, backend.NoVersion, []byte("something else")); err != nil {
		t.Fatal(err)
	}
	_, err = backend.Lookup(ctx, s, "a")
	storetest.WantError(t, "Lookup in a corrupt directory", err, backend.ErrPermanent)
	storetest.WantError(t, "Link in a corrupt directory", backend.Link(ctx, s, "a", uuid.New()), backend.ErrPermanent)
}

// A deadline is a context whose deadline has come when over is closed.
type deadline struct {
	context.Context
	over chan struct{}
}

func (d deadline) Done() <-chan struct{} { return d.over }

func (d deadline) Err() error {
	select {
	case <-d.over:
		return context.DeadlineExceeded
	default:
		return nil
	}
}

// A lateStore cannot swap, and says why when the deadline has come.
type lateStore struct {
	backend.Store
	over chan struct{}
}

func (s lateStore) Swap(context.Context, string, backend.Version, []byte) (backend.Version, error) {
	close(s.over)
	return backend.NoVersion, &backend.Error{Op: "swap", Class: backend.ErrTemporary, Cause: errors.New("that is why")}
}

// TestDirectoryDeadline: what the store has said last is not lost in the error of the
// context.
func TestDirectoryDeadline(t *testing.T) {
	over := make(chan struct{})
	err := backend.Link(deadline{context.Background(), over}, lateStore{mem.New(), over}, "a", uuid.New())
	storetest.WantError(t, "Link", err, backend.ErrTemporary)
	if err == nil || !strings.Contains(err.Error(), "that is why") {
		t.Errorf("Link: %v", err)
	}
}
