package engine

import (
	"context"
	"errors"
	"testing"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/mem"
)

// TestMissingPart: an image that has lost an object is damaged; one that has lost its
// superblock is gone.
func TestMissingPart(t *testing.T) {
	ctx := context.Background()
	for _, super := range []bool{false, true} {
		for _, readOnly := range []bool{false, true} {
			st := mem.New()
			id := newImageIn(t, st)
			a := newHost(t, "alpha", st, 1)
			if err := a.open(id, false); err != nil {
				t.Fatal(err)
			}
			a.mustWrite(1, 1)
			a.mustClose()
			key := manifestKey(id, *a.im.checkpoint.last, 0)
			if super {
				key = SuperblockKey(id)
			}
			if err := st.Delete(ctx, key); err != nil {
				t.Fatal(err)
			}
			o := OpenOptions{ReadOnly: readOnly, Clock: a, Config: Config{Logger: quiet}}
			if !readOnly {
				o.Log = newHost(t, "beta", st, 2).disk
			}
			_, err := Open(ctx, st, id, o)
			if errors.Is(err, backend.ErrNotFound) != super || errors.Is(err, ErrCorrupt) == super {
				t.Errorf("%s is missing, read-only %v: %v", key, readOnly, err)
			}
		}
	}
}
