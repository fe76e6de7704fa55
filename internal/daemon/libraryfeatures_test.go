package daemon

import (
	"testing"

	"github.com/lsd-ceph/lsd/librbd/wire"
	"golang.org/x/sys/unix"
)

// TestLibraryFeatures: features are switched off and on, and all handles see it.
func TestLibraryFeatures(t *testing.T) {
	w := newWorld(t)
	h := w.newHost()
	c := h.handle(wire.OpenRequest{})
	reader := h.handle(wire.OpenRequest{Flags: wire.OpenReadOnly})
	const all = wire.FeatureLayering | wire.FeatureExclusiveLock | wire.FeatureObjectMap | wire.FeatureFastDiff
	has := func(want uint64) {
		t.Helper()
		for _, x := range []*libraryClient{c, reader} {
			var r wire.FeaturesResult
			if err := x.call(wire.Features, nil, &r); err != nil || r.Features != want {
				t.Errorf("features %#x, %v, want %#x", r.Features, err, want)
			}
		}
	}
	turn := func(which uint64, on bool) error {
		return c.call(wire.SwitchFeatures, &wire.SwitchFeaturesRequest{Features: which, On: on}, nil)
	}
	has(all)
	errnoIs(t, reader.call(wire.SwitchFeatures, &wire.SwitchFeaturesRequest{Features: wire.FeatureFastDiff}, nil), unix.EROFS)
	for _, which := range []uint64{0, wire.FeatureLayering, 1 << 6, 1 << 40, wire.FeatureExclusiveLock, wire.FeatureFastDiff | wire.FeatureLayering} {
		errnoIs(t, turn(which, false), unix.EINVAL)
	}
	errnoIs(t, turn(wire.FeatureFastDiff, true), unix.EINVAL)
	has(all)
	if err := turn(all&^wire.FeatureLayering, false); err != nil {
		t.Fatal(err)
	}
	has(wire.FeatureLayering)
	errnoIs(t, turn(wire.FeatureFastDiff, false), unix.EINVAL)
	if err := turn(all&^wire.FeatureLayering, true); err != nil {
		t.Fatal(err)
	}
	has(all)
}
