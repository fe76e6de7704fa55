package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/internal/frame"
)

// described makes an image with some metadata and a lock.
func described(t *testing.T, st backend.Store) uuid.UUID {
	t.Helper()
	id, err := Create(t.Context(), st, "disk", smallImage())
	if err != nil {
		t.Fatal(err)
	}
	mustSetMetadata(t, st, id, "k", "v")
	if err := Lock(t.Context(), st, id, Locker{Client: "client.1", Cookie: "c", Address: "alpha", Since: time.Unix(1, 2)}, true, ""); err != nil {
		t.Fatal(err)
	}
	return id
}

func mustSetMetadata(t *testing.T, st backend.Store, id uuid.UUID, key, value string) {
	t.Helper()
	if err := SetMetadata(context.Background(), st, id, key, value); err != nil {
		t.Fatal(err)
	}
}

// mustHaveMetadata compares the metadata of an image, written as key=value.
func mustHaveMetadata(t *testing.T, st backend.Store, id uuid.UUID, want ...string) {
	t.Helper()
	list, err := Metadata(context.Background(), st, id)
	var got []string
	for _, m := range list {
		got = append(got, m.Key+"="+m.Value)
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("metadata %q, %v, want %q", got, err, want)
	}
}

func TestMetadata(t *testing.T) {
	ctx, st := t.Context(), mem.New()
	id, err := Create(ctx, st, "disk", smallImage())
	if err != nil {
		t.Fatal(err)
	}
	mustHaveMetadata(t, st, id)
	if _, err := MetadataOf(ctx, st, id, "a"); !errors.Is(err, ErrNoMetadata) {
		t.Errorf("what is not there: %v", err)
	}
	if err := RemoveMetadata(ctx, st, id, "a"); !errors.Is(err, ErrNoMetadata) {
		t.Errorf("removed what is not there: %v", err)
	}
	for _, kv := range [][2]string{{"b", "2"}, {"a", "1"}, {"c", ""}, {"b", "two"}} {
		mustSetMetadata(t, st, id, kv[0], kv[1])
	}
	mustHaveMetadata(t, st, id, "a=1", "b=two", "c=")
	if v, err := MetadataOf(ctx, st, id, "b"); v != "two" || err != nil {
		t.Errorf("%q, %v", v, err)
	}
	if err := RemoveMetadata(ctx, st, id, "a"); err != nil {
		t.Error(err)
	}
	mustHaveMetadata(t, st, id, "b=two", "c=")
	if err := ClearMetadata(ctx, st, id); err != nil {
		t.Error(err)
	}
	mustHaveMetadata(t, st, id)
	for _, bad := range []struct {
		key, value string
		want       error
	}{
		{"", "v", ErrMetadataText},
		{"a\x00", "v", ErrMetadataText},
		{"a", "\x00", ErrMetadataText},
		{strings.Repeat("k", MaxMetadataKey+1), "v", ErrTooLong},
		{"a", strings.Repeat("v", MaxMetadataValue+1), ErrTooLong},
	} {
		if err := SetMetadata(ctx, st, id, bad.key, bad.value); !errors.Is(err, bad.want) {
			t.Errorf("set %.10q to %.10q: %v, want %v", bad.key, bad.value, err, bad.want)
		}
	}
	mustRemove(t, st, "disk")
	mustBeEmpty(t, st)
}

// TestMetadataFull: the limit holds, and what is there by then stays.
func TestMetadataFull(t *testing.T) {
	ctx, st := t.Context(), mem.New()
	id := described(t, st)
	value := strings.Repeat("v", MaxMetadataValue)
	n := 0
	var err error
	for err == nil {
		if err = SetMetadata(ctx, st, id, fmt.Sprintf("big%02d", n), value); err == nil {
			n++
		}
	}
	if !errors.Is(err, ErrFull) || n != MaxMetadata/MaxMetadataValue-1 {
		t.Errorf("%d values: %v", n, err)
	}
	list, err := Metadata(ctx, st, id)
	if err != nil || len(list) != n+1 {
		t.Errorf("%d are there: %v", len(list), err)
	}
	mustBeSound(t, st, "disk")
}

