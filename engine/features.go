package engine

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
)

// FeatureSet is a set of features of librbd's that every image of lsd has until somebody switches
// them off. lsd makes nothing of that: who does it wants to be told so.
type FeatureSet uint32

// The features that can be switched, each of which needs the one before it.
const (
	FeatureExclusiveLock FeatureSet = 1 << iota
	FeatureObjectMap
	FeatureFastDiff

	// AllFeatures are those that an image has when it is made.
	AllFeatures = FeatureExclusiveLock | FeatureObjectMap | FeatureFastDiff
)

// ErrFeatures is why features are not switched: they are on already, or off, or others need them.
var ErrFeatures = errors.New("features cannot be switched so")

// Features returns which features an image has.
func Features(ctx context.Context, st backend.Store, id uuid.UUID) (FeatureSet, error) {
	a, err := readAttributes(ctx, st, id)
	if err != nil {
		return 0, err
	}
	return AllFeatures &^ a.off, nil
}

// SwitchFeatures switches features of an image on, or off. It fails with ErrFeatures where one of
// them is already, or one would be without what it needs.
func SwitchFeatures(ctx context.Context, st backend.Store, id uuid.UUID, which FeatureSet, on bool) error {
	if which == 0 || which&^AllFeatures != 0 {
		return fmt.Errorf("%w: there are none such", ErrFeatures)
	}
	return changeAttributes(ctx, st, id, func(a *attributes, again bool) error {
		off := a.off | which
		if on {
			off = a.off &^ which
		}
		switch {
		case off == a.off && again:
			return errNothing // that was us
		case off^a.off != which:
			return fmt.Errorf("%w: some are already", ErrFeatures)
		case !off.closed():
			return fmt.Errorf("%w: fast-diff needs object-map, and that exclusive-lock", ErrFeatures)
		}
		a.off = off
		return nil
	})
}

// closed reports whether no feature is on that needs one that is off.
func (off FeatureSet) closed() bool { return AllFeatures&(off<<1)&^off == 0 }
