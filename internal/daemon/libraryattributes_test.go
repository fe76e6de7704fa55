package daemon

import (
	"errors"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/librbd/wire"
)

// metadata lists the metadata of the client's image after a key, written as key=value.
func (c *libraryClient) metadata(after string, most uint32) (list []string, more bool) {
	c.t.Helper()
	var l wire.MetadataList
	if err := c.call(wire.ListMetadata, &wire.ListMetadataRequest{After: after, Most: most}, &l); err != nil {
		c.t.Error(err)
	}
	for _, m := range l.Metadata {
		list = append(list, m.Key+"="+m.Value)
	}
	return list, l.More
}

func TestLibraryMetadata(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	c := h.handle(wire.OpenRequest{})
	for _, kv := range []wire.Metadatum{{Key: "b", Value: "2"}, {Key: "a", Value: "1"}, {Key: "c", Value: ""}} {
		if err := c.call(wire.SetMetadata, &kv, nil); err != nil {
			t.Error(err)
		}
	}
	for _, tt := range []struct {
		after string
		most  uint32
		want  []string
		more  bool
	}{
		{"", 0, []string{"a=1", "b=2", "c="}, false},
		{"", 2, []string{"a=1", "b=2"}, true},
		{"a", 2, []string{"b=2", "c="}, false},
		{"bb", 5, []string{"c="}, false},
		{"c", 5, nil, false},
	} {
		if got, more := c.metadata(tt.after, tt.most); !slices.Equal(got, tt.want) || more != tt.more {
			t.Errorf("%d after %q: %q, more %v", tt.most, tt.after, got, more)
		}
	}
	for _, tt := range []struct {
		typ  wire.Type
		q    wire.Message
		want error
	}{
		{wire.GetMetadata, &wire.MetadataRequest{Key: "x"}, syscall.ENOENT},
		{wire.RemoveMetadata, &wire.MetadataRequest{Key: "x"}, syscall.ENOENT},
		{wire.SetMetadata, &wire.Metadatum{Key: "", Value: "v"}, syscall.EINVAL},
		{wire.SetMetadata, &wire.Metadatum{Key: "k\x00"}, syscall.EINVAL},
		{wire.SetMetadata, &wire.Metadatum{Key: strings.Repeat("k", engine.MaxMetadataKey+1)}, syscall.E2BIG},
		{wire.SetMetadata, &wire.Metadatum{Key: "k", Value: strings.Repeat("v", engine.MaxMetadataValue+1)}, syscall.E2BIG},
		{wire.RemoveMetadata, &wire.MetadataRequest{Key: "c"}, nil},
	} {
		if err := c.call(tt.typ, tt.q, nil); !errors.Is(err, tt.want) {
			t.Errorf("%v of %.20q: %v, want %v", tt.typ, tt.q, err, tt.want)
		}
	}
	value := strings.Repeat("v", engine.MaxMetadataValue)
	var err error
	for k := 'A'; err == nil && k < 'Z'; k++ {
		err = c.call(wire.SetMetadata, &wire.Metadatum{Key: string(k), Value: value}, nil)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("more than there can be: %v", err)
	}
	if all, more := c.metadata("", 0); more || len(all) != engine.MaxMetadata/engine.MaxMetadataValue-1+2 {
		t.Errorf("%d of all, more %v", len(all), more)
	}

	ro := h.handle(wire.OpenRequest{Flags: wire.OpenReadOnly})
	var got wire.MetadataResult
	if err := ro.call(wire.GetMetadata, &wire.MetadataRequest{Key: "a"}, &got); err != nil || got.Value != "1" {
		t.Errorf("read-only: %+v, %v", got, err)
	}
	for _, typ := range []wire.Type{wire.SetMetadata, wire.RemoveMetadata} {
		if err := ro.call(typ, &wire.Metadatum{Key: "a"}, nil); !errors.Is(err, syscall.EROFS) {
			t.Errorf("%v by a handle that is read-only: %v", typ, err)
		}
	}
}