func TestLocks(t *testing.T) {
	ctx, st := t.Context(), mem.New()
	id, err := Create(ctx, st, "disk", smallImage())
	if err != nil {
		t.Fatal(err)
	}
	at := time.Unix(1700000000, 5).UTC()
	lock := func(client, cookie, tag string, exclusive bool) error {
		return Lock(ctx, st, id, Locker{Client: client, Cookie: cookie, Address: "alpha", Since: at}, exclusive, tag)
	}
	for _, step := range []struct {
		do   func() error
		want error
	}{
		{func() error { return Unlock(ctx, st, id, "client.1", "c") }, ErrNoLock},
		{func() error { return lock("client.1", "c", "", true) }, nil},
		{func() error { return lock("client.1", "c", "", true) }, ErrLockExists},
		{func() error { return lock("client.1", "d", "", true) }, ErrLocked},
		{func() error { return lock("client.1", "c", "", false) }, ErrLockExists},
		{func() error { return lock("client.1", "c", "tag", false) }, ErrLocked},
		{func() error { return lock("client.2", "c", "", false) }, ErrLocked},
		{func() error { return Unlock(ctx, st, id, "client.2", "c") }, ErrNoLock},
		{func() error { return Unlock(ctx, st, id, "client.1", "d") }, ErrNoLock},
		{func() error { return Unlock(ctx, st, id, "client.1", "c") }, nil},
		{func() error { return lock("client.1", "s1", "tag", false) }, nil},
		{func() error { return lock("client.2", "s1", "tag", false) }, nil},
		{func() error { return lock("client.2", "s1", "tag", false) }, ErrLockExists},
		{func() error { return lock("client.2", "s2", "other", false) }, ErrLocked},
		{func() error { return lock("client.3", "s1", "tag", true) }, ErrLocked},
		{func() error { return lock("client.3", "s1", "", true) }, ErrLocked},
		{func() error { return lock("", "s1", "", true) }, ErrLockText},
		{func() error { return lock("client.3", "\x00", "tag", false) }, ErrLockText},
		{func() error { return lock("client.3", strings.Repeat("c", MaxLockText+1), "tag", false) }, ErrTooLong},
	} {
		if err := step.do(); !errors.Is(err, step.want) {
			t.Errorf("%v, want %v", err, step.want)
		}
	}
	got, err := LocksOf(ctx, st, id)
	want := []Locker{{"client.1", "s1", "alpha", at}, {"client.2", "s1", "alpha", at}}
	if err != nil || got.Exclusive || got.Tag != "tag" || !slices.Equal(got.Lockers, want) {
		t.Errorf("%+v, %v", got, err)
	}
	for n := len(got.Lockers); n < MaxLockers; n++ {
		if err := lock("client.4", fmt.Sprint(n), "tag", false); err != nil {
			t.Fatal(err)
		}
	}
	if err := lock("client.5", "", "tag", false); !errors.Is(err, ErrFull) {
		t.Errorf("one more than there can be: %v", err)
	}
}

// TestAttributesAtOnce: nobody's change is lost, and of those who want a lock one gets it.
func TestAttributesAtOnce(t *testing.T) {
	ctx, st := t.Context(), mem.New()
	id, err := Create(ctx, st, "disk", smallImage())
	if err != nil {
		t.Fatal(err)
	}
	const n = 8
	locked := make(chan string, n)
	var all sync.WaitGroup
	var want []string
	for i := range n {
		want = append(want, fmt.Sprintf("k%d=v", i))
		all.Go(func() {
			if err := SetMetadata(ctx, st, id, fmt.Sprintf("k%d", i), "v"); err != nil {
				t.Error(err)
			}
			client := fmt.Sprintf("client.%d", i)
			switch err := Lock(ctx, st, id, Locker{Client: client, Since: time.Now()}, true, ""); {
			case err == nil:
				locked <- client
			case !errors.Is(err, ErrLocked):
				t.Error(err)
			}
		})
	}
	all.Wait()
	close(locked)
	mustHaveMetadata(t, st, id, want...)
	l, err := LocksOf(ctx, st, id)
	if err != nil || len(locked) != 1 || len(l.Lockers) != 1 || l.Lockers[0].Client != <-locked {
		t.Errorf("%d have the lock, of whom the store says %+v, %v", len(locked), l, err)
	}
}

