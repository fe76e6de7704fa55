package open_test

import (
	"context"
	"testing"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/open"
	"github.com/lsd-ceph/lsd/backend/storetest"
)

func parse(t *testing.T, s string) backend.URL {
	t.Helper()
	u, err := backend.ParseStore(s)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func TestMem(t *testing.T) {
	ctx := context.Background()
	var o open.Opener
	for _, name := range []string{"mem:", "mem:x", "mem:"} {
		s, err := o.Store(ctx, parse(t, name))
		if err != nil {
			t.Fatal(err)
		}
		err = s.Put(ctx, "a", nil)
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if name == "mem:" && err != nil {
			storetest.WantError(t, "second Put to "+name, err, backend.ErrExists)
		}
	}
	s, err := o.Store(ctx, parse(t, "mem:"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Stat(ctx, "a"); err != nil {
		t.Errorf("the contents went with the handle: %v", err)
	}
	other, err := open.Store(ctx, parse(t, "mem:"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = other.Stat(ctx, "a")
	storetest.WantError(t, "Stat in another opener's store", err, backend.ErrNotFound)
}

func TestFile(t *testing.T) {
	ctx := context.Background()
	u := parse(t, "file://"+t.TempDir()+"/store")
	s, err := open.Store(ctx, u)
	storetest.WantError(t, "Store of an absent directory", err, backend.ErrNotFound)
	if s != nil {
		t.Errorf("failed Store returned %v", s)
	}
	if s, err = open.CreateStore(ctx, u); err != nil {
		t.Fatal(err)
	}
	s.Close()
	if s, err = open.Store(ctx, u); err != nil {
		t.Fatal(err)
	}
	s.Close()
}

func TestErrors(t *testing.T) {
	ctx := context.Background()
	for _, u := range []backend.URL{{}, {Scheme: "s3"}, {Scheme: "rados", Pool: "p", Conf: "/no/such/file"}} {
		s, err := open.Store(ctx, u)
		storetest.WantError(t, "Store", err, backend.ErrPermanent)
		if s != nil {
			t.Errorf("failed Store returned %v", s)
		}
	}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	for _, s := range []string{"mem:", "file:///no/such", "rados://p?conf=/no/such/file"} {
		_, err := open.Store(cancelled, parse(t, s))
		storetest.WantError(t, "Store", err, context.Canceled)
	}
}