func TestLibraryLocks(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	c, ro := h.handle(wire.OpenRequest{}), h.handle(wire.OpenRequest{Flags: wire.OpenReadOnly})
	var l wire.LockList
	list := func() *wire.LockList {
		l = wire.LockList{}
		if err := c.call(wire.Locks, nil, &l); err != nil {
			t.Error(err)
		}
		return &l
	}
	step := func(c *libraryClient, typ wire.Type, q wire.Message, want error) {
		t.Helper()
		if err := c.call(typ, q, nil); !errors.Is(err, want) {
			t.Errorf("%v %+v: %v, want %v", typ, q, err, want)
		}
	}
	step(c, wire.Unlock, &wire.UnlockRequest{Cookie: "c"}, syscall.ENOENT)
	step(c, wire.Lock, &wire.LockRequest{Exclusive: true, Cookie: "c"}, nil)
	step(c, wire.Lock, &wire.LockRequest{Exclusive: true, Cookie: "c"}, syscall.EEXIST)
	step(ro, wire.Lock, &wire.LockRequest{Exclusive: true, Cookie: "d"}, syscall.EBUSY)
	if l := list(); !l.Exclusive || len(l.Lockers) != 1 || l.Lockers[0].Cookie != "c" || !strings.HasPrefix(l.Lockers[0].Client, "client.") || l.Lockers[0].Since == 0 {
		t.Errorf("%+v", l)
	}
	step(c, wire.BreakLock, &wire.BreakLockRequest{Client: "nobody", Cookie: "c"}, syscall.EINVAL)
	step(c, wire.BreakLock, &wire.BreakLockRequest{Client: "client.x", Cookie: "c"}, syscall.EINVAL)
	step(c, wire.BreakLock, &wire.BreakLockRequest{Client: "client.1", Cookie: "c"}, syscall.ENOENT)
	step(ro, wire.BreakLock, &wire.BreakLockRequest{Client: l.Lockers[0].Client, Cookie: "c"}, nil)
	step(c, wire.Unlock, &wire.UnlockRequest{Cookie: "c"}, syscall.ENOENT)
	step(ro, wire.Lock, &wire.LockRequest{Cookie: "s1", Tag: "tag"}, nil)
	step(c, wire.Lock, &wire.LockRequest{Cookie: "s2", Tag: "tag"}, nil)
	step(c, wire.Lock, &wire.LockRequest{Cookie: "s3", Tag: "other"}, syscall.EBUSY)
	if l := list(); l.Exclusive || l.Tag != "tag" || len(l.Lockers) != 2 {
		t.Errorf("%+v", l)
	}
	// All handles of a process are one client, and what they hold outlives them.
	if err := ro.close(); err != nil {
		t.Error(err)
	}
	step(c, wire.Unlock, &wire.UnlockRequest{Cookie: "s1"}, nil)
	step(c, wire.Unlock, &wire.UnlockRequest{Cookie: "s2"}, nil)
	if l := list(); l.Tag != "" || len(l.Lockers) != 0 {
		t.Errorf("%+v", l)
	}
}

func TestLibraryWatchers(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	a, b, ro := h.handle(wire.OpenRequest{}), h.handle(wire.OpenRequest{}), h.handle(wire.OpenRequest{Flags: wire.OpenReadOnly})
	look := func(c *libraryClient) wire.WatcherList {
		var l wire.WatcherList
		if err := c.call(wire.Watchers, nil, &l); err != nil {
			t.Error(err)
		}
		return l
	}
	l := look(a)
	if !l.Owned || l.Host == "" || len(l.Watchers) != 2 || l.Watchers[0].ID != l.Watchers[1].ID || l.Watchers[0].Cookie == l.Watchers[1].Cookie {
		t.Errorf("%+v", l)
	}
	if err := b.close(); err != nil {
		t.Error(err)
	}
	if l := look(ro); l.Owned || len(l.Watchers) != 1 {
		t.Errorf("to a handle that is read-only: %+v", l)
	}
	var times wire.TimesResult
	if err := ro.call(wire.Times, nil, &times); err != nil || times.Created == 0 || times.Modified != times.Created || times.Accessed != times.Created {
		t.Errorf("%+v, %v", times, err)
	}
}

func TestStartTime(t *testing.T) {
	for stat, want := range map[string]string{
		"7 (a) b) c) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20": "4242",
		"7 (a) S 1 2": "",
		"":            "",
	} {
		if got := startTime(stat); got != want {
			t.Errorf("%q of %q, want %q", got, stat, want)
		}
	}
}