// TestAttributesLostAnswers: a change whose answer is lost is made once, and no error.
func TestAttributesLostAnswers(t *testing.T) {
	ctx, inner := t.Context(), mem.New()
	id := described(t, inner)
	for _, change := range []func(st backend.Store) error{
		func(st backend.Store) error { return SetMetadata(ctx, st, id, "new", "v") },
		func(st backend.Store) error { return RemoveMetadata(ctx, st, id, "k") },
		func(st backend.Store) error { return Unlock(ctx, st, id, "client.1", "c") },
		func(st backend.Store) error {
			return Lock(ctx, st, id, Locker{Client: "client.2", Since: time.Now()}, true, "")
		},
	} {
		if err := change(&endingStore{inner, 1, false}); err != nil {
			t.Error(err)
		}
	}
	mustHaveMetadata(t, inner, id, "new=v")
	if l, err := LocksOf(ctx, inner, id); err != nil || len(l.Lockers) != 1 || l.Lockers[0].Client != "client.2" {
		t.Errorf("%+v, %v", l, err)
	}
}

// removingStore removes the image just before the attributes are made.
type removingStore struct {
	backend.Store
	remove func()
}

func (s *removingStore) Swap(ctx context.Context, key string, old backend.Version, b []byte) (backend.Version, error) {
	if strings.HasSuffix(key, "/attributes") {
		s.remove()
	}
	return s.Store.Swap(ctx, key, old, b)
}

// TestAttributesOfRemoved: an image that is removed meanwhile leaves nothing, and one that has
// been, whose clones live, has no metadata.
func TestAttributesOfRemoved(t *testing.T) {
	ctx, st := t.Context(), mem.New()
	id, err := Create(ctx, st, "disk", smallImage())
	if err != nil {
		t.Fatal(err)
	}
	racing := &removingStore{st, func() { mustRemove(t, st, "disk") }}
	if err := SetMetadata(ctx, racing, id, "k", "v"); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("set on an image that is being removed: %v", err)
	}
	mustBeEmpty(t, st)

	h, id := attached(t, st, smallImage(), nil)
	h.mustFill(1000)
	h.mustClose()
	mustSetMetadata(t, st, id, "k", "v")
	clone := mustClone(t, st, id, "", "clone", nil)
	mustHaveMetadata(t, st, clone, "k=v")
	mustSetMetadata(t, st, clone, "k", "w")
	mustHaveMetadata(t, st, id, "k=v")
	mustRemove(t, st, "disk")
	if _, err := st.Stat(ctx, attributesKey(id)); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("the attributes of a removed image with a clone: %v", err)
	}
	if err := SetMetadata(ctx, st, id, "k", "v"); !errors.Is(err, ErrRemoved) {
		t.Errorf("set on a removed image: %v", err)
	}
	mustHaveMetadata(t, st, clone, "k=w")
	mustBeSound(t, st, "clone")
	if _, err := addedUp(st); err != nil {
		t.Error(err)
	}
	mustRemove(t, st, "clone")
	mustBeEmpty(t, st)
}

// TestAttributesUnmade: what was not made to its end is garbage also where it has metadata.
func TestAttributesUnmade(t *testing.T) {
	ctx, st := t.Context(), mem.New()
	id, err := createNameless(ctx, st, "disk", smallImage(), false)
	if err != nil {
		t.Fatal(err)
	}
	if err := backend.Link(ctx, st, "other", uuid.New()); err != nil { // a directory
		t.Fatal(err)
	}
	mustSetMetadata(t, st, id, "k", "v")
	found, err := GC(ctx, st, GCOptions{Now: func() time.Time { return time.Now().Add(2 * DefaultGCAge) }})
	if err != nil || len(found) != 1 || found[0].Image != id {
		t.Errorf("%+v, %v", found, err)
	}
	mustBeEmpty(t, st)
}

