package engine

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/internal/frame"
)

// Metadatum is a piece of the metadata of an image: what those who use it keep with it. lsd
// makes nothing of it.
type Metadatum struct {
	Key   string `json:"key"`
	Value string `json:"value"`
}

// Locker is who has an advisory lock of an image. Nobody may have two with the same cookie.
type Locker struct {
	Client  string    `json:"client"`
	Cookie  string    `json:"cookie"`
	Address string    `json:"address"` // where the client is, for people
	Since   time.Time `json:"since"`
}

// Locks are the advisory locks of an image: they keep nobody from anything but from locks.
type Locks struct {
	Exclusive bool     `json:"exclusive"` // else they are shared
	Tag       string   `json:"tag"`       // what those who share them agree on
	Lockers   []Locker `json:"lockers"`   // in the order in which they came
}

// Limits of what is kept with an image, in bytes and in lockers.
const (
	MaxMetadataKey   = 255
	MaxMetadataValue = 64 << 10
	MaxMetadata      = 1 << 20 // of keys and values together, and of 8 for each
	MaxLockText      = 1024    // of a client, a cookie, an address or a tag
	MaxLockers       = 256
)

// Errors of metadata and locks match one of these, where it is not the store's or the image's.
var (
	ErrNoMetadata   = errors.New("there is no metadata of that key")
	ErrMetadataText = errors.New("no key or value of metadata")
	ErrTooLong      = errors.New("it is too long")
	ErrFull         = errors.New("there is as much of it as there can be")
	ErrNoLock       = errors.New("there is no such lock")
	ErrLockExists   = errors.New("it has that lock already")
	ErrLocked       = errors.New("the image is locked")
	ErrLockText     = errors.New("no text of a lock")
)

// Metadata returns the metadata of an image, by key.
func Metadata(ctx context.Context, st backend.Store, id uuid.UUID) ([]Metadatum, error) {
	a, err := readAttributes(ctx, st, id)
	if err != nil {
		return nil, err
	}
	return a.metadata, nil
}

// MetadataOf returns the metadata of an image under a key. It fails with ErrNoMetadata where
// there is none.
func MetadataOf(ctx context.Context, st backend.Store, id uuid.UUID, key string) (string, error) {
	a, err := readAttributes(ctx, st, id)
	if err != nil {
		return "", err
	}
	i, ok := a.find(key)
	if !ok {
		return "", fmt.Errorf("%w: %s", ErrNoMetadata, key)
	}
	return a.metadata[i].Value, nil
}

// SetMetadata sets the metadata of an image under a key. Neither the key nor the value may have
// zero bytes. It fails with ErrTooLong or ErrFull where a limit is reached.
func SetMetadata(ctx context.Context, st backend.Store, id uuid.UUID, key, value string) error {
	m := Metadatum{key, value}
	if err := m.check(); err != nil {
		return err
	}
	return changeAttributes(ctx, st, id, func(a *attributes, _ bool) error {
		switch i, ok := a.find(key); {
		case ok && a.metadata[i] == m:
			return errNothing
		case ok:
			a.metadata[i] = m
		default:
			a.metadata = slices.Insert(a.metadata, i, m)
		}
		return nil
	})
}

// RemoveMetadata removes the metadata of an image under a key. It fails with ErrNoMetadata where
// there is none.
func RemoveMetadata(ctx context.Context, st backend.Store, id uuid.UUID, key string) error {
	return changeAttributes(ctx, st, id, func(a *attributes, again bool) error {
		i, ok := a.find(key)
		switch {
		case !ok && again:
			return errNothing // that was us
		case !ok:
			return fmt.Errorf("%w: %s", ErrNoMetadata, key)
		}
		a.metadata = slices.Delete(a.metadata, i, i+1)
		return nil
	})
}

