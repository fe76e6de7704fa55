package engine

import (
	"errors"
	"testing"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/internal/frame"
)

// TestFeatures: features are switched off and on, never so that one is without what it needs, and
// what is kept beside them stays.
func TestFeatures(t *testing.T) {
	ctx, st := t.Context(), mem.New()
	id := described(t, st)
	const lock, objects, diff = FeatureExclusiveLock, FeatureObjectMap, FeatureFastDiff
	for i, tt := range []struct {
		which FeatureSet
		on    bool
		fails bool
		then  FeatureSet
	}{
		{lock, true, true, AllFeatures},
		{lock, false, true, AllFeatures},
		{objects, false, true, AllFeatures},
		{lock | objects, false, true, AllFeatures},
		{0, false, true, AllFeatures},
		{1 << 3, false, true, AllFeatures},
		{diff, false, false, lock | objects},
		{diff, false, true, lock | objects},
		{diff | objects, false, true, lock | objects},
		{objects, false, false, lock},
		{diff, true, true, lock},
		{lock, false, false, 0},
		{objects, true, true, 0},
		{lock | objects | diff, true, false, AllFeatures},
		{lock | objects | diff, false, false, 0},
	} {
		if err := SwitchFeatures(ctx, st, id, tt.which, tt.on); errors.Is(err, ErrFeatures) != tt.fails || !tt.fails && err != nil {
			t.Errorf("%d: %v", i, err)
		}
		if got, err := Features(ctx, st, id); err != nil || got != tt.then {
			t.Errorf("%d: %#x, %v, want %#x", i, got, err, tt.then)
		}
	}
	mustHaveMetadata(t, st, id, "k=v")
	if l, err := LocksOf(ctx, st, id); err != nil || len(l.Lockers) != 1 {
		t.Errorf("%+v, %v", l, err)
	}
	mustBeSound(t, st, "disk")
}

// TestFeaturesFormat: the features that are off have bits of their own, and a version that an
// earlier lsd does not take for damage.
func TestFeaturesFormat(t *testing.T) {
	id := uuid.UUID{1}
	encode := func(a *attributes) []byte {
		b, err := a.encode(id)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	b := encode(&attributes{off: FeatureFastDiff | FeatureObjectMap})
	if b[8] != 2 || b[frame.HeaderSize+24] != 3<<2 {
		t.Errorf("version %d, flags %#x", b[8], b[frame.HeaderSize+24])
	}
	if a, err := decodeAttributes(b, id); err != nil || a.off != FeatureFastDiff|FeatureObjectMap {
		t.Errorf("%+v, %v", a, err)
	}
	if v := encode(new(attributes))[8]; v != 1 {
		t.Errorf("version %d where all are on", v)
	}
	payload := b[frame.HeaderSize:]
	for _, flags := range []byte{0, 1 << 1, 1 << 2, 1 << 4, 3<<2 | 1} {
		payload[24] = flags
		if _, err := decodeAttributes(frame.Encode(attributesMagic, featuresVersion, payload), id); !errors.Is(err, frame.ErrCorrupt) {
			t.Errorf("flags %#x: %v", flags, err)
		}
	}
	payload[24] = 3 << 2
	if _, err := decodeAttributes(frame.Encode(attributesMagic, attributesVersion, payload), id); !errors.Is(err, frame.ErrCorrupt) {
		t.Errorf("in the first version: %v", err)
	}
}