// TestAttributesDamaged: a check finds it, nothing makes data of it, and it can be given up; the
// image is attached and removed whatever is there.
func TestAttributesDamaged(t *testing.T) {
	ctx, st := t.Context(), mem.New()
	id := described(t, st)
	key := attributesKey(id)
	b, v, err := st.Load(ctx, key)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-1] ^= 1
	if _, err := st.Swap(ctx, key, v, b); err != nil {
		t.Fatal(err)
	}
	if _, err := Metadata(ctx, st, id); !damagedAttributes(err) {
		t.Errorf("read: %v", err)
	}
	if err := SetMetadata(ctx, st, id, "a", "b"); !damagedAttributes(err) {
		t.Errorf("changed: %v", err)
	}
	rep, err := Check(ctx, st, "disk", "mem:/disk", CheckOptions{Repair: true})
	if err != nil || len(rep.Errors) != 1 || rep.Errors[0].Object != key || rep.Errors[0].Action != clearMeta || rep.Clean() {
		t.Errorf("%+v, %v", rep, err)
	}
	h := mustOpen(t, st, id, 1)
	h.mustClose()
	if err := ClearMetadata(ctx, st, id); err != nil {
		t.Error(err)
	}
	mustHaveMetadata(t, st, id)
	mustBeSound(t, st, "disk")
}

func TestAttributesFormat(t *testing.T) {
	id := uuid.MustParse("00112233-4455-6677-8899-aabbccddeeff")
	a := &attributes{
		metadata: []Metadatum{{"a", "xyz"}, {"bc", ""}},
		locks:    Locks{Tag: "t", Lockers: []Locker{{"client.1", "ck", "h", time.Unix(0, 0x0102).UTC()}}},
	}
	b, err := a.encode(id)
	want := string(id[:]) + "\x02\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00t" +
		"\x01\x00\x00\x00\x03\x00\x00\x00axyz\x02\x00\x00\x00\x00\x00\x00\x00bc" +
		"\x02\x01\x00\x00\x00\x00\x00\x00\x08\x00\x00\x00\x02\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00client.1ckh"
	if err != nil || string(b[:8]) != "LSDATTR\x00" || string(b[frame.HeaderSize:]) != want {
		t.Errorf("%q, %v", b, err)
	}
	got, err := decodeAttributes(b, id)
	if err != nil || !slices.Equal(got.metadata, a.metadata) || !slices.Equal(got.locks.Lockers, a.locks.Lockers) || got.locks.Tag != "t" || got.locks.Exclusive {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := decodeAttributes(b, uuid.New()); !errors.Is(err, frame.ErrCorrupt) {
		t.Errorf("another image's: %v", err)
	}
	payload := b[frame.HeaderSize:]
	for n := range payload {
		if _, err := decodeAttributes(frame.Encode(attributesMagic, attributesVersion, payload[:n]), id); !errors.Is(err, frame.ErrCorrupt) {
			t.Errorf("the first %d bytes: %v", n, err)
		}
	}
}

func FuzzAttributes(f *testing.F) {
	id := uuid.UUID{1}
	a := &attributes{metadata: []Metadatum{{"a", "x"}, {"b", ""}}, locks: Locks{Exclusive: true, Lockers: []Locker{{"client.1", "c", "h", time.Unix(1, 0)}}}}
	b, err := a.encode(id)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b[frame.HeaderSize:], false)
	a.off = FeatureFastDiff
	if b, err = a.encode(id); err != nil {
		f.Fatal(err)
	}
	f.Add(b[frame.HeaderSize:], true)
	f.Add(append(id[:], "\xff\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00\x00\x00\x00\x00"...), false)
	f.Fuzz(func(t *testing.T, payload []byte, features bool) {
		version := uint32(attributesVersion)
		if features {
			version = featuresVersion
		}
		b := frame.Encode(attributesMagic, version, payload)
		a, err := decodeAttributes(b, id)
		if err != nil {
			return
		}
		again, err := a.encode(id)
		if err != nil || string(again) != string(b) {
			t.Fatalf("decoded what does not encode to itself: %v", err)
		}
	})
}
