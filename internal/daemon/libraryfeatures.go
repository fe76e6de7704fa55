package daemon

import (
	"context"
	"fmt"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/librbd/wire"
)

// switchedFeatures returns the features that can be switched: what clients call them, and what the
// engine does.
func switchedFeatures() map[uint64]engine.FeatureSet {
	return map[uint64]engine.FeatureSet{
		wire.FeatureExclusiveLock: engine.FeatureExclusiveLock,
		wire.FeatureObjectMap:     engine.FeatureObjectMap,
		wire.FeatureFastDiff:      engine.FeatureFastDiff,
	}
}

// features says which features the handle's image has.
func (s *session) features(ctx context.Context, w *answer) error {
	return s.withStore(ctx, func(ctx context.Context, st backend.Store, id uuid.UUID) error {
		set, err := engine.Features(ctx, st, id)
		r := &wire.FeaturesResult{Features: wire.FeatureLayering}
		for flag, f := range switchedFeatures() {
			if set&f != 0 {
				r.Features |= flag
			}
		}
		w.result = r
		return err
	})
}

// switchFeatures switches features of the handle's image on, or off.
func (s *session) switchFeatures(ctx context.Context, f wire.Frame) error {
	var q wire.SwitchFeaturesRequest
	if err := parse(f, &q); err != nil {
		return err
	}
	var set engine.FeatureSet
	rest := q.Features
	for flag, f := range switchedFeatures() {
		if rest&flag != 0 {
			rest, set = rest&^flag, set|f
		}
	}
	if rest != 0 {
		return fmt.Errorf("%w: features %#x cannot be switched", errInvalid, rest)
	}
	return s.withStore(ctx, func(ctx context.Context, st backend.Store, id uuid.UUID) error {
		return engine.SwitchFeatures(ctx, st, id, set, q.On)
	})
}
