package file

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"strings"

	"github.com/lsd-ceph/lsd/backend"
)

// List implements backend.Store.
func (s *Store) List(ctx context.Context, prefix string, fn func(key string) error) error {
	if err := begin(ctx, "list", prefix, backend.CheckPrefix(prefix)); err != nil {
		return err
	}
	// All keys that match lie in the directory of the prefix's last slash.
	dir := prefix[:strings.LastIndexByte(prefix, '/')+1]
	return s.list(ctx, dir, prefix, fn)
}

// list calls fn for the keys that begin with dir, which is empty or ends with
// a slash, and with prefix.
func (s *Store) list(ctx context.Context, dir, prefix string, fn func(key string) error) error {
	d, err := s.root.Open(strings.TrimSuffix(objectsDir+"/"+dir, "/"))
	if errors.Is(err, fs.ErrNotExist) {
		// As for a single object: none here, or no store at all?
		if err := s.absent("list", prefix); !errors.Is(err, backend.ErrNotFound) {
			return err
		}
		return nil
	}
	if err != nil {
		return fail("list", prefix, err)
	}
	defer d.Close()
	for {
		if err := check(ctx, "list", prefix); err != nil {
			return err
		}
		entries, err := d.ReadDir(1000) // a directory may hold millions
		for _, e := range entries {
			if err := s.listEntry(ctx, dir, e, prefix, fn); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fail("list", prefix, err)
		}
	}
}

func (s *Store) listEntry(ctx context.Context, dir string, e fs.DirEntry, prefix string, fn func(key string) error) error {
	if e.IsDir() {
		sub := dir + e.Name() + "/"
		// One of the two is the longer; they must agree as far as both go. What
		// is no part of a key was not put here by us.
		if !strings.HasPrefix(sub, prefix) && !strings.HasPrefix(prefix, sub) || backend.CheckPrefix(sub) != nil {
			return nil
		}
		return s.list(ctx, sub, prefix, fn)
	}
	name, ok := strings.CutSuffix(e.Name(), immutableSuffix)
	if !ok {
		name, ok = strings.CutSuffix(e.Name(), mutableSuffix)
	}
	key := dir + name
	if !ok || !strings.HasPrefix(key, prefix) || backend.CheckKey(key) != nil {
		return nil
	}
	if err := check(ctx, "list", prefix); err != nil {
		return err
	}
	return fn(key)
}
