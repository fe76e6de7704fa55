package mem_test

import (
	"context"
	"testing"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/backend/storetest"
)

func TestStore(t *testing.T) {
	storetest.Run(t, func(t *testing.T) func(*testing.T) backend.Store {
		s := mem.New()
		return func(*testing.T) backend.Store { return s.Handle() }
	})
}

func TestClone(t *testing.T) {
	ctx := context.Background()
	s := mem.New()
	if err := s.Put(ctx, "a", []byte("xyz")); err != nil {
		t.Fatal(err)
	}
	c := s.Clone()
	if err := s.Delete(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	if n, size := c.Size(); n != 1 || size != 3 {
		t.Errorf("Size of the clone = %d, %d; want 1, 3", n, size)
	}
	if n, size := s.Size(); n != 0 || size != 0 {
		t.Errorf("Size of the original = %d, %d; want 0, 0", n, size)
	}
}