// ClearMetadata removes all metadata of an image; where that is damaged, with the locks that
// are kept beside it.
func ClearMetadata(ctx context.Context, st backend.Store, id uuid.UUID) error {
	if err := notRemoved(ctx, patiently(st), id); err != nil {
		return err
	}
	err := changeAttributes(ctx, st, id, func(a *attributes, _ bool) error {
		if len(a.metadata) == 0 {
			return errNothing
		}
		a.metadata = nil
		return nil
	})
	if !damagedAttributes(err) {
		return err
	}
	if err := st.Delete(ctx, attributesKey(id)); err != nil && !errors.Is(err, backend.ErrNotFound) {
		return fmt.Errorf("remove the damaged metadata of image %s: %w", id, err)
	}
	return nil
}

// CopyMetadata gives an image the metadata of another one, beside what it has. Locks are not
// copied.
func CopyMetadata(ctx context.Context, src backend.Store, from uuid.UUID, dst backend.Store, to uuid.UUID) error {
	has, _, err := loadAttributes(ctx, patiently(src), from)
	if err != nil || len(has.metadata) == 0 {
		return err
	}
	return changeAttributes(ctx, dst, to, func(a *attributes, _ bool) error {
		for _, m := range has.metadata {
			if i, ok := a.find(m.Key); ok {
				a.metadata[i] = m
			} else {
				a.metadata = slices.Insert(a.metadata, i, m)
			}
		}
		return nil
	})
}

// LocksOf returns the advisory locks of an image.
func LocksOf(ctx context.Context, st backend.Store, id uuid.UUID) (Locks, error) {
	a, err := readAttributes(ctx, st, id)
	if err != nil {
		return Locks{}, err
	}
	return a.locks, nil
}

// Lock takes an advisory lock of an image. It fails with ErrLockExists where the client has one
// with that cookie, and with ErrLocked where others have locks that it does not go with: an
// exclusive one goes with none, shared ones with those of the same tag.
func Lock(ctx context.Context, st backend.Store, id uuid.UUID, l Locker, exclusive bool, tag string) error {
	l.Since = l.Since.UTC()
	if err := l.check(); err != nil {
		return err
	}
	if err := checkLockText(tag); err != nil {
		return err
	}
	return changeAttributes(ctx, st, id, func(a *attributes, again bool) error {
		if i := a.locks.find(l.Client, l.Cookie); again && i >= 0 && a.locks.Lockers[i].Since.Equal(l.Since) {
			return errNothing // that was us
		}
		return a.locks.add(l, exclusive, tag)
	})
}

// Unlock gives up the lock that a client has with a cookie. It fails with ErrNoLock where there
// is none.
func Unlock(ctx context.Context, st backend.Store, id uuid.UUID, client, cookie string) error {
	return changeAttributes(ctx, st, id, func(a *attributes, again bool) error {
		i := a.locks.find(client, cookie)
		switch {
		case i < 0 && again:
			return errNothing // that was us
		case i < 0:
			return fmt.Errorf("%w: of %s with the cookie %q", ErrNoLock, client, cookie)
		}
		if a.locks.Lockers = slices.Delete(a.locks.Lockers, i, i+1); len(a.locks.Lockers) == 0 {
			a.locks = Locks{}
		}
		return nil
	})
}

// find returns the place of a lock, or -1.
func (l *Locks) find(client, cookie string) int {
	return slices.IndexFunc(l.Lockers, func(o Locker) bool { return o.Client == client && o.Cookie == cookie })
}

// add adds a lock, if it goes with the others.
func (l *Locks) add(o Locker, exclusive bool, tag string) error {
	if len(l.Lockers) > 0 {
		holder := l.Lockers[0]
		conflict := func(how string) error {
			return fmt.Errorf("%w by %s at %s since %s%s", ErrLocked, holder.Client, holder.Address, holder.Since.Format(time.RFC3339), how)
		}
		switch {
		case tag != l.Tag:
			return conflict(", with another tag")
		case l.find(o.Client, o.Cookie) >= 0:
			return fmt.Errorf("%w: %s with the cookie %q", ErrLockExists, o.Client, o.Cookie)
		case exclusive || l.Exclusive:
			return conflict("")
		case len(l.Lockers) == MaxLockers:
			return fmt.Errorf("%d shared locks: %w", MaxLockers, ErrFull)
		}
	}
	l.Exclusive, l.Tag = exclusive, tag
	l.Lockers = append(l.Lockers, o)
	return nil
}

