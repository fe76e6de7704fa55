//go:build pacific

// Goceph does with images what Go programs do with go-ceph: a process with a Go runtime, its
// threads and its signals, on the C library. The tag is go-ceph's, for the librbd that it builds
// against.
//
//	goceph POOL [CONF]
//
// It has been found to end well on Ceph's librbd.
package main

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/ceph/go-ceph/rados"
	"github.com/ceph/go-ceph/rbd"
)

const (
	mib   = 1 << 20
	size  = 64 * mib
	order = 23 // an object has 8 MiB
)

func main() {
	log.SetFlags(0)
	if len(os.Args) < 2 {
		log.Fatal("usage: goceph POOL [CONF]")
	}
	if err := run(os.Args[1], os.Args[2:]); err != nil {
		log.Fatal(err)
	}
}

// run connects, and does everything.
func run(pool string, conf []string) error {
	conn, err := rados.NewConnWithUser("admin")
	if err != nil {
		return err
	}
	defer conn.Shutdown()
	for _, path := range conf {
		if err := conn.ReadConfigFile(path); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	if err := conn.Connect(); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	ioctx, err := conn.OpenIOContext(pool)
	if err != nil {
		return fmt.Errorf("pool %s: %w", pool, err)
	}
	defer ioctx.Destroy()
	for _, step := range []struct {
		name string
		do   func(*rados.IOContext) error
	}{
		{"create", create},
		{"side by side", sideBySide},
		{"snapshots", snapshots},
		{"clone", clone},
		{"differences", differences},
		{"metadata", metadata},
		{"locks", locks},
		{"trash", trash},
		{"remove", remove},
	} {
		if err := step.do(ioctx); err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
		fmt.Println("ok", step.name)
	}
	return nil
}

// with opens an image for a function.
func with(ioctx *rados.IOContext, name string, do func(*rbd.Image) error) error {
	image, err := rbd.OpenImage(ioctx, name, rbd.NoSnapshot)
	if err != nil {
		return fmt.Errorf("open %s: %w", name, err)
	}
	return errors.Join(do(image), image.Close())
}

func create(ioctx *rados.IOContext) error {
	options := rbd.NewRbdImageOptions()
	defer options.Destroy()
	if err := options.SetUint64(rbd.ImageOptionOrder, order); err != nil {
		return err
	}
	if err := rbd.CreateImage(ioctx, "vm1", size, options); err != nil {
		return err
	}
	if err := rbd.CreateImage(ioctx, "vm1", size, options); !errors.Is(err, rbd.ErrExist) {
		return fmt.Errorf("it is there: %w", err)
	}
	if _, err := rbd.OpenImage(ioctx, "none", rbd.NoSnapshot); !errors.Is(err, rbd.ErrNotFound) {
		return fmt.Errorf("it is not there: %w", err)
	}
	names, err := rbd.GetImageNames(ioctx)
	if err != nil || !slices.Equal(names, []string{"vm1"}) {
		return fmt.Errorf("images: %q, %w", names, err)
	}
	return with(ioctx, "vm1", func(image *rbd.Image) error {
		info, err := image.Stat()
		if err != nil || info.Size != size || info.Order != order || info.Num_objs != size>>order {
			return fmt.Errorf("stat: %+v, %w", info, err)
		}
		if _, err := image.Seek(size-4, io.SeekStart); err != nil {
			return err
		}
		if n, err := image.Write([]byte("last")); n != 4 || err != nil {
			return fmt.Errorf("write: %d, %w", n, err)
		}
		if err := image.Resize(size + mib); err != nil {
			return err
		}
		got := make([]byte, 8)
		if n, err := image.ReadAt(got, size-4); n != 8 || err != nil || !bytes.Equal(got, []byte("last\x00\x00\x00\x00")) {
			return fmt.Errorf("read: %q, %w", got, err)
		}
		return image.Resize(size)
	})
}

// sideBySide writes and reads an image from many goroutines, by handles of their own and by one
// that they share, while the collector runs.
func sideBySide(ioctx *rados.IOContext) error {
	return with(ioctx, "vm1", func(shared *rbd.Image) error {
		var all sync.WaitGroup
		errs := make([]error, 16)
		for i := range errs {
			all.Go(func() {
				if i%2 == 0 {
					errs[i] = churn(shared, i)
				} else {
					errs[i] = with(ioctx, "vm1", func(own *rbd.Image) error { return churn(own, i) })
				}
			})
		}
		all.Wait()
		return errors.Join(append(errs, shared.Flush())...)
	})
}

// churn writes a part of the image again and again, and reads it.
func churn(image *rbd.Image, part int) error {
	data := make([]byte, 77777)
	got := make([]byte, len(data))
	for round := range 20 {
		_, _ = rand.Read(data)
		at := int64(part*2*mib + round*13)
		if n, err := image.WriteAt(data, at); n != len(data) || err != nil {
			return fmt.Errorf("write: %d, %w", n, err)
		}
		runtime.GC()
		if n, err := image.ReadAt(got, at); n != len(got) || err != nil || !bytes.Equal(got, data) {
			return fmt.Errorf("read at %d: %d bytes, the same: %t, %w", at, n, bytes.Equal(got, data), err)
		}
	}
	n, err := image.Discard(uint64(part*2*mib+mib), mib)
	if err != nil || n != mib {
		return fmt.Errorf("discard: %d, %w", n, err)
	}
	return nil
}

func snapshots(ioctx *rados.IOContext) error {
	return with(ioctx, "vm1", func(image *rbd.Image) error {
		if _, err := image.WriteAt([]byte("before"), 40*mib); err != nil {
			return err
		}
		snap, err := image.CreateSnapshot("snap")
		if err != nil {
			return err
		}
		if _, err := image.CreateSnapshot("snap"); !errors.Is(err, rbd.ErrExist) {
			return fmt.Errorf("it is there: %w", err)
		}
		if _, err := image.WriteAt([]byte("behind"), 40*mib); err != nil {
			return err
		}
		list, err := image.GetSnapshotNames()
		if err != nil || len(list) != 1 || list[0].Name != "snap" || list[0].Size != size {
			return fmt.Errorf("list: %+v, %w", list, err)
		}
		if _, err := image.GetSnapTimestamp(list[0].Id); err != nil {
			return err
		}
		if err := image.SetSnapshot("snap"); err != nil {
			return err
		}
		got := make([]byte, 6)
		if _, err := image.ReadAt(got, 40*mib); err != nil || string(got) != "before" {
			return fmt.Errorf("what the snapshot has: %q, %w", got, err)
		}
		if err := image.SetSnapshot(""); err != nil {
			return err
		}
		return snap.Protect()
	})
}

func clone(ioctx *rados.IOContext) error {
	options := rbd.NewRbdImageOptions()
	defer options.Destroy()
	if err := options.SetUint64(rbd.ImageOptionOrder, order); err != nil {
		return err
	}
	if err := rbd.CloneImage(ioctx, "vm1", "snap", ioctx, "vm2", options); err != nil {
		return err
	}
	err := with(ioctx, "vm2", func(image *rbd.Image) error {
		parent, err := image.GetParent()
		if err != nil || parent.Image.ImageName != "vm1" || parent.Snap.SnapName != "snap" {
			return fmt.Errorf("parent: %+v, %w", parent, err)
		}
		got := make([]byte, 6)
		if _, err := image.ReadAt(got, 40*mib); err != nil || string(got) != "before" {
			return fmt.Errorf("what the clone has: %q, %w", got, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	err = with(ioctx, "vm1", func(image *rbd.Image) error {
		if err := image.SetSnapshot("snap"); err != nil {
			return err
		}
		_, children, err := image.ListChildren()
		if err != nil || !slices.Equal(children, []string{"vm2"}) {
			return fmt.Errorf("children: %q, %w", children, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return with(ioctx, "vm2", func(image *rbd.Image) error {
		if err := image.Flatten(); err != nil {
			return fmt.Errorf("flatten: %w", err)
		}
		if _, err := image.GetParent(); !errors.Is(err, rbd.ErrNotFound) {
			return fmt.Errorf("a parent of what is flat: %w", err)
		}
		return nil
	})
}

func differences(ioctx *rados.IOContext) error {
	return with(ioctx, "vm1", func(image *rbd.Image) error {
		type change struct{ offset, length uint64 }
		var changes []change
		ask := rbd.DiffIterateConfig{
			SnapName: "snap", Length: size,
			Callback: func(offset, length uint64, exists int, _ interface{}) int {
				if exists == 1 {
					changes = append(changes, change{offset, length})
				}
				return 0
			},
		}
		if err := image.DiffIterate(ask); err != nil {
			return err
		}
		if len(changes) != 1 || changes[0].offset > 40*mib || changes[0].offset+changes[0].length < 40*mib+6 {
			return fmt.Errorf("changes: %v", changes)
		}
		ask.Callback = func(uint64, uint64, int, interface{}) int { return -28 }
		var code interface{ ErrorCode() int }
		if err := image.DiffIterate(ask); !errors.As(err, &code) || code.ErrorCode() != -28 {
			return fmt.Errorf("the callback's error: %w", err)
		}
		return nil
	})
}

func metadata(ioctx *rados.IOContext) error {
	return with(ioctx, "vm1", func(image *rbd.Image) error {
		if err := image.SetMetadata("key", "value"); err != nil {
			return err
		}
		if v, err := image.GetMetadata("key"); err != nil || v != "value" {
			return fmt.Errorf("metadata: %q, %w", v, err)
		}
		if err := image.RemoveMetadata("key"); err != nil {
			return err
		}
		if v, err := image.GetMetadata("key"); !errors.Is(err, rbd.ErrNotFound) {
			return fmt.Errorf("metadata that is gone: %q, %w", v, err)
		}
		return nil
	})
}

// locks takes a handle that has changed nothing: librbd locks what it changes by itself.
func locks(ioctx *rados.IOContext) error {
	return with(ioctx, "vm1", func(image *rbd.Image) error {
		if err := image.LockExclusive("cookie"); err != nil {
			return err
		}
		tag, lockers, err := image.ListLockers()
		if err != nil || strings.Trim(tag, "\x00") != "" || len(lockers) != 1 || lockers[0].Cookie != "cookie" {
			return fmt.Errorf("lockers: %q, %+v, %w", tag, lockers, err)
		}
		return image.Unlock("cookie")
	})
}

func trash(ioctx *rados.IOContext) error {
	if err := rbd.GetImage(ioctx, "vm2").Trash(0); err != nil {
		return err
	}
	list, err := rbd.GetTrashList(ioctx)
	if err != nil || len(list) != 1 || list[0].Name != "vm2" {
		return fmt.Errorf("list: %+v, %w", list, err)
	}
	if err := rbd.TrashRestore(ioctx, list[0].Id, "vm3"); err != nil {
		return err
	}
	return rbd.RemoveImage(ioctx, "vm3")
}

func remove(ioctx *rados.IOContext) error {
	err := with(ioctx, "vm1", func(image *rbd.Image) error {
		snap := image.GetSnapshot("snap")
		if err := snap.Rollback(); err != nil {
			return fmt.Errorf("roll back: %w", err)
		}
		got := make([]byte, 6)
		if _, err := image.ReadAt(got, 40*mib); err != nil || string(got) != "before" {
			return fmt.Errorf("rolled back: %q, %w", got, err)
		}
		return errors.Join(snap.Unprotect(), snap.Remove())
	})
	if err != nil {
		return err
	}
	if err := rbd.RemoveImage(ioctx, "vm1"); err != nil {
		return err
	}
	names, err := rbd.GetImageNames(ioctx)
	if err != nil || len(names) != 0 {
		return fmt.Errorf("images that are left: %q, %w", names, err)
	}
	return nil
}
