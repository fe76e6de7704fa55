package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/api"
)

// withStates opens states of an image to be read, each the snapshot of that name or, with "",
// the image as its store has it now, and calls fn with them.
func (a *app) withStates(ctx context.Context, u backend.URL, image string, snaps []string, fn func([]*engine.View) error) error {
	st, err := openStore(ctx, u)
	if err != nil {
		return err
	}
	defer st.Close()
	id, err := lookUp(ctx, st, u, image)
	if err != nil {
		return err
	}
	views := make([]*engine.View, 0, len(snaps))
	defer func() {
		for _, v := range views {
			v.Close()
		}
	}()
	for _, snap := range snaps {
		v, err := a.openState(ctx, st, u, image, id, snap)
		if err != nil {
			return err
		}
		views = append(views, v)
	}
	return timedOut(u, fn(views))
}

// openState opens a state of the image id.
func (a *app) openState(ctx context.Context, st backend.Store, u backend.URL, image string, id uuid.UUID, snap string) (*engine.View, error) {
	o := engine.ViewOptions{Progress: func(what string) { a.progress.show(api.Progress{What: what}) }}
	err := error(nil)
	if snap == "" {
		err = a.remarkOwner(ctx, st, u, image, id)
	} else {
		o.Snapshot, err = snapshotID(ctx, st, id, snap)
	}
	if err != nil {
		return nil, timedOut(u, noSnapshot(u, image, err))
	}
	v, err := engine.OpenView(ctx, st, id, o)
	return v, timedOut(u, noImage(u, image, err))
}

// snapshotID returns the id of a snapshot of the image id.
func snapshotID(ctx context.Context, st backend.Store, id uuid.UUID, name string) (uuid.UUID, error) {
	ctx, stop := context.WithTimeout(ctx, storeTimeout)
	defer stop()
	list, err := engine.Snapshots(ctx, st, id)
	if err != nil {
		return uuid.Nil, err
	}
	for _, s := range list {
		if s.Name == name {
			return s.ID, nil
		}
	}
	return uuid.Nil, fmt.Errorf("%w %q", engine.ErrNoSnapshot, name)
}

// remarkOwner says so if somebody has the image attached whose store is read.
func (a *app) remarkOwner(ctx context.Context, st backend.Store, u backend.URL, image string, id uuid.UUID) error {
	ctx, stop := context.WithTimeout(ctx, storeTimeout)
	defer stop()
	owner, err := engine.OwnerOf(ctx, st, id)
	if err == nil && owner != nil {
		fmt.Fprintf(a.progress.w, "%s is attached by %s: this is what of it has reached the store\n", u.Image(image), owner.Host)
	}
	return noImage(u, image, err)
}

// parseStates parses IMAGE[@FROM] [@TO]. Both are "" if they are not given.
func parseStates(args []string) (u backend.URL, image, from, to string, err error) {
	if u, image, from, err = parseSource(args[0]); err != nil || len(args) < 2 {
		return u, image, from, "", err
	}
	to, at := strings.CutPrefix(args[1], "@")
	switch {
	case at:
		err = backend.CheckSnapshotName(to)
	case isURL(args[1]):
		var v backend.URL
		var other string
		if v, other, to, err = parseSnapshot(args[1]); err == nil && (v != u || other != image) {
			err = fmt.Errorf("%s is of another image than %s: only states of one image are compared", args[1], u.Image(image))
		}
	default:
		err = errors.New(args[1] + ": write @NAME for a snapshot of the same image")
	}
	return u, image, from, to, err
}