// check checks that it is one that can be kept.
func (m *Metadatum) check() error {
	switch {
	case m.Key == "" || strings.ContainsRune(m.Key, 0):
		return fmt.Errorf("%w: a key has at least one byte, and none of it is zero", ErrMetadataText)
	case strings.ContainsRune(m.Value, 0):
		return fmt.Errorf("%w: the value has a zero byte", ErrMetadataText)
	case len(m.Key) > MaxMetadataKey:
		return fmt.Errorf("a key of %d bytes, of at most %d: %w", len(m.Key), MaxMetadataKey, ErrTooLong)
	case len(m.Value) > MaxMetadataValue:
		return fmt.Errorf("a value of %d bytes, of at most %d: %w", len(m.Value), MaxMetadataValue, ErrTooLong)
	}
	return nil
}

func (l *Locker) check() error {
	if l.Client == "" {
		return fmt.Errorf("%w: nobody is named", ErrLockText)
	}
	return cmp.Or(checkLockText(l.Client), checkLockText(l.Cookie), checkLockText(l.Address))
}

func checkLockText(s string) error {
	switch {
	case strings.ContainsRune(s, 0):
		return fmt.Errorf("%w: it has a zero byte", ErrLockText)
	case len(s) > MaxLockText:
		return fmt.Errorf("%d bytes of at most %d: %w", len(s), MaxLockText, ErrTooLong)
	}
	return nil
}

// attributes is what is kept with an image beside its data: docs/formats.md gives the format of
// the object byte for byte.
type attributes struct {
	metadata []Metadatum // by key
	locks    Locks
	off      FeatureSet // those that the image does not have
}

const (
	attributesMagic   = "LSDATTR\x00"
	attributesVersion = 1
	featuresVersion   = 2  // of one that says which features are off
	attributesHeader  = 32 // bytes before the tag
	metadatumHeader   = 8  // bytes before the key
	lockerHeader      = 24 // bytes before the client
	locksExclusive    = 1 << 0
	featuresShift     = 1 // of the features that are off, among the flags
)

// attributesKey names what is kept with an image.
func attributesKey(id uuid.UUID) string { return id.String() + "/attributes" }

// find returns the place of a key among the metadata, or where it would be, and whether it is
// there.
func (a *attributes) find(key string) (int, bool) {
	return slices.BinarySearchFunc(a.metadata, key, func(m Metadatum, key string) int { return strings.Compare(m.Key, key) })
}

// check checks that nothing is beyond its limit, and what is known of the order.
func (a *attributes) check() error {
	size := 0
	for i := range a.metadata {
		m := &a.metadata[i]
		if err := m.check(); err != nil {
			return err
		}
		if i > 0 && a.metadata[i-1].Key >= m.Key {
			return errors.New("the keys are not in order")
		}
		size += metadatumHeader + len(m.Key) + len(m.Value)
	}
	if a.off&^AllFeatures != 0 || !a.off.closed() {
		return fmt.Errorf("features %#x cannot be off", a.off)
	}
	if size > MaxMetadata {
		return fmt.Errorf("metadata of %d bytes, of at most %d: %w", size, MaxMetadata, ErrFull)
	}
	return a.locks.check()
}

func (l *Locks) check() error {
	switch n := len(l.Lockers); {
	case n > MaxLockers || l.Exclusive && n != 1 || n == 0 && l.Tag != "":
		return fmt.Errorf("%d locks cannot be", n)
	}
	for i := range l.Lockers {
		o := &l.Lockers[i]
		if err := o.check(); err != nil {
			return err
		}
		if l.find(o.Client, o.Cookie) != i {
			return errors.New("a lock is there twice")
		}
	}
	return checkLockText(l.Tag)
}

// encode returns the bytes of what is kept with the image id, or which limit it is beyond.
func (a *attributes) encode(id uuid.UUID) ([]byte, error) {
	if err := a.check(); err != nil {
		return nil, err
	}
	le, version := binary.LittleEndian, uint32(attributesVersion)
	if a.off != 0 {
		version = featuresVersion // an earlier lsd is not to take it for damaged
	}
	flags := uint32(a.off) << featuresShift
	if a.locks.Exclusive {
		flags |= locksExclusive
	}
	b := slices.Clone(id[:])
	for _, n := range []uint32{uint32(len(a.metadata)), uint32(len(a.locks.Lockers)), flags, uint32(len(a.locks.Tag))} {
		b = le.AppendUint32(b, n)
	}
	b = append(b, a.locks.Tag...)
	for _, m := range a.metadata {
		b = le.AppendUint32(b, uint32(len(m.Key)))
		b = le.AppendUint32(b, uint32(len(m.Value)))
		b = append(append(b, m.Key...), m.Value...)
	}
	for _, o := range a.locks.Lockers {
		b = le.AppendUint64(b, uint64(o.Since.UnixNano()))
		for _, n := range []uint32{uint32(len(o.Client)), uint32(len(o.Cookie)), uint32(len(o.Address)), 0} {
			b = le.AppendUint32(b, n)
		}
		b = append(append(append(b, o.Client...), o.Cookie...), o.Address...)
	}
	return frame.Encode(attributesMagic, version, b), nil
}

// decodeAttributes decodes and checks what is kept with the image id.
func decodeAttributes(b []byte, id uuid.UUID) (*attributes, error) {
	p, err := frame.Decode(attributesMagic, b, attributesVersion, featuresVersion)
	if err != nil {
		return nil, err
	}
	d := attributesDecoder{left: p}
	head := d.next(attributesHeader)
	if head == nil {
		return nil, fmt.Errorf("%w: it is cut short", frame.ErrCorrupt)
	}
	if of := uuid.UUID(head[:16]); of != id {
		return nil, fmt.Errorf("%w: it is that of image %s", frame.ErrCorrupt, of)
	}
	n, lockers, flags := d.u32(head, 16), d.u32(head, 20), d.u32(head, 24)
	a := &attributes{locks: Locks{Exclusive: flags&locksExclusive != 0, Tag: d.text(d.u32(head, 28))}, off: FeatureSet(flags >> featuresShift)}
	for range n {
		if d.short {
			break
		}
		a.metadata = append(a.metadata, d.metadatum())
	}
	for range lockers {
		if d.short {
			break
		}
		a.locks.Lockers = append(a.locks.Lockers, d.locker())
	}
	if d.short || d.strange || len(d.left) > 0 || (a.off != 0) != (b[8] == featuresVersion) {
		return nil, fmt.Errorf("%w: its lengths do not add up", frame.ErrCorrupt)
	}
	if err := a.check(); err != nil {
		return nil, fmt.Errorf("%w: %v", frame.ErrCorrupt, err)
	}
	return a, nil
}

// attributesDecoder takes an attributes object's payload apart.
type attributesDecoder struct {
	left    []byte
	short   bool // there was not what had to be
	strange bool // there was what must not be
}

// next takes n bytes, or returns nil.
func (d *attributesDecoder) next(n uint32) []byte {
	if d.short || uint64(n) > uint64(len(d.left)) {
		d.short = true
		return nil
	}
	p := d.left[:n]
	d.left = d.left[n:]
	return p
}

func (d *attributesDecoder) u32(p []byte, at int) uint32 { return binary.LittleEndian.Uint32(p[at:]) }

func (d *attributesDecoder) text(n uint32) string { return string(d.next(n)) }

func (d *attributesDecoder) metadatum() (m Metadatum) {
	if p := d.next(metadatumHeader); p != nil {
		m = Metadatum{d.text(d.u32(p, 0)), d.text(d.u32(p, 4))}
	}
	return m
}

func (d *attributesDecoder) locker() (o Locker) {
	if p := d.next(lockerHeader); p != nil {
		d.strange = d.strange || d.u32(p, 20) != 0
		o = Locker{d.text(d.u32(p, 8)), d.text(d.u32(p, 12)), d.text(d.u32(p, 16)), time.Unix(0, int64(binary.LittleEndian.Uint64(p))).UTC()}
	}
	return o
}

// loadAttributes reads what is kept with an image, nothing if there is no such object. The
// version is right also where it is damaged.
func loadAttributes(ctx context.Context, st backend.Store, id uuid.UUID) (*attributes, backend.Version, error) {
	b, v, err := st.Load(ctx, attributesKey(id))
	switch {
	case errors.Is(err, backend.ErrNotFound):
		return new(attributes), backend.NoVersion, nil
	case err != nil:
		return nil, "", fmt.Errorf("metadata and locks: %w", err)
	}
	a, err := decodeAttributes(b, id)
	if err != nil {
		return nil, v, fmt.Errorf("metadata and locks %s: %w", attributesKey(id), err)
	}
	return a, v, nil
}

// damagedAttributes reports whether an error says that what is kept with an image cannot be
// read, by any lsd.
func damagedAttributes(err error) bool {
	return errors.Is(err, frame.ErrCorrupt) || damagedDirectory(err) // the store's own checks fail for that, too
}

// readAttributes is loadAttributes of an image that has not been removed.
func readAttributes(ctx context.Context, st backend.Store, id uuid.UUID) (*attributes, error) {
	p := patiently(st)
	if err := notRemoved(ctx, p, id); err != nil {
		return nil, err
	}
	a, _, err := loadAttributes(ctx, p, id)
	return a, err
}

// notRemoved fails where there is no such image, or none any more.
func notRemoved(ctx context.Context, st backend.Store, id uuid.UUID) error {
	sb, _, err := loadSuperblock(ctx, st, id)
	if err != nil {
		return err
	}
	return removedError(sb.Removed, nil)
}

// changeAttributes applies change to what is kept with an image until it is not disturbed by
// others. An error of change ends it; errNothing says that there is nothing to change, and is no
// error. again says that an earlier result of change may have been stored.
func changeAttributes(ctx context.Context, st backend.Store, id uuid.UUID, change func(a *attributes, again bool) error) error {
	p, again := patiently(st), false
	return p.try(ctx, func() error {
		for {
			if err := notRemoved(ctx, p, id); err != nil {
				return err
			}
			a, v, err := loadAttributes(ctx, p, id)
			if err != nil {
				return err
			}
			switch err := change(a, again); {
			case errors.Is(err, errNothing):
				return nil
			case err != nil:
				return err
			}
			b, err := a.encode(id)
			if err != nil {
				return err
			}
			_, err = p.Swap(ctx, attributesKey(id), v, b)
			switch {
			case err == nil && v == backend.NoVersion:
				return dropIfRemoved(ctx, p, id)
			case err == nil:
				return nil
			case !errors.Is(err, backend.ErrConflict):
				again = true
				return fmt.Errorf("change metadata and locks of image %s: %w", id, err)
			}
		}
	})
}

// dropIfRemoved removes what has just been made if its image was removed meanwhile: whoever
// reclaimed that may not have seen it. Where that cannot be told it is left.
func dropIfRemoved(ctx context.Context, st backend.Store, id uuid.UUID) error {
	gone := notRemoved(ctx, st, id)
	if !errors.Is(gone, backend.ErrNotFound) {
		return nil
	}
	if err := st.Delete(ctx, attributesKey(id)); err != nil && !errors.Is(err, backend.ErrNotFound) {
		return fmt.Errorf("%w; its metadata could not be removed: %w", gone, err)
	}
	return gone
}
